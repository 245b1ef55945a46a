"""Float64 arrays that round after every operation, at random or to nearest, as a narrower arithmetic would."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from bdh_spec.params import Array

EXACT = {np.maximum, np.negative}


class Precision(NamedTuple):
    """How a floating point type rounds."""

    unit: float  # the largest relative error of one rounding to nearest
    lowest: int  # the power of two below which numbers are no longer spaced by their size: 0.5 to 1 counts as 0


FLOAT32 = Precision(2.0**-24, -125)


class Noisy(np.ndarray[Any, Any]):
    """An array whose every result is off by up to half the spacing of numbers in another precision.

    The specification runs on it unchanged: what comes out is how far rounding of that precision moves each stage of that
    very case.
    """

    precision: Precision
    rng: np.random.Generator | None

    @classmethod
    def wrap(cls, values: Array, precision: Precision, rng: np.random.Generator | None) -> Noisy:
        noisy = np.array(values, np.float64).view(cls)
        noisy.precision, noisy.rng = precision, rng
        return noisy

    def __array_finalize__(self, parent: Any) -> None:
        if isinstance(parent, Noisy):
            self.precision, self.rng = parent.precision, parent.rng

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **kwargs: Any) -> Any:
        source = next(a for a in (*inputs, *(out or ())) if isinstance(a, Noisy))
        if method == "at":
            ufunc.at(plain(inputs[0]), *(plain(a) for a in inputs[1:]))
            return None
        result = source.rounded(getattr(ufunc, method)(*(plain(a) for a in inputs), **kwargs), ufunc)
        if out is None:
            return result
        plain(out[0])[...] = result
        return out[0]

    def rounded(self, exact: Any, ufunc: np.ufunc) -> Any:
        """The exact result as this arithmetic might have stored it."""
        if np.asarray(exact).dtype.kind != "f":
            return exact
        stored = exact if ufunc in EXACT else self.store(exact)
        return Noisy.wrap(stored, self.precision, self.rng)

    def wide(self, values: Array) -> Noisy:
        """An array beside this one whose sums are kept in float32."""
        return Noisy.wrap(values, min(self.precision, FLOAT32), self.rng)

    def store(self, exact: Any) -> Any:
        """A number within half a spacing: the nearest one there is, or any if there is a generator."""
        spacing = np.ldexp(self.precision.unit, np.maximum(np.frexp(exact)[1], self.precision.lowest))
        if self.rng is None:
            return np.round(exact / spacing) * spacing
        return exact + self.rng.uniform(-0.5, 0.5, np.shape(exact)) * spacing * (exact != 0)  # zero is exact


def plain(value: Any) -> Any:
    """The same memory without the noise."""
    return value.view(np.ndarray) if isinstance(value, Noisy) else value
