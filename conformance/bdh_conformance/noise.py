"""Float64 arrays that round at random after every operation, as a narrower arithmetic would."""

from __future__ import annotations

from typing import Any

import numpy as np

from bdh_spec.params import Array

EXACT = {np.maximum, np.negative}


class Noisy(np.ndarray[Any, Any]):
    """An array whose every result is off by up to half a spacing of an arithmetic whose rounding errs by ``unit`` at most.

    The specification runs on it unchanged: what comes out is how far rounding of that precision moves each stage of that
    very case.
    """

    unit: float
    rng: np.random.Generator

    @classmethod
    def wrap(cls, values: Array, unit: float, rng: np.random.Generator) -> Noisy:
        noisy = np.array(values, np.float64).view(cls)
        noisy.unit, noisy.rng = unit, rng
        return noisy

    def __array_finalize__(self, parent: Any) -> None:
        if isinstance(parent, Noisy):
            self.unit, self.rng = parent.unit, parent.rng

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
        if np.asarray(exact).dtype.kind != "f" or ufunc in EXACT:  # comparisons and choices round nothing
            return exact
        spacing = np.ldexp(self.unit, np.frexp(exact)[1]) * (exact != 0)  # of neighbouring numbers; zero is exact
        return Noisy.wrap(exact + self.rng.uniform(-0.5, 0.5, np.shape(exact)) * spacing, self.unit, self.rng)


def plain(value: Any) -> Any:
    """The same memory without the noise."""
    return value.view(np.ndarray) if isinstance(value, Noisy) else value
