"""R8 where there are many values to drop: whole masks, read off the rows of the decoder that a step moves.

A row of the decoder has a slope if its neuron is active and kept at a token that the loss depends on. With one target that
counts, and one layer, that is one token: the rows that move are its mask. With more layers, all of which read nearly the same
x because the decoder is faint, a row stays only if every layer drops it. Values must be dropped as often as they should, and
none with another one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from bdh_conformance.channels.loading import loaded_again
from bdh_conformance.yardstick.agreement import Comparison
from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.reference import Specification
from bdh_spec import AdamW, BDHConfig, Model
from bdh_spec.model import IGNORE
from bdh_spec.params import Array

# A step of Adam's without an epsilon to speak of: every slope moves its weight by the rate, however small it is.
LEAP = AdamW(learning_rate=1.0, weight_decay=0.0, eps=1e-25, clip=None, seed=3)
MOVED = 0.5  # of the rate
ACTIVE = 1e-3  # of a token's largest value: what is less may be nothing on another port
SIGMAS = 7.0  # of hundreds of comparisons
FEWEST = 60  # values from which two masks can be told from one by so many standard deviations

PAIRS = Case(BDHConfig(1, 8, 0.5, 3, 49, 11), 6, 7, seed=3, scale=20.0)  # 130 neurons: no block divides them
LAYERS = Case(BDHConfig(4, 8, 0.4, 3, 49, 11), 6, 2, seed=4, scale=20.0, weights="faint")
CASES = (PAIRS, LAYERS)


def places(case: Case) -> list[tuple[int, int]]:
    """Texts and tokens that are looked at: all of one text, the last of every text. The first token drops nothing."""
    return [(0, t) for t in range(1, case.time)] + [(b, case.time - 1) for b in range(1, case.batch)]


def observe(model: Model, case: Case) -> dict[str, Array]:
    """For each place the rows of the decoder (h*N,) that one step moves, if that place's target alone counts."""
    return {f"moved.{b}.{t}": rows_moved(loaded_again(model, case), case, b, t) for b, t in places(case)}


def rows_moved(model: Model, case: Case, b: int, t: int) -> Array:
    before, targets = model.params().decoder, np.full_like(case.tokens, IGNORE)
    targets[b, t] = case.tokens[b, t]
    model.train_step(model.optimizer(LEAP), case.tokens, targets)
    moved: Array = np.abs(model.params().decoder - before).max(axis=1) > MOVED
    return moved


def judge(observed: Mapping[str, Array], case: Case) -> list[Comparison]:
    """Whether the masks are what independent draws of the right rate give."""
    kept = np.array([observed[f"moved.{b}.{t}"] for b, t in places(case)])  # P h*N
    seen = np.array([active(case, b, t) for b, t in places(case)])  # P h*N
    chance = 1 - case.config.dropout**case.config.n_layer
    found = [held_to("share", kept[seen], np.full(seen.sum(), chance), "are kept")]
    if case.config.n_layer == 1:
        found += [*of_places(kept, seen, case, chance), *of_neurons(kept, seen, case, chance)]
    return found


def active(case: Case, b: int, t: int) -> Array:
    """The neurons (h*N,) whose product is not zero at a token, in every layer, by the specification."""
    trace = Specification(case.params, case.config).trace(case.tokens)
    products = [trace[f"layers.{i}.xy_sparse"][b, :, t].ravel() for i in range(case.config.n_layer)]
    return np.all([product > ACTIVE * product.max() for product in products], axis=0)


def of_places(kept: Array, seen: Array, case: Case, chance: float) -> Iterator[Comparison]:
    """No two tokens, and no two texts, drop alike."""
    at = places(case)
    for i in range(len(at)):
        for j in range(i):
            both = seen[i] & seen[j]
            if both.sum() >= FEWEST:
                (b, t), (c, u) = at[i], at[j]
                name = f"text_{b}_token_{t}_and_text_{c}_token_{u}"
                yield alike(name, kept[i][both], kept[j][both], chance)


def of_neurons(kept: Array, seen: Array, case: Case, chance: float) -> Iterator[Comparison]:
    """No two neurons at any distance drop alike, over all places."""
    for distance in range(1, kept.shape[1] // 2 + 1):
        both = seen[:, distance:] & seen[:, :-distance]
        if both.sum() >= FEWEST:
            yield alike(f"neurons_{distance}_apart", kept[:, distance:][both], kept[:, :-distance][both], chance)


def alike(name: str, one: Array, other: Array, chance: float) -> Comparison:
    """Whether two masks agree as often as independent ones do."""
    return held_to(name, one == other, np.full(one.size, chance**2 + (1 - chance) ** 2), "agree")


def held_to(name: str, happened: Array, chances: Array, what: str) -> Comparison:
    """How often something happened, in standard deviations from how often it should."""
    off = float(abs(happened.sum() - chances.sum()) / np.sqrt((chances * (1 - chances)).sum()))
    share, wanted = happened.mean(), chances.mean()
    complaint = (
        f"{share:.1%} of {happened.size} values {what}, wanted {wanted:.1%}: {off:.0f} sigmas off" if off > SIGMAS else ""
    )
    return Comparison(f"masks.{name}", off, SIGMAS, complaint)
