"""One layer, R3 to R10, as a function of its weights: what the module of this port and other faces of it share.

Axes: B batch, T time, h head (nh of them), N neurons per head, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from bdh_spec.model import EPS
from bdh_torch.attention import Note, unnoted, values
from bdh_torch.rope import rope

Attend: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # rotated (h*B, T, N) and values (h*B, T, D) to attention (h*B, T, D)


class Weights(NamedTuple):
    """What every layer applies."""

    encoder: Tensor  # h D N
    encoder_v: Tensor  # h D N
    decoder: Tensor  # h*N D


class Linears(NamedTuple):
    """The same as a module for each head, which others may replace by one that stores its weight as they like."""

    encoder: nn.ModuleList  # h of D to N
    encoder_v: nn.ModuleList  # h of D to N
    decoder: nn.ModuleList  # h of N to D


def project(rows: Tensor, weight: Tensor | nn.ModuleList) -> Tensor:
    """Rows (h, R, K) times a weight (h, K, n), or each head's through its module: (h, R, n)."""
    if isinstance(weight, Tensor):
        # matmul would copy a weight, or the rows, into a layout that it takes for a better one.
        return torch.bmm(rows, weight)
    return torch.stack([head(its) for head, its in zip(weight, rows, strict=True)])


def layer_norm(x: Tensor) -> Tensor:
    """Centre and scale over the last axis (R2); PyTorch sums in float32 when x is narrower."""
    return torch.layer_norm(x, x.shape[-1:], eps=EPS)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a * b, in the memory of a when no gradient needs it any more."""
    return a * b if torch.is_grad_enabled() else a.mul_(b)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what must not be narrower than float32: states, phases, the loss."""
    return torch.promote_types(dtype, torch.float32)


def layer(
    x: Tensor,
    weights: Weights | Linears,
    rotations: Tensor,
    attend: Attend,
    drop: Callable[[Tensor], Tensor],
    note: Note = unnoted,
) -> Tensor:
    """Run one layer on x (B, T, D): the next x."""
    return residual(x, gated(x, weights, rotations, attend, drop, note), note)


def gated(
    x: Tensor,
    weights: Weights | Linears,
    rotations: Tensor,
    attend: Attend,
    drop: Callable[[Tensor], Tensor],
    note: Note = unnoted,
) -> Tensor:
    """x (B, T, D) to what the decoder returns, (B, T, D): all of a layer but its last two norms.

    ``rotations`` are those of the tokens' positions, (T, N/2, 2), or (B, T, N/2, 2) where texts differ in them; with N for N/2
    where neurons turn each by itself. ``attend`` says what the tokens see beside one another, and keeps what later ones will
    want to see. ``note`` is shown each stage.
    """
    (B, T, D), nh = x.shape, len(weights.encoder)
    decoder = weights.decoder.view(nh, -1, D) if isinstance(weights, Weights) else weights.decoder
    rows = x.reshape(1, B * T, D).expand(nh, -1, -1)
    x_sparse = note("x_sparse", project(rows, weights.encoder).relu_())  # h B*T N  R3
    rotated = note("rotated", rope(x_sparse.view(nh, B, T, -1), rotations).flatten(0, 1))  # h*B T N  R4
    attention = note("attention", attend(rotated, values(x, nh)))  # h*B T D  R5
    yKV = note("yKV", layer_norm(attention).to(x.dtype)).view(nh, B * T, D)  # R6
    y_sparse = note("y_sparse", project(yKV, weights.encoder_v).relu_())  # h B*T N  R7
    xy_sparse = note("xy_sparse", drop(multiply(y_sparse, x_sparse)))  # h B*T N  R7, R8
    # The product of merged heads is the sum of the heads' own products.
    return note("decoded", project(xy_sparse, decoder).sum(0).view(B, T, D))  # R9


def residual(x: Tensor, decoded: Tensor, note: Note = unnoted) -> Tensor:
    """The end of a layer, from what the decoder returned: the next x (R9, R10)."""
    y = note("y", layer_norm(decoded).to(x.dtype))
    return note("x", layer_norm(x + y))  # B T D


def undo_norm(values: Tensor, d_normed: Tensor) -> Tensor:
    """The slope in values, from that in what ``layer_norm`` makes of them: undo R2 in a backward that is written by hand."""
    with torch.enable_grad():
        leaf = values.detach().requires_grad_()
        (slope,) = torch.autograd.grad(layer_norm(leaf), leaf, d_normed)
    return slope


def refuse_second_derivatives() -> None:
    """PyTorch's own error, as under create_graph, where a backward that is written by hand has no derivative of its own."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "the streamed kernel has first derivatives only: for those of a gradient build the model with kernel='plain'"
        )
