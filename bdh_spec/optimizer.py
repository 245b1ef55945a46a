"""R16: AdamW with clipping by norm, the one optimiser of the protocol, and its NumPy form."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bdh_spec.errors import OptimizerError
from bdh_spec.params import Array, Params


@dataclass(frozen=True)
class AdamW:
    """Settings of decoupled weight decay Adam (arXiv 1711.05101); it decays and moves the five weights and nothing else."""

    learning_rate: float = 1e-3  # of a step that is given none of its own
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip: float | None = 1.0  # largest 2-norm of all gradients together; None leaves them as they are
    seed: int = 0  # of dropout
    frozen: tuple[str, ...] = ()  # weights that stay where they are

    def __post_init__(self) -> None:
        check_rate(self.learning_rate, "learning_rate")
        check_rate(self.weight_decay, "weight_decay")
        check_rate(self.eps, "eps")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise OptimizerError(f"betas are {self.betas}: give two numbers from 0 up to, but not including, 1")
        if self.clip is not None and not self.clip > 0:
            raise OptimizerError(f"clip is {self.clip}: give a norm above 0, or None to leave gradients as they are")
        if self.seed < 0:
            raise OptimizerError(f"seed is {self.seed}: give a whole number of at least 0")
        if unknown := sorted(set(self.frozen) - set(Params._fields)):
            raise OptimizerError(f"frozen names {', '.join(unknown)}: the weights are {', '.join(Params._fields)}")


@dataclass(frozen=True)
class OptimizerState:
    """All that an optimiser remembers, for a file or for another port: with it, a run goes on as if it had not stopped."""

    settings: AdamW
    step: int  # steps made so far
    first: Params  # m of R16, at least float32
    second: Params  # v of R16, at least float32
    masters: Params | None = None  # the weights before rounding, where the model's are narrower than float32


@dataclass
class Moments:
    """The NumPy optimiser's memory: running means of the slopes and of their squares."""

    settings: AdamW
    first: list[Array]
    second: list[Array]
    step: int = 0


def begin(params: Params, settings: AdamW) -> Moments:
    """The memory before the first step."""
    return Moments(settings, [np.zeros_like(w) for w in params], [np.zeros_like(w) for w in params])


def update(params: Params, slopes: Params, moments: Moments, rate: float) -> None:
    """One step at this rate, in place."""
    s, scale = moments.settings, clip_scale(moving(slopes, moments.settings), moments.settings.clip)
    moments.step += 1
    for name, weight, slope, m, v in zip(Params._fields, params, slopes, moments.first, moments.second, strict=True):
        if name in s.frozen:
            continue
        g = slope * scale
        m += (1 - s.betas[0]) * (g - m)
        v += (1 - s.betas[1]) * (g * g - v)
        mean, square = m / (1 - s.betas[0] ** moments.step), v / (1 - s.betas[1] ** moments.step)
        weight -= rate * (mean / (np.sqrt(square) + s.eps) + s.weight_decay * weight)


def moving(five: Params, settings: AdamW) -> list[Any]:
    """Those of five that belong to weights which do not stay where they are."""
    return [value for name, value in five._asdict().items() if name not in settings.frozen]


def clip_scale(slopes: Iterable[Array], clip: float | None) -> float:
    """What to multiply all slopes by so that their common 2-norm is at most ``clip``."""
    norm = float(np.sqrt(sum(float(np.sum(np.square(slope, dtype=np.float64))) for slope in slopes)))
    return 1.0 if clip is None or norm <= clip else clip / norm


def dropout_seed(seed: int, step: int, part: int) -> int:
    """63 bits for what one batch of one step drops: of its place alone, so that a run taken up again drops the same.

    ``step`` counts from 1, ``part`` is the number of the batch among those of its step, from 0.
    """
    return int(np.random.default_rng([step, part, seed]).integers(2**63))


def check_rate(rate: float, name: str = "rate") -> float:
    """Refuse what is no finite number of at least 0."""
    if isinstance(rate, bool) or not isinstance(rate, (int, float, np.number)) or not (math.isfinite(rate) and rate >= 0):
        raise OptimizerError(f"{name} is {rate!r}: give a finite number of at least 0")
    return float(rate)
