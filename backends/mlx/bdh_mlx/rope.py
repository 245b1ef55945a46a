"""R4 in MLX: rotary positions on the neuron axis, interleaved pairs (2i, 2i+1), phases counted in turns."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from bdh_spec.config import BDHConfig
from bdh_spec.model import frequencies_of
from bdh_spec.rope import Phase, fixed_point


class Table(NamedTuple):
    """Turns per token of each neuron of a model (N), made in NumPy because their bits are the specification."""

    turns: mx.array  # float32
    fixed: mx.array  # uint64, in units of 2^-64 turns


@lru_cache(maxsize=16)
def table_of(config: BDHConfig) -> Table:
    """A model's own table if it brings one, or else the normative one."""
    table = frequencies_of(config)
    return Table(mx.array(table), mx.array(fixed_point(table)))


def turns(positions: mx.array, table: Table, dtype: mx.Dtype, phase: Phase) -> mx.array:
    """How far each neuron has turned at each position (uint64): from -1/2 to 1/2 of a turn, shape (T, N)."""
    if phase == "float32":
        # Flat for the product: mx.compile fuses no kernel across a change of shape, and a fused multiply-add would not
        # round the product to float32, which is what this phase consists of.
        product = mx.flatten(positions.astype(mx.float32)[:, None] * table.turns)
        return mx.unflatten(product - mx.round(product), 0, (-1, table.turns.size)).astype(dtype)
    # uint64 wraps at whole turns. Read as signed it is a fraction from -1/2 to 1/2, which float32 holds twice as finely.
    wrapped = positions[:, None] * table.fixed
    return wrapped.view(mx.int64).astype(dtype) * 2.0**-64


def rotation(start: int | mx.array, length: int, table: Table, dtype: mx.Dtype, phase: Phase) -> tuple[mx.array, mx.array]:
    """Cosine and sine of the phases of ``length`` positions from ``start`` on, each (T, N)."""
    positions = mx.array(start, dtype=mx.uint64) + mx.arange(length, dtype=mx.uint64)
    turned = turns(positions, table, dtype, phase)
    if dtype == mx.float64:
        return _circle(mx.tan(np.pi * turned))
    return mx.cos(2 * np.pi * turned), mx.sin(2 * np.pi * turned)


def rope(v: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Turn each pair of neurons by its phase; the tables are at least float32, the result is as wide as ``v``."""
    return (v * cos + swap(v) * sin).astype(v.dtype)  # B h T N


def swap(v: mx.array) -> mx.array:
    """A quarter turn: (a, b) becomes (-b, a) in every pair."""
    return mx.stack([-v[..., 1::2], v[..., 0::2]], axis=-1).reshape(v.shape)


def _circle(tan_half: mx.array) -> tuple[mx.array, mx.array]:
    """Cosine and sine from the tangent of half the angle: MLX's own are no better than float32 on float64 arrays."""
    square = tan_half * tan_half
    return (1 - square) / (1 + square), 2 * tan_half / (1 + square)
