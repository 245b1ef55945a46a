"""R8 without a reference for the random numbers: every loss of training is one that some mask gives, as often as it should be.

Three tiny cases have at most twelve neurons that a mask can reach, so that all masks can be tried. Layers must not share a
mask, nor texts or heads, nor tokens: each case shows one of these. The weights are small where a norm follows, so that the
norm's eps makes the scale 1/(1-p) visible.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

from bdh_conformance.agreement import Comparison, compare
from bdh_conformance.cases import Case
from bdh_conformance.reference import Specification
from bdh_conformance.tolerances import Expectation, as_numpy_dtype, expect
from bdh_spec import AdamW, BDHConfig, Model, Params
from bdh_spec.model import loss, readout, run
from bdh_spec.params import Array, cast
from bdh_spec.rope import Phase

DRAWS = 240
SAME = 1e-9  # losses no further apart are one
STILL = AdamW(learning_rate=0.0, weight_decay=0.0)  # training that moves nothing
SIGMAS = 8.0  # of the chi-square statistic; its tail is wider than a normal one

# Found by search: each gives some thirty losses, of which no two are closer than 1e-4 of their size.
CASES = (
    Case(BDHConfig(2, 6, 0.25, 1, 1, 5), 1, 2, seed=558, scale=5.0),  # layers
    Case(BDHConfig(1, 4, 0.25, 2, 1, 5), 2, 2, seed=590, scale=5.0),  # texts, heads
    Case(BDHConfig(1, 4, 0.25, 1, 1, 5), 1, 3, seed=412, scale=5.0),  # tokens
)


def prepare(case: Case) -> Case:
    """One of the three cases: the one given if it is one."""
    return case if case in CASES else CASES[case.seed % len(CASES)]


def observe(model: Model, case: Case) -> dict[str, Array]:
    """Losses of many steps that move nothing, and what the model says before and after, when nothing may be dropped."""
    before, still = model.forward(case.tokens), model.loss(case.tokens, case.tokens)
    optimizer = model.optimizer(STILL)
    losses = [model.train_step(optimizer, case.tokens, case.tokens) for _ in range(DRAWS)]
    return {
        "before.logits": before,
        "before.loss": np.array(still),
        "losses": np.array(losses),
        "after.logits": model.forward(case.tokens),
        "after.loss": np.array(model.loss(case.tokens, case.tokens)),
    }


def judge(observed: dict[str, Array], case: Case, dtype: str, phase: Phase) -> list[Comparison]:
    """Evaluation as ever; losses of training among those that masks give, and as often."""

    def evaluated(params: Params) -> dict[str, Array]:
        model = Specification(params, case.config, phase)
        logits, value = model.forward(case.tokens), np.array(model.loss(case.tokens, case.tokens))
        return {"before.logits": logits, "before.loss": value, "after.logits": logits, "after.loss": value}

    expected = expect(evaluated, case.params, dtype)
    seen = [compare(name, observed.get(name), expectation) for name, expectation in expected.items()]
    allowed = max(expected["before.loss"].allowed, 1e-9)
    return [*seen[:2], *drawn(observed["losses"], case, held(case, dtype), allowed), *seen[2:]]


def drawn(losses: Array, case: Case, params: Params, allowed: float) -> Iterator[Comparison]:
    """Whether these are draws from the losses that masks give."""
    values, chances = outcomes(case, params)
    nearest = np.abs(losses[:, None] - values).argmin(axis=1)
    yield compare(
        "training.losses", losses[:, None, None], Expectation(values[nearest][:, None, None], 4 * allowed, 4 * allowed)
    )
    counts = np.bincount(nearest, minlength=len(values))
    statistic = abs(surprise(counts, chances))
    complaint = frequencies_say(counts, chances, statistic) if statistic > SIGMAS else ""
    yield Comparison("training.frequencies", statistic, SIGMAS, complaint)


def frequencies_say(counts: Array, chances: Array, statistic: float) -> str:
    """The mask whose share is the furthest off."""
    worst = int(np.argmax(np.abs(counts / counts.sum() - chances)))
    share, chance = counts[worst] / counts.sum(), chances[worst]
    return f"masks are drawn {statistic:.0f} sigmas off: one loss comes in {share:.1%} of {DRAWS} steps, wanted {chance:.1%}"


def surprise(counts: Array, chances: Array) -> float:
    """How many standard deviations Pearson's chi-square is from its mean, for draws that are what they should be."""
    n, k = counts.sum(), len(chances)
    statistic = float(((counts - n * chances) ** 2 / (n * chances)).sum())
    spread = 2 * (k - 1) + (float((1 / chances).sum()) - k * k - 2 * k + 2) / n
    return (statistic - (k - 1)) / float(np.sqrt(spread))


def held(case: Case, dtype: str) -> Params:
    """The weights as a port of this dtype holds them, in float64."""
    return cast(cast(case.params, as_numpy_dtype(dtype)), np.float64)


def outcomes(case: Case, params: Params) -> tuple[Array, Array]:
    """The losses that masks can give, in rising order, and the chance of each."""
    c = case.config
    reached = c.n_layer * case.batch * c.n_head * (case.time - 1) * c.n_neurons
    masks = np.array(list(product((0.0, 1.0), repeat=reached)))  # M reached
    chances = np.prod(np.where(masks > 0, 1 - c.dropout, c.dropout), axis=1)
    losses = losses_under(masks, case, params)
    order = np.argsort(losses)
    first = np.flatnonzero(np.diff(losses[order], prepend=-np.inf) > SAME)  # masks of silent neurons change nothing
    return losses[order][first], np.add.reduceat(chances[order], first)


def losses_under(masks: Array, case: Case, params: Params) -> Array:
    """The loss under each mask (M, neurons of all tokens but the first): the first token's are silent in any case."""
    c, M = case.config, len(masks)
    kept = masks.reshape(M, c.n_layer, case.batch, c.n_head, case.time - 1, c.n_neurons) / (1 - c.dropout)
    keep = np.concatenate([np.ones_like(kept[..., :1, :]), kept], axis=4).swapaxes(0, 1)  # L M B h T N
    copies = (M * case.batch, *keep.shape[3:])
    x, _ = run(np.tile(case.tokens, (M, 1)), params, c, keep=[layer.reshape(copies) for layer in keep])
    logits = readout(x, params).reshape(M, case.batch, case.time, c.vocab_size)
    return np.array([loss(copy, case.tokens) for copy in logits])
