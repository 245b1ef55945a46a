"""R8 without a reference for the random numbers: every loss of training is one that some mask gives, as often as it should be.

Which mask it was, the loss tells, and so the gradient under that mask is known: a step must move the weights along it. A seed
must give its losses again, and another seed others.

Many neurons, tokens, texts and layers are looked at in another way: ``masks`` reads whole masks off the decoder's movement.

Three tiny cases have at most twelve neurons that a mask can reach, so that all masks can be tried. Layers must not share a
mask, nor texts or heads, nor tokens: each case shows one of these. The weights are small where a norm follows, so that the
norm's eps makes the scale 1/(1-p) visible.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import chain, product
from typing import Any, NamedTuple

import numpy as np

from bdh_conformance.channels import masks
from bdh_conformance.channels.loading import claims, loaded_again
from bdh_conformance.yardstick.agreement import Comparison, compare
from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.reference import Specification
from bdh_conformance.yardstick.tolerances import Expectation, expect
from bdh_spec import AdamW, BDHConfig, Model, Params
from bdh_spec.dtypes import numpy_dtype
from bdh_spec.gradients import gradients
from bdh_spec.model import loss, readout, run
from bdh_spec.optimizer import begin, update
from bdh_spec.params import Array, cast
from bdh_spec.rope import Phase

DRAWS, MORE_DRAWS = 240, 600  # more where all masks but one are rare
SAME = 1e-9  # losses no further apart are one
STILL = AdamW(learning_rate=0.0, weight_decay=0.0)  # training that moves nothing
RARELY = 1e-8  # the chance at which a count is taken for none of these draws
SIGMAS = 8.0  # of the chi-square statistic; its tail is wider than a normal one

# Two draws give one loss with a chance of at most 0.1443, the largest sum of squared chances over the cases: two seeds give one
# run of 15 losses with less than 0.1443^15 = 2.5e-13.
SEEDED = 15
BY_CHANCE = 1e-9  # at rates far from a half most masks are alike
OTHER_SEEDS = (1, 2**16, 2**31)  # beside 0: the lowest and the highest bit of a seed that R8 demands to count, and one between

# Each step from the given weights. A large eps makes Adam's first step the gradient's multiple: with a small one a slope near
# zero flips the sign of a whole step, and rounding decides it.
MOVES = 6
MOVING = AdamW(learning_rate=0.1, weight_decay=0.0, eps=1.0, clip=None)

# Found by search: each gives some thirty losses, of which no two are closer than 1e-4 of their size, and under no mask does
# rounding flip a relu.
CASES = (
    Case(BDHConfig(2, 6, 0.25, 1, 1, 5), 1, 2, seed=558, scale=5.0),  # layers
    Case(BDHConfig(1, 4, 0.25, 2, 1, 5), 2, 2, seed=590, scale=5.0),  # texts, heads
    Case(BDHConfig(1, 4, 0.25, 1, 1, 5), 1, 3, seed=412, scale=5.0),  # tokens
)


# Other rates, on four neurons that a mask can reach. Found likewise.
RATES = tuple(
    Case(BDHConfig(1, 4, rate, 1, 1, 5), 1, 2, seed=seed, scale=5.0)
    for rate, seed in ((0.02, 10), (0.1, 10), (0.5, 10), (0.75, 10), (0.9, 21), (0.97, 21))
)


def prepare(case: Case) -> Case:
    """One of the cases above: the one given if it is one."""
    return case if case in (*CASES, *RATES, *masks.CASES) else (*CASES, *RATES)[case.seed % len((*CASES, *RATES))]


def enough(case: Case) -> int:
    """Draws that tell a rate from no dropout at all, or from dropping everything."""
    return DRAWS if 0.05 < case.config.dropout < 0.95 else MORE_DRAWS


class Outcomes(NamedTuple):
    """What masks can do to a case, by rising loss."""

    losses: Array  # K
    chances: Array  # K
    masks: Array  # K reached: one that gives the loss; the others differ from it in silent neurons


def observe(model: Model, case: Case) -> dict[str, Array]:
    """Losses of many steps that move nothing, and what the model says before and after, when nothing may be dropped.

    Then single steps that move the weights, each of a fresh model of the same weights and with a seed of its own.
    """
    if case in masks.CASES:
        return masks.observe(model, case)
    before, still = model.forward(case.tokens), model.loss(case.tokens, case.tokens)
    seen = {
        "before.logits": before,
        "before.loss": np.array(still),
        "losses": np.array(draws(model, case, STILL, enough(case))),
        "losses.again": np.array(draws(model, case, STILL, SEEDED)),
        **{f"losses.seed_{seed}": np.array(draws(model, case, replace(STILL, seed=seed), SEEDED)) for seed in OTHER_SEEDS},
        "losses.in_turns": np.array(in_turns(model, case)),
        "after.logits": model.forward(case.tokens),
        "after.loss": np.array(model.loss(case.tokens, case.tokens)),
    }
    if claims(model, "advance"):
        seen["after.decode.logits"] = model.advance(model.init_state(case.batch), case.tokens)[0]
    if claims(model, "trace"):
        seen |= {f"after.trace.{name}": stage for name, stage in model.trace(case.tokens).items()}
    if claims(model, "gradients"):
        _, slopes = model.gradients(case.tokens, case.tokens)
        seen |= {f"after.gradients.{name}": slope for name, slope in slopes._asdict().items()}
    for seed in range(MOVES):
        seen |= moved(loaded_again(model, case), case, seed)
    return seen


def draws(model: Model, case: Case, settings: AdamW, count: int) -> list[float]:
    """The losses of steps with an optimizer of their own."""
    optimizer = model.optimizer(settings)
    return [model.train_step(optimizer, case.tokens, case.tokens) for _ in range(count)]


def in_turns(model: Model, case: Case) -> list[float]:
    """The losses of steps with an optimizer beside which another one is at work."""
    one, other = model.optimizer(STILL), model.optimizer(replace(STILL, seed=OTHER_SEEDS[0]))
    losses = [model.train_step(optimizer, case.tokens, case.tokens) for _ in range(SEEDED) for optimizer in (one, other)]
    return losses[::2]


def moved(model: Model, case: Case, seed: int) -> dict[str, Array]:
    """The loss of one step, and the weights after it."""
    value = draws(model, case, replace(MOVING, seed=seed), 1)
    weights = {f"moved.{seed}.weights.{name}": np.ravel(weight) for name, weight in model.params()._asdict().items()}
    return {f"moved.{seed}.loss": np.array(value)} | weights


def judge(observed: dict[str, Array], case: Case, dtype: str, phase: Phase) -> list[Comparison]:
    """Evaluation as ever; losses of training among those that masks give, as often, and as the seed says; steps along them."""
    if case in masks.CASES:
        return masks.judge(observed, case)

    def evaluated(params: Params) -> dict[str, Array]:
        model = Specification(params, case.config, phase)
        logits, value = model.forward(case.tokens), np.array(model.loss(case.tokens, case.tokens))
        after = {"after.decode.logits": model.advance(model.init_state(case.batch), case.tokens)[0]}
        _, slopes = model.gradients(case.tokens, case.tokens)
        after |= {f"after.trace.{name}": stage for name, stage in model.trace(case.tokens).items()}
        after |= {f"after.gradients.{name}": slope for name, slope in slopes._asdict().items()}
        return {"before.logits": logits, "before.loss": value, "after.logits": logits, "after.loss": value} | after

    found = expect(evaluated, case.params, dtype)
    expected = {name: expectation for name, expectation in found.items() if name in observed or name.count(".") == 1}
    seen = [compare(name, observed.get(name), expectation) for name, expectation in expected.items()]
    allowed = max(expected["before.loss"].allowed, 1e-9)
    possible = outcomes(case, dtype)
    training = (
        drawn(observed["losses"], possible, allowed),
        seeded(observed, possible),
        steps(observed, case, dtype, phase, allowed),
    )
    return [*seen[:2], *chain.from_iterable(training), *seen[2:]]


def drawn(losses: Array, possible: Outcomes, allowed: float) -> Iterator[Comparison]:
    """Whether these are draws from the losses that masks give."""
    nearest = which(losses, possible)
    yield among("training.losses", losses, possible.losses[nearest], allowed)
    counts = np.bincount(nearest, minlength=len(possible.losses))
    statistic = abs(surprise(counts, possible.chances))
    complaint = frequencies_say(counts, possible.chances, len(losses)) if statistic > SIGMAS else ""
    yield Comparison("training.frequencies", statistic, SIGMAS, complaint)
    # Near 0 and 1 all masks but one are so rare that the statistic, which dreads them, sees nothing.
    best = int(np.argmax(possible.chances))
    by_chance = at_most_so_likely(int(counts[best]), len(losses), float(possible.chances[best]))
    complaint = frequencies_say(counts[[best]], possible.chances[[best]], len(losses)) if by_chance < RARELY else ""
    yield Comparison("training.likeliest", float("inf") if complaint else 0.0, 0.0, complaint)


def which(losses: Array, possible: Outcomes) -> Array:
    """The outcome that each loss tells of."""
    nearest: Array = np.abs(losses[:, None] - possible.losses).argmin(axis=1)
    return nearest


def among(name: str, losses: Array, values: Array, allowed: float) -> Comparison:
    """Losses (S,) against those of their masks: each is a row."""
    return compare(name, losses[:, None, None], Expectation(values[:, None, None], 4 * allowed, 4 * allowed))


def seeded(observed: dict[str, Array], possible: Outcomes) -> Iterator[Comparison]:
    """One seed, one run of masks: to the bit, because nothing else has changed. Another seed, another run, but for chance."""
    first = observed["losses"][:SEEDED]
    for name, complaint in (
        ("again", "a second optimizer of the same seed drops something else"),
        ("in_turns", "an optimizer drops something else where another one is at work between its steps"),
    ):
        yield demanded(f"training.{name}", np.array_equal(first, observed[f"losses.{name}"]), complaint)
    if np.sum(possible.chances**2) ** SEEDED < BY_CHANCE:
        for seed in OTHER_SEEDS:
            differs = not np.array_equal(first, observed[f"losses.seed_{seed}"])
            yield demanded(f"training.seed_{seed}", differs, f"an optimizer of seed {seed} drops the same as one of seed 0")


def demanded(stage: str, holds: bool, complaint: str) -> Comparison:
    """A comparison that no number tells."""
    return Comparison(stage, 0.0, 0.0) if holds else Comparison(stage, float("inf"), 0.0, complaint)


def steps(observed: dict[str, Array], case: Case, dtype: str, phase: Phase, allowed: float) -> Iterator[Comparison]:
    """Whether each step moved the weights along the gradient under the mask that its loss tells of."""
    possible = outcomes(case, dtype)
    for seed in range(MOVES):
        value = observed[f"moved.{seed}.loss"]
        outcome = int(which(value, possible)[0])
        yield among(f"moved.{seed}.loss", value, possible.losses[[outcome]], allowed)
        for name, expectation in after_step(case, dtype, phase, outcome).items():
            yield compare(f"moved.{seed}.{name}", observed.get(f"moved.{seed}.{name}"), expectation)


@lru_cache(maxsize=1024)
def after_step(case: Case, dtype: str, phase: Phase, outcome: int) -> dict[str, Expectation]:
    """The weights after one step from the given ones under the mask of an outcome."""
    mask = outcomes(case, dtype).masks[[outcome]]

    def step(given: Params) -> dict[str, Array]:
        params, keep = Params(*(weight.copy() for weight in given)), kept(mask, case, given.embed.dtype)
        _, slopes = gradients(case.tokens, case.tokens, params, case.config, phase=phase, keep=keep)
        update(params, slopes, begin(params, MOVING), MOVING.learning_rate)
        return {f"weights.{name}": np.ravel(weight) for name, weight in params._asdict().items()}

    return expect(step, case.params, dtype)


def frequencies_say(counts: Array, chances: Array, steps: int) -> str:
    """The mask whose share of all steps is the furthest off."""
    worst = int(np.argmax(np.abs(counts / steps - chances)))
    share, chance = counts[worst] / steps, chances[worst]
    return f"masks are not drawn at their rate: one loss comes in {share:.1%} of {steps} steps, wanted {chance:.1%}"


def at_most_so_likely(count: int, n: int, chance: float) -> float:
    """How likely ``count`` of ``n`` draws is, or a number still further from what is expected on its side."""
    further = range(count, n + 1) if count > n * chance else range(count + 1)
    if not 0 < chance < 1:
        return 1.0
    return math.fsum(
        math.exp(
            math.lgamma(n + 1)
            - math.lgamma(k + 1)
            - math.lgamma(n - k + 1)
            + k * math.log(chance)
            + (n - k) * math.log1p(-chance)
        )
        for k in further
    )


def surprise(counts: Array, chances: Array) -> float:
    """How many standard deviations Pearson's chi-square is from its mean, for draws that are what they should be."""
    n, k = counts.sum(), len(chances)
    statistic = float(((counts - n * chances) ** 2 / (n * chances)).sum())
    spread = 2 * (k - 1) + (float((1 / chances).sum()) - k * k - 2 * k + 2) / n
    return (statistic - (k - 1)) / float(np.sqrt(spread))


