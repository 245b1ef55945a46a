"""The rate of each step: up in a line, then constant or down half a cosine."""

from __future__ import annotations

import math

from bdh_train.config import TrainConfig


def rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step, counted from 1.

    >>> [rate(TrainConfig(learning_rate=1.0, warmup_steps=2, max_steps=4, final_rate=0.0), step) for step in (1, 2, 4)]
    [0.5, 1.0, 0.0]
    """
    highest, warmup = config.learning_rate or 0.0, config.warmup_steps or 0
    if step <= warmup:
        return highest * step / warmup
    if config.schedule == "constant":
        return highest
    way = (step - warmup) / max(config.max_steps - warmup, 1)
    return highest * (config.final_rate + (1 - config.final_rate) * 0.5 * (1 + math.cos(math.pi * way)))
