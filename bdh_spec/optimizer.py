"""R16: AdamW with clipping by norm, the one optimiser of the protocol, and its NumPy form."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from bdh_spec.params import Array, Params


@dataclass(frozen=True)
class AdamW:
    """Settings of decoupled weight decay Adam (arXiv 1711.05101); it decays and moves the five weights and nothing else."""

    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip: float | None = 1.0  # largest 2-norm of all gradients together; None leaves them as they are
    seed: int = 0  # of dropout


@dataclass
class Moments:
    """The NumPy optimiser's memory: running means of the slopes and of their squares."""

    settings: AdamW
    rng: np.random.Generator
    step: int = 0
    first: list[Array] = field(default_factory=list)
    second: list[Array] = field(default_factory=list)


def update(params: Params, slopes: Params, moments: Moments) -> None:
    """One step, in place."""
    s, scale = moments.settings, clip_scale(slopes, moments.settings.clip)
    if not moments.first:
        moments.first, moments.second = ([np.zeros_like(w) for w in params] for _ in range(2))
    moments.step += 1
    for weight, slope, m, v in zip(params, slopes, moments.first, moments.second, strict=True):
        g = slope * scale
        m += (1 - s.betas[0]) * (g - m)
        v += (1 - s.betas[1]) * (g * g - v)
        mean, square = m / (1 - s.betas[0] ** moments.step), v / (1 - s.betas[1] ** moments.step)
        weight -= s.learning_rate * (mean / (np.sqrt(square) + s.eps) + s.weight_decay * weight)


def clip_scale(slopes: Params, clip: float | None) -> float:
    """What to multiply all slopes by so that their common 2-norm is at most ``clip``."""
    norm = float(np.sqrt(sum(float(np.sum(np.square(slope, dtype=np.float64))) for slope in slopes)))
    return 1.0 if clip is None or norm <= clip else clip / norm
