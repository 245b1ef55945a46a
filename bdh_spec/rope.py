"""R4: rotary positions on the neuron axis, interleaved pairs (2i, 2i+1), phases counted in turns."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import DTypeLike

from bdh_spec.arrays import Array
from bdh_spec.errors import ConfigError

Phase: TypeAlias = Literal["exact", "float32"]
PHASES: tuple[Phase, ...] = get_args(Phase)

THETA = 2.0**16
MAX_POSITION = 2**63  # positions are whole numbers below it


@dataclass(frozen=True, repr=False)
class Frequencies:
    """A model's own turns per token, one float32 per neuron: a constant of the model, equal and hashed by its bits.

    >>> Frequencies([0.25, -0.5]) == Frequencies([[[[0.25, -0.5]]]])
    True
    """

    values: InitVar[Any]  # an array (N,), or with axes of one before, as files store it
    bits: bytes = field(init=False)

    def __post_init__(self, values: Any) -> None:
        object.__setattr__(self, "bits", _as_table(values).tobytes())

    def __repr__(self) -> str:
        return f"Frequencies({self.array.tolist()})"

    @property
    def array(self) -> Array:
        """The table (N,), float32, which nobody can write to."""
        return np.frombuffer(self.bits, np.float32)

    @property
    def in_pairs(self) -> bool:
        """Whether the two neurons of each pair turn alike, so that rope is a rotation and an offset of positions no change."""
        return bool((self.array[0::2] == self.array[1::2]).all())


def _as_table(values: Any) -> Array:
    """Frequencies from anywhere as float32 (N,), refused unless every one is a finite floating point number."""
    try:
        found = np.asarray(values)
    except ValueError:
        raise ConfigError("frequencies are rows of different lengths: give one number for each neuron, (N,)") from None
    if found.dtype.kind != "f" and found.dtype.name != "bfloat16":
        raise ConfigError(f"frequencies are {found.dtype}: give floating point numbers, such as float32")
    if found.ndim == 0 or found.size != found.shape[-1]:
        raise ConfigError(f"frequencies have shape {found.shape}: give one number for each neuron, (N,)")
    with np.errstate(over="ignore"):
        table: Array = found.reshape(-1).astype(np.float32)
    if not (finite := np.isfinite(table)).all():
        n = int(np.argmin(finite))
        raise ConfigError(f"frequency {n} is {found.reshape(-1)[n]}: a model turns by finite numbers of float32, so mend it")
    return table


def frequencies(n_neurons: int) -> Array:
    """Turns per token of each neuron: the normative float32 table (N,).

    Source: f[n] = theta^(-2 floor(n/2) / N) / (2 pi), evaluated as published models were: every operation rounded to
    float32. A table rounded once would be up to 5 units in the last place off theirs; this one is mostly equal to it.
    """
    pair = (np.arange(n_neurons) // 2 * 2).astype(np.float32) / np.float32(n_neurons)
    growth = (THETA ** pair.astype(np.float64)).astype(np.float32)  # a power correctly rounded, on every machine
    return np.float32(1) / growth / np.float32(2 * np.pi)


def turns(positions: Array, table: Array, phase: Phase) -> Array:
    """How far each neuron has turned at each position: a fraction of a turn from 0 to 1, float64, shape (T, N)."""
    if phase == "float32":  # what the published models saw; its error grows with the position
        return np.mod((positions.astype(np.float32)[:, None] * table).astype(np.float64), 1)
    return (positions.astype(np.uint64)[:, None] * fixed_point(table)) * 2.0**-64


def fixed_point(table: Array) -> Array:
    """Turns per token in units of 2^-64 turns, uint64 (N): whole numbers whose products with positions wrap at whole turns.

    Every f of the normative table is a whole number of them. Others are rounded to the nearest one, ties to even; whole turns
    drop out, and what turns backwards is its two's complement.
    """
    f = table.astype(np.float64)
    return np.rint((f - np.floor(f + 0.5)) * 2.0**64).astype(np.int64).view(np.uint64)


def rotation(start: int, length: int, table: Array, dtype: DTypeLike, phase: Phase) -> tuple[Array, Array]:
    """Cosine and sine of the phases of ``length`` positions from ``start`` on, each (T, N)."""
    positions = np.uint64(start) + np.arange(length, dtype=np.uint64)
    angle = (2 * np.pi * turns(positions, table, phase)).astype(dtype)  # T N
    return np.cos(angle), np.sin(angle)


def rope(v: Array, cos: Array, sin: Array) -> Array:
    """Turn each pair of neurons by its phase.

    Where a model's own frequencies differ within a pair this is no rotation, and neither shorter nor relative.
    """
    return v * cos + swap(v) * sin  # B h T N


def swap(v: Array) -> Array:
    """A quarter turn: (a, b) becomes (-b, a) in every pair."""
    quarter = np.empty_like(v)
    quarter[..., 0::2] = -v[..., 1::2]
    quarter[..., 1::2] = v[..., 0::2]
    return quarter