def held(case: Case, dtype: str) -> Params:
    """The weights as a port of this dtype holds them, in float64."""
    return cast(cast(case.params, numpy_dtype(dtype)), np.float64)


@lru_cache(maxsize=64)
def outcomes(case: Case, dtype: str) -> Outcomes:
    """What masks can do to a port of this dtype."""
    c = case.config
    reached = c.n_layer * case.batch * c.n_head * (case.time - 1) * c.n_neurons
    masks = np.array(list(product((0.0, 1.0), repeat=reached)))  # M reached
    chances = np.prod(np.where(masks > 0, 1 - c.dropout, c.dropout), axis=1)
    losses = losses_under(masks, case, held(case, dtype))
    order = np.argsort(losses)
    first = np.flatnonzero(np.diff(losses[order], prepend=-np.inf) > SAME)  # masks of silent neurons change nothing
    return Outcomes(losses[order][first], np.add.reduceat(chances[order], first), masks[order][first])


def losses_under(masks: Array, case: Case, params: Params) -> Array:
    """The loss under each mask (M, reached)."""
    c, M = case.config, len(masks)
    x, _ = run(np.tile(case.tokens, (M, 1)), params, c, keep=kept(masks, case, np.dtype(np.float64)))
    logits = readout(x, params).reshape(M, case.batch, case.time, c.vocab_size)
    return np.array([loss(copy, case.tokens) for copy in logits])


def kept(masks: Array, case: Case, dtype: np.dtype[Any]) -> list[Array]:
    """Masks (M, reached) as one (M B, h, T, N) a layer. The first token's neurons are not reached: they are silent anyway."""
    c, M = case.config, len(masks)
    later = masks.reshape(M, c.n_layer, case.batch, c.n_head, case.time - 1, c.n_neurons)
    scaled = np.concatenate([np.ones_like(later[..., :1, :]), later], axis=4).astype(dtype) / dtype.type(1 - c.dropout)
    copies = (M * case.batch, c.n_head, case.time, c.n_neurons)
    return [layer.reshape(copies) for layer in scaled.swapaxes(0, 1)]
