"""Gradients are judged away from kinks: one relu that rounding flips moves a slope by 4e-4, a thousand times the rounding.

Where a case is too large for that, in float32: float64 flips none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.noise import plain
from bdh_conformance.yardstick.tolerances import FACTOR, PRECISION, noisy
from bdh_spec.config import BDHConfig
from bdh_spec.model import embed, run
from bdh_spec.params import Array, Params, cast

TRIES = 10
RUNS = 3
CROWD = 4000  # relus


def clear_of_kinks(case: Case) -> Case:
    """The case itself, or the same with a seed whose relus no float32 rounding flips, if one of the next has."""
    return case if crowded(case) else next((c for c in next_seeds(case) if is_clear(c.tokens, c.params, c.config)), case)


def kinked(case: Case) -> bool:
    """Whether float32 rounding may flip a relu of the case."""
    return crowded(case) or not is_clear(case.tokens, case.params, case.config)


def crowded(case: Case) -> bool:
    """Whether a case has so many relus that hardly a seed keeps all of them away from their kinks."""
    c = case.config
    return 2 * c.n_layer * c.n_head * c.n_neurons * case.batch * case.time > CROWD


def next_seeds(case: Case) -> Iterator[Case]:
    """The case, and others like it."""
    return (replace(case, seed=case.seed + i) for i in range(TRIES))


def is_clear(tokens: Array, params: Params, config: BDHConfig, keep: Sequence[Array] | None = None) -> bool:
    """Whether every relu's argument is further from zero than float32 rounding moves the arguments of that token.

    ``keep`` holds one dropout mask per layer, as in training.
    """
    held = cast(cast(params, np.float32), np.float64)
    exact = arguments(tokens, held, config, keep)
    rounded = [cast(held, np.float32), *(noisy(held, PRECISION["float32"], np.random.default_rng(i)) for i in range(RUNS))]
    moved = [
        np.max([np.abs(plain(a) - e) for a in others], axis=0)
        for e, *others in zip(exact, *(arguments(tokens, params, config, keep) for params in rounded), strict=True)
    ]
    return all(far_from_zero(e, m) for e, m in zip(exact, moved, strict=True))


def arguments(tokens: Array, params: Params, config: BDHConfig, keep: Sequence[Array] | None) -> list[Array]:
    """What each relu reads, before it cuts: (B, h, T, N) of R3 and of R7, layer by layer."""
    x, found = embed(tokens, params), []
    for layer in run(tokens, params, config, keep=keep)[1]:
        found += [x[:, None] @ params.encoder, layer.yKV @ params.encoder_v]
        x = layer.x
    return found


def far_from_zero(exact: Array, moved: Array) -> bool:
    """Whether no value of a token could change its sign. Exact zeros, as behind the first token's attention, stay exact."""
    margin = FACTOR["float32"] * moved.max(axis=(1, 3), keepdims=True)
    return bool(((np.abs(exact) > margin) | ((exact == 0) & (moved == 0))).all())
