"""How far a long piece of work has come, counted in bytes of weights read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

from bdh_convert.checkpoint import Checkpoint
from bdh_convert.tensors import Tensor
from bdh_spec.params import Array, Params

Watch: TypeAlias = Callable[[int, int], object]  # told how many bytes are done, and of how many


def ignore(done: int, total: int) -> None:
    """A watch that nobody looks at."""


def counted(tensor: Tensor, total: int, watch: Watch) -> Tensor:
    """A tensor that tells whenever it is read."""

    def fetch() -> Array:
        values = tensor.fetch()
        watch(tensor.nbytes, total)
        return values

    return replace(tensor, fetch=fetch)


def watched(checkpoint: Checkpoint, total: int, watch: Watch) -> Checkpoint:
    """A checkpoint whose weights tell whenever they are read."""
    return replace(checkpoint, weights=Params(*(counted(weight, total, watch) for weight in checkpoint.weights)))
