"""AdamW moves the five weights and nothing else (R16), whatever its settings, at the rate of each step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from bdh_conformance.channels.channel import Observed, scalar
from bdh_conformance.channels.loading import claims
from bdh_conformance.yardstick import kinks
from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.reference import Specification
from bdh_spec import AdamW, Model
from bdh_spec.model import IGNORE
from bdh_spec.params import Array, Params

STEPS = 6
CLIPS = (None, 0.02, 1e3)  # that never clip, always and hardly ever
SHARES = (None, 0.5, 0.0, None, 1.5, 0.25)  # of the settings' rate that each step takes; None: it is not told one


def settings(case: Case) -> AdamW:
    """Settings of the case's own.

    A large eps keeps Adam smooth: with a small one a slope near zero flips the sign of a whole step, and rounding decides it.
    """
    rng = np.random.default_rng([case.seed, case.batch])
    return AdamW(
        learning_rate=float(10 ** rng.uniform(-3, -1.5)),
        weight_decay=float(rng.uniform(0.05, 0.5)),
        betas=(float(rng.uniform(0.5, 0.95)), float(rng.uniform(0.8, 0.999))),
        eps=float(10 ** rng.uniform(-4, -2)),
        clip=CLIPS[case.seed % len(CLIPS)],
    )


def observe_training(model: Model, case: Case) -> Observed:
    """Losses of some steps, the weights after the first and the last of them, and what the model says before and after.

    Everything that it can say: whether anything moved that is none of the five weights, a frequency table for one, or was left
    where it was, such as a packed copy, or something compiled with the weights of its first call.
    """
    seen = said(model, case, "untrained")
    for step, loss in enumerate(steps(model, case)):
        seen[f"{step}.loss"] = scalar(loss)
        if step in (0, STEPS - 1):
            seen |= {f"{step}.weights.{key}": np.ravel(weight) for key, weight in model.params()._asdict().items()}
    return seen | said(model, case, "trained") | two_optimizers(model, case)


def said(model: Model, case: Case, when: str) -> Observed:
    """What a model says of the case by all its verbs."""
    seen = {f"{when}.logits": model.forward(case.tokens)}
    if claims(model, "advance"):
        seen[f"{when}.decode.logits"] = model.advance(model.init_state(case.batch), case.tokens)[0]
    if claims(model, "loss"):
        seen[f"{when}.loss"] = scalar(model.loss(case.tokens, case.targets))
    if claims(model, "trace"):
        seen[f"{when}.trace.logits"] = model.trace(case.tokens)["logits"]
    if claims(model, "padded"):
        whole = np.full(case.batch, case.time)
        seen[f"{when}.padded.logits"] = model.forward_padded(case.tokens, whole)
    if claims(model, "gradients"):
        _, slopes = model.gradients(case.tokens, case.targets)
        seen |= {f"{when}.gradients.{name}": slope for name, slope in slopes._asdict().items()}
    return seen


def two_optimizers(model: Model, case: Case) -> Observed:
    """Losses of two optimizers that take turns, and the weights after them: each has moments, settings and a count of its own.

    What is zero in the settings of the second is zero, and no default.
    """
    other_settings = replace(settings(case), betas=(0.0, 0.9), weight_decay=0.0, clip=1e3)
    one, other = model.optimizer(settings(case)), model.optimizer(other_settings)
    losses = [model.train_step(optimizer, *batch(case, i)) for i, optimizer in enumerate((one, other, one, other))]
    weights = {f"turns.weights.{key}": np.ravel(weight) for key, weight in model.params()._asdict().items()}
    return {f"turns.{i}.loss": scalar(loss) for i, loss in enumerate(losses)} | weights


def steps(model: Model, case: Case) -> Iterator[float]:
    """The losses of some steps, each before it is made; every step reads other tokens."""
    optimizer = model.optimizer(settings(case))
    return (model.train_step(optimizer, *batch(case, step), rate=rate(case, step)) for step in range(STEPS))


def rate(case: Case, step: int) -> float | None:
    """The rate of a step, where it has one of its own."""
    share = SHARES[step % STEPS]
    return None if share is None else share * settings(case).learning_rate


def batch(case: Case, step: int) -> tuple[Array, Array]:
    """The tokens and targets of a step; those of one step are ignored in part, text by text where there are several."""
    tokens, targets = np.roll(case.tokens, step, axis=1), np.roll(case.targets, step, axis=1)
    if step == 2:
        part = targets[: max(case.batch // 2, 1)]
        part[:, :-1], part[:, -1] = IGNORE, np.maximum(part[:, -1], 0)
    return tokens, targets


def trainable(case: Case) -> Case:
    """The case without dropout, or one like it, whose relus rounding flips at no step."""
    still = replace(case, config=replace(case.config, dropout=0.0))
    return still if kinks.crowded(still) else next((c for c in kinks.next_seeds(still) if stays_clear(c)), still)


def meets_kinks(case: Case) -> bool:
    """Whether float32 rounding may flip a relu on the way."""
    return kinks.crowded(case) or not stays_clear(case)


def stays_clear(case: Case) -> bool:
    """Whether training meets no kink."""
    return all(kinks.is_clear(tokens, params, case.config) for tokens, params in path(case))


def path(case: Case) -> Iterator[tuple[Array, Params]]:
    """What each step reads, and the weights it starts from; then what is looked at once it is made."""
    model = Specification(case.params, case.config)
    optimizer = model.optimizer(settings(case))
    for step in range(STEPS):
        tokens, targets = batch(case, step)
        yield tokens, model.params()
        model.train_step(optimizer, tokens, targets, rate=rate(case, step))
    yield case.tokens, model.params()
