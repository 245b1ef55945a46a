"""R5 and R13: attention to the tokens at hand, and to the state that remembers the earlier ones.

Heads and texts share the leading axis, h*B of them: to attention a head of a text is a text of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

Note: TypeAlias = Callable[[str, Tensor], Tensor]


def unnoted(name: str, value: Tensor) -> Tensor:
    """Take no note of a stage."""
    return value


def scores(rotated: Tensor) -> Tensor:
    """Similarity of each token with strictly earlier ones: K is Q, no scale, no softmax (R5)."""
    if are_transforms_active():
        return torch.bmm(rotated, rotated.mT).tril(-1)  # h*B T T
    if not torch.is_grad_enabled():
        return _scores(rotated)
    similar: Tensor = _Scores.apply(rotated)  # type: ignore[no-untyped-call]  # PyTorch has not typed it
    return similar


def are_transforms_active() -> bool:
    """Whether torch.func transforms what is computed, or derivatives are taken forward: neither knows our own gradients."""
    takes_forward: bool = torch.autograd.forward_ad._current_level >= 0
    return takes_forward or bool(torch._C._are_functorch_transforms_active())


def of_products(rows: Tensor, wide: torch.dtype) -> torch.dtype:
    """The dtype in which rows (..., T, K) are multiplied with a state, whose sums are wide.

    float16 has not the range for what a state holds, and for a single token it does not pay to cast a state.
    """
    return rows.dtype if rows.dtype == torch.bfloat16 and rows.shape[-2] > 1 else wide


def read(memory: Tensor, rotated: Tensor) -> Tensor:
    """What the state holds for these queries, in the state's dtype (R13)."""
    kind = of_products(rotated, memory.dtype)
    with torch.autocast(memory.device.type, enabled=False):
        return torch.bmm(rotated.to(kind), memory.to(kind)).to(memory.dtype)  # h*B T D


def write(memory: Tensor, rotated: Tensor, v: Tensor, *, donate: bool = False) -> Tensor:
    """The state after these tokens (R13), in the memory of the one before if that is donated."""
    kind = of_products(rotated, memory.dtype)
    k, v = rotated.mT.to(kind), v.to(kind)  # h*B N T, h*B T D
    with torch.autocast(memory.device.type, enabled=False):
        if kind != memory.dtype:
            return memory.add_(torch.bmm(k, v)) if donate else memory + torch.bmm(k, v)
        return memory.baddbmm_(k, v) if donate else torch.baddbmm(memory, k, v)  # h*B N D


def attend(rotated: Tensor, v: Tensor, memory: Tensor | None, note: Note = unnoted) -> Tensor:
    """Attention to the tokens at hand, and to those that the state remembers if there is one (R5, R13)."""
    if memory is not None and rotated.shape[1] == 1:  # a single token has no earlier one beside it
        return read(memory, rotated)
    attention = torch.bmm(note("scores", scores(rotated)), v)  # h*B T D
    return attention if memory is None else attention + read(memory, rotated)


def values(x: Tensor, nh: int) -> Tensor:
    """V is x for every head: x (B, T, D) to (h*B, T, D)."""
    return x.expand(nh, *x.shape).flatten(0, 1)


def without_padding(v: Tensor, kept: Tensor) -> Tensor:
    """Values (h*B, T, D) of which those of padding are zero, so that nobody sees it; ``kept`` (B, T) is 0 there, else 1."""
    return v * kept.to(v.dtype).repeat(len(v) // len(kept), 1)[..., None]


def _scores(rotated: Tensor) -> Tensor:
    return torch.bmm(rotated, rotated.mT).tril_(-1)


class _Scores(torch.autograd.Function):
    """``scores`` with one product in its gradient where autograd would take two: a row counts as query and as key."""

    @staticmethod
    def forward(ctx: Any, rotated: Tensor) -> Tensor:
        ctx.save_for_backward(rotated)
        return _scores(rotated)

    @staticmethod
    def backward(ctx: Any, d_scores: Tensor) -> Tensor:
        (rotated,) = ctx.saved_tensors
        d_scores = d_scores.tril(-1)
        return torch.bmm(d_scores + d_scores.mT, rotated)
