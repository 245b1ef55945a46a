"""AdamW moves the five weights and nothing else (R16)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from bdh_conformance.channels.channel import Observed, scalar
from bdh_conformance.yardstick import kinks
from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.reference import Specification
from bdh_spec import AdamW, Model

# A large eps keeps Adam smooth: with a small one a slope near zero flips the sign of a whole step, and rounding decides it.
TRAINING = AdamW(learning_rate=1e-2, weight_decay=0.1, eps=1e-3, clip=0.05)
OPTIMIZERS = {"clipped": TRAINING, "unclipped": replace(TRAINING, clip=None), "roomy": replace(TRAINING, clip=1e3)}
STEPS = 2


def observe_training(model: Model, case: Case) -> Observed:
    """Losses of steps with and without clipping, the weights after them, and what the model then says.

    The logits tell whether anything moved that is none of the five weights, a frequency table for one.
    """
    seen: Observed = {}
    for name, settings in OPTIMIZERS.items():
        for step, loss in enumerate(steps(model, case, settings)):
            seen[f"{name}.{step}.loss"] = scalar(loss)
        seen |= {f"{name}.weights.{key}": np.ravel(weight) for key, weight in model.params()._asdict().items()}
    return seen | {"trained.logits": model.forward(case.tokens)}


def steps(model: Model, case: Case, settings: AdamW) -> Iterator[float]:
    """The losses of a few steps, each before it is made."""
    optimizer = model.optimizer(settings)
    return (model.train_step(optimizer, case.tokens, case.targets) for _ in range(STEPS))


def trainable(case: Case) -> Case | None:
    """The case without dropout, or one like it, whose relus rounding flips at no step."""
    still = replace(case, config=replace(case.config, dropout=0.0))
    return next((c for c in kinks.next_seeds(still) if stays_clear(c)), None)


def stays_clear(case: Case) -> bool:
    """Whether training meets no kink."""
    model = Specification(case.params, case.config)
    path = (model.params() for settings in OPTIMIZERS.values() for _ in steps(model, case, settings))
    return all(kinks.is_clear(case.tokens, params, case.config) for params in (case.params, *path))
