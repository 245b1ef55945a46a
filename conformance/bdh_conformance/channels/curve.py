"""The same curve everywhere (R16): two hundred steps from one initialisation, at a rate that warms up and falls.

What acts after some steps only is seen here and nowhere else: a count that ends, a rate or a correction that a captured graph
repeats, moments that each length of windows has for itself.
"""

from __future__ import annotations

import math

import numpy as np

from bdh_conformance.channels.channel import Observed
from bdh_conformance.channels.optimizers import weights
from bdh_conformance.yardstick import kinks
from bdh_conformance.yardstick.cases import Case
from bdh_spec import AdamW, BDHConfig, Model
from bdh_spec.params import Array

STEPS = 200
STRETCH = 20  # losses that are held against the specification's together
WARMUP, HIGHEST = 20, 3e-3  # the steps until the highest rate, and that rate
PERIOD = 40  # tokens of the text, which says one thing again and again

# A large eps keeps Adam smooth: where rounding decides the sign of a step, two hundred make another curve of it.
SETTINGS = AdamW(learning_rate=1.0, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-3, clip=0.5)

# Found by search: in 200 steps rounding eight times that of float32 flips no relu, and the curves of honest ports stay within
# 1e-6 of one another. Of most others it flips one, and they end a thousand times as far apart.
CURVES = (Case(BDHConfig(2, 8, 0.0, 2, 4, 16), 2, 12, seed=1),)


def observe_curve(model: Model, case: Case) -> Observed:
    """The losses of all steps, each before it is made, some of them at a time, and the weights after the last one."""
    optimizer = model.optimizer(SETTINGS)
    losses = [model.train_step(optimizer, *windows(case, step), rate=rate(step)) for step in range(1, STEPS + 1)]
    stretches = range(0, STEPS, STRETCH)
    seen = {f"{first + 1}-{first + STRETCH}.losses": np.array(losses[first : first + STRETCH]) for first in stretches}
    return seen | weights(model, "end")


def windows(case: Case, step: int) -> tuple[Array, Array]:
    """What a step reads: windows of the case's text, half of the time half as long."""
    rng = np.random.default_rng([case.seed, case.batch, case.time, step])
    length = int(rng.choice((case.time, max(case.time // 2, 1))))
    said = np.random.default_rng([case.seed, PERIOD]).integers(0, case.config.vocab_size, PERIOD)
    starts = rng.integers(0, PERIOD, case.batch)
    rows = np.stack([np.take(said, range(start, start + length + 1), mode="wrap") for start in starts.tolist()])
    return rows[:, :-1], rows[:, 1:]


def rate(step: int) -> float:
    """The rate of a step, counted from 1: up in a line, then down half a cosine."""
    return HIGHEST * min(step / WARMUP, 0.5 * (1 + math.cos(math.pi * (step - 1) / STEPS)))


def calm(case: Case) -> Case | None:
    """A case so small that its curve is a matter of rules, and not of relus that rounding has flipped on the way."""
    return None if kinks.crowded(case) else case
