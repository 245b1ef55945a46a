"""The protocol's AdamW in MLX, to the letter of the specification's.

``mlx.optimizers.AdamW`` corrects no bias unless told to, rounds the learning rate to the gradients' dtype, and its
``clip_grad_norm`` adds 1e-6 to the norm and sums bfloat16 squares in bfloat16; people who train with it lose little, but two
ports would not take the same step.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from bdh_mlx.model import widen
from bdh_spec.optimizer import AdamW
from bdh_spec.params import Params


@dataclass
class Moments:
    """The optimiser's memory: running means of the slopes and of their squares, and the weights before rounding."""

    settings: AdamW
    key: mx.array  # of dropout
    weights: Params  # at least float32: in bfloat16 most steps would be too small to move a weight
    first: Params
    second: Params
    step: int = 0


def moments(params: Params, settings: AdamW) -> Moments:
    """The memory before the first step."""
    zeros = Params(*(mx.zeros_like(widen(weight)) for weight in params))
    return Moments(settings, mx.random.key(settings.seed), Params(*map(widen, params)), zeros, zeros)


def update(params: Params, slopes: Params, memory: Moments) -> Params:
    """The weights after one step, in the dtype they have; ``memory`` moves on with them."""
    s, step = memory.settings, memory.step + 1
    scale = clip_scale(slopes, s.clip)
    g = [widen(slope) * scale for slope in slopes]
    first = [m + (1 - s.betas[0]) * (x - m) for m, x in zip(memory.first, g, strict=True)]
    second = [v + (1 - s.betas[1]) * (x * x - v) for v, x in zip(memory.second, g, strict=True)]
    means = [m / (1 - s.betas[0] ** step) for m in first]
    squares = [v / (1 - s.betas[1] ** step) for v in second]
    moved = [
        w - s.learning_rate * (m / (mx.sqrt(v) + s.eps) + s.weight_decay * w)
        for w, m, v in zip(unrounded(params, memory), means, squares, strict=True)
    ]
    memory.weights, memory.first, memory.second, memory.step = Params(*moved), Params(*first), Params(*second), step
    return Params(*(w.astype(weight.dtype) for w, weight in zip(moved, params, strict=True)))


def unrounded(params: Params, memory: Moments) -> list[mx.array]:
    """The weights before rounding, but for those that have been moved since by somebody else."""
    return [mx.where(w.astype(p.dtype) == p, w, widen(p)) for p, w in zip(params, memory.weights, strict=True)]


def clip_scale(slopes: Params, clip: float | None) -> mx.array | float:
    """What to multiply all slopes by so that their common 2-norm is at most ``clip``."""
    if clip is None:
        return 1.0
    norm = mx.sqrt(mx.stack([mx.square(widen(slope)).sum() for slope in slopes]).sum())
    return mx.where(norm <= clip, 1.0, clip / norm)
