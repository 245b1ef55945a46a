"""Float64 arrays that round after every operation, at random or to nearest, as a narrower arithmetic would."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np

from bdh_spec.params import Array

EXACT = {np.maximum, np.negative}
LIBRARY = {np.exp, np.log, np.cos, np.sin}  # whose approximations are up to two units off, and all the same way

FEW = 64  # terms up to which the order of a sum makes no difference that the rounding of its result does not cover
PARTS = 8  # partial sums that stand for those of a longer one


class Precision(NamedTuple):
    """How a floating point type rounds."""

    unit: float  # the largest relative error of one rounding to nearest
    lowest: int  # the power of two below which numbers are no longer spaced by their size: 0.5 to 1 counts as 0


FLOAT32 = Precision(2.0**-24, -125)


class Draws(Protocol):
    """Where the noise comes from."""

    def uniform(self, low: float, high: float, size: tuple[int, ...] | None = None, /) -> Any: ...


class Mirrored:
    """The draws of a generator, negated: a number that one of the two moves away from zero the other moves towards it."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def uniform(self, low: float, high: float, size: tuple[int, ...] | None = None, /) -> Any:
        return -self.rng.uniform(-high, -low, size)


class Noisy(np.ndarray[Any, Any]):
    """An array whose every result is off by up to half the spacing of numbers in another precision.

    The specification runs on it unchanged: what comes out is how far rounding of that precision moves each stage of that
    very case.
    """

    precision: Precision
    rng: Draws | None

    @classmethod
    def wrap(cls, values: Array, precision: Precision, rng: Draws | None) -> Noisy:
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
        result = source.rounded(source.summed(ufunc, method, [plain(a) for a in inputs], kwargs), ufunc)
        if out is None:
            return result
        plain(out[0])[...] = result
        return out[0]

    def summed(self, ufunc: np.ufunc, method: str, inputs: list[Any], kwargs: dict[str, Any]) -> Any:
        """The result before it is stored; sums of many terms as if they had been added up one after the other."""
        if self.rng is not None and ufunc is np.matmul and inputs[0].shape[-1] > FEW:
            a, b = inputs
            parts = np.array_split(np.arange(a.shape[-1]), PARTS)
            return self.running((a[..., part] @ b[..., part, :], part.size) for part in parts)
        if self.rng is not None and ufunc is np.add and method == "reduce" and np.max(np.shape(inputs[0]), initial=0) > FEW:
            return self.reduced(inputs[0], kwargs)
        return getattr(ufunc, method)(*inputs, **kwargs)

    def reduced(self, values: Array, kwargs: dict[str, Any]) -> Any:
        """A sum over axes, which may be all of them."""
        axes = range(values.ndim) if (axis := kwargs.get("axis")) is None else np.atleast_1d(axis)
        along = max(axes, key=lambda a: values.shape[a])
        if values.shape[along] <= FEW:
            return np.add.reduce(values, **kwargs)
        parts = np.array_split(values, PARTS, axis=along)
        return self.running((np.add.reduce(part, **kwargs), part.shape[along]) for part in parts)

    def running(self, parts: Iterable[tuple[Any, int]]) -> Any:
        """Partial sums added up, each off by what rounding of all its terms amounts to in float32 or finer.

        So does a loop add in float32, which the narrow types use for sums as well: errors of n roundings grow by their root.
        """
        fine, total = min(self.precision, FLOAT32), 0.0
        assert self.rng is not None  # to nearest there is nothing to draw
        for part, terms in parts:
            total = total + part
            total = total + self.rng.uniform(-0.5, 0.5, np.shape(total)) * spacing(total, fine) * np.sqrt(terms) * (total != 0)
        return total

    def rounded(self, exact: Any, ufunc: np.ufunc) -> Any:
        """The exact result as this arithmetic might have stored it."""
        if np.asarray(exact).dtype.kind != "f":
            return exact
        if ufunc in LIBRARY and self.rng is not None:
            exact = exact + self.rng.uniform(-2, 2) * spacing(exact, min(self.precision, FLOAT32))
        stored = exact if ufunc in EXACT else self.store(exact)
        return Noisy.wrap(stored, self.precision, self.rng)

    def wide(self, values: Array) -> Noisy:
        """An array beside this one whose sums are kept in float32."""
        return Noisy.wrap(values, min(self.precision, FLOAT32), self.rng)

    def store(self, exact: Any) -> Any:
        """A number within half a spacing: the nearest one there is, or any if there is a generator."""
        spaced = spacing(exact, self.precision)
        if self.rng is None:
            return np.round(exact / spaced) * spaced
        return exact + self.rng.uniform(-0.5, 0.5, np.shape(exact)) * spaced * (exact != 0)  # zero is exact


def spacing(values: Any, precision: Precision) -> Any:
    """The distance from these numbers to their neighbours in a precision."""
    return np.ldexp(precision.unit, np.maximum(np.frexp(values)[1], precision.lowest))


def plain(value: Any) -> Any:
    """The same memory without the noise."""
    return value.view(np.ndarray) if isinstance(value, Noisy) else value
