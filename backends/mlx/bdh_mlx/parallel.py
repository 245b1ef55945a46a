"""The processes that ``mlx.launch`` starts, and sums over them."""

from __future__ import annotations

import os

import mlx.core as mx
import numpy as np

from bdh_mlx.layer import widen
from bdh_spec.spread import Team


class MLXTeam(Team):
    """The processes of one launch."""

    def __init__(self) -> None:
        self.group = group()
        self.rank, self.size = self.group.rank(), self.group.size()

    def any(self, wish: bool) -> bool:
        return added(float(wish), self.group) > 0

    def wait(self) -> None:
        added(0.0, self.group)


def is_launched() -> bool:
    """Whether a launcher has started this process among others."""
    return "MLX_RANK" in os.environ


def group() -> mx.distributed.Group:
    """All processes of this launch, or this one alone."""
    return mx.distributed.init(strict=is_launched())


def summed(values: mx.array, group: mx.distributed.Group) -> mx.array:
    """The sum over processes, at least float32. Sockets take nothing from a GPU."""
    return mx.distributed.all_sum(widen(values), group=group, stream=mx.cpu)


def added(value: float, group: mx.distributed.Group) -> float:
    """The sum of a number over processes, in float64, which the CPU has."""
    return float(np.array(summed(mx.array(value, dtype=mx.float64), group)))
