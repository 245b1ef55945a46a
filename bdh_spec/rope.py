"""R4: rotary positions on the neuron axis, interleaved pairs (2i, 2i+1), phases counted in turns."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import DTypeLike

from bdh_spec.params import Array

Phase: TypeAlias = Literal["exact", "float32"]
PHASES: tuple[Phase, ...] = get_args(Phase)

THETA = 2.0**16
MAX_POSITION = 2**63  # positions are whole numbers below it


def frequencies(n_neurons: int) -> Array:
    """Turns per token of each neuron: the normative float32 table (N,).

    Source: f[n] = theta^(-2 floor(n/2) / N) / (2 pi), evaluated as published models were: every operation rounded to
    float32. A table rounded once would be up to 5 units in the last place off theirs; this one is mostly equal to it.
    """
    pair = (np.arange(n_neurons) // 2 * 2).astype(np.float32) / np.float32(n_neurons)
    growth = (THETA ** pair.astype(np.float64)).astype(np.float32)  # a power correctly rounded, on every machine
    return np.float32(1) / growth / np.float32(2 * np.pi)


def turns(positions: Array, n_neurons: int, phase: Phase) -> Array:
    """How far each neuron has turned at each position: a fraction of a turn from 0 to 1, float64, shape (T, N)."""
    f = frequencies(n_neurons)
    if phase == "float32":  # what the published models saw; its error grows with the position
        return np.mod(positions.astype(np.float32)[:, None] * f, np.float32(1)).astype(np.float64)
    # Every f is a whole multiple of 2^-64, so 64-bit fixed point is exact for every position and wraps by itself.
    fixed = (f.astype(np.float64) * 2.0**64).astype(np.uint64)
    return (positions.astype(np.uint64)[:, None] * fixed) * 2.0**-64


def rotation(start: int, length: int, n_neurons: int, dtype: DTypeLike, phase: Phase) -> tuple[Array, Array]:
    """Cosine and sine of the phases of ``length`` positions from ``start`` on, each (T, N)."""
    positions = np.uint64(start) + np.arange(length, dtype=np.uint64)
    angle = (2 * np.pi * turns(positions, n_neurons, phase)).astype(dtype)  # T N
    return np.cos(angle), np.sin(angle)


def rope(v: Array, cos: Array, sin: Array) -> Array:
    """Turn each pair of neurons by its phase."""
    return v * cos + swap(v) * sin  # B h T N


def swap(v: Array) -> Array:
    """A quarter turn: (a, b) becomes (-b, a) in every pair."""
    quarter = np.empty_like(v)
    quarter[..., 0::2] = -v[..., 1::2]
    quarter[..., 1::2] = v[..., 0::2]
    return quarter
