"""The protocol's AdamW in MLX, to the letter of the specification's.

``mlx.optimizers.AdamW`` corrects no bias unless told to, rounds the learning rate to the gradients' dtype, and its
``clip_grad_norm`` adds 1e-6 to the norm and sums bfloat16 squares in bfloat16; people who train with it lose little, but two
ports would not take the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from bdh_mlx.layer import widen
from bdh_spec.optimizer import AdamW, dropout_seed, moving
from bdh_spec.params import Params


@dataclass
class Moments:
    """The optimiser's memory: running means of the slopes and of their squares, and the weights before rounding."""

    settings: AdamW
    weights: Params  # at least float32: in bfloat16 most steps would be too small to move a weight
    first: Params
    second: Params
    step: int = 0


def moments(params: Params, settings: AdamW) -> Moments:
    """The memory before the first step."""
    zeros = Params(*(mx.zeros_like(widen(weight)) for weight in params))
    return Moments(settings, Params(*map(widen, params)), zeros, zeros)


def dropout_key(memory: Moments, part: int) -> mx.array:
    """What decides the dropout of a batch of the next step."""
    return mx.random.key(dropout_seed(memory.settings.seed, memory.step + 1, part))


def add(total: Params | None, slopes: Params, share: float) -> Params:
    """The slopes of a step so far, at least float32, with the share of another batch of it."""
    shares = [widen(slope) * share for slope in slopes]
    return Params(*(shares if total is None else (t + g for t, g in zip(total, shares, strict=True))))


def update(params: Params, slopes: Params, memory: Moments, rate: float) -> Params:
    """The weights after one step at this rate, in the dtype they have; ``memory`` moves on with them."""
    s, step = memory.settings, memory.step + 1
    scale = clip_scale(moving(slopes, s), s.clip)

    def move(name: str, w: mx.array, slope: mx.array, m: mx.array, v: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        if name in s.frozen:
            return w, m, v
        g = widen(slope) * scale
        m, v = m + (1 - s.betas[0]) * (g - m), v + (1 - s.betas[1]) * (g * g - v)
        mean, square = m / (1 - s.betas[0] ** step), v / (1 - s.betas[1] ** step)
        return w - rate * (mean / (mx.sqrt(square) + s.eps) + s.weight_decay * w), m, v

    held = (Params._fields, unrounded(params, memory), slopes, memory.first, memory.second)
    weights, first, second = (Params(*five) for five in zip(*map(move, *held), strict=True))
    memory.weights, memory.first, memory.second, memory.step = weights, first, second, step
    return Params(*(w.astype(weight.dtype) for w, weight in zip(weights, params, strict=True)))


def unrounded(params: Params, memory: Moments) -> list[mx.array]:
    """The weights before rounding, but for those that have been moved since by somebody else."""
    return [mx.where(w.astype(p.dtype) == p, w, widen(p)) for p, w in zip(params, memory.weights, strict=True)]


def clip_scale(slopes: Sequence[mx.array], clip: float | None) -> mx.array | float:
    """What to multiply all slopes by so that their common 2-norm is at most ``clip``."""
    if clip is None or not slopes:
        return 1.0
    norm = mx.sqrt(mx.stack([mx.square(widen(slope)).sum() for slope in slopes]).sum())
    return mx.where(norm <= clip, 1.0, clip / norm)
