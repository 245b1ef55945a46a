"""Cases as Hypothesis draws them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.sizes import SIZES, Shape
from bdh_spec.config import BDHConfig


def sized(name: str, longest: int, kinds: Sequence[tuple[float, str]]) -> st.SearchStrategy[Case]:
    """Cases of a class; ``kinds`` are pairs of scale and weights."""

    def case(seed: int) -> Case:
        rng = np.random.default_rng(seed)
        shape = SIZES[name].draw(rng, longest)
        scale, weights = kinds[int(rng.integers(len(kinds)))]
        return Case(*shape, seed=seed, scale=scale, weights=weights)

    # Hypothesis tries the simplest example first, and often: 0 is left out, so that one example already is a drawn one.
    return st.integers(0, 2**32 - 1).filter(bool).map(case)


@st.composite
def pooled(draw: st.DrawFn, shapes: Sequence[Shape], kinds: Sequence[tuple[float, str]]) -> Case:
    """A case of one of the shapes; ``kinds`` are pairs of scale and weights."""
    config, batch, time = draw(st.sampled_from(shapes))
    scale, weights = draw(st.sampled_from(kinds))
    return Case(config, batch, time, draw(st.integers(0, 2**16)), scale, weights=weights)


@st.composite
def cases(draw: st.DrawFn, *, min_time: int = 1, max_time: int = 8) -> Case:
    """Any small case: sizes, seed, and weights from a fresh model's size to fifty times that."""
    n_head = draw(st.sampled_from([1, 2, 3, 4]))
    n_embd = draw(st.sampled_from([2, 4, 6, 8, 10, 16]))
    fitting = [m for m in range(1, 9) if m * n_embd // n_head >= 2 and m * n_embd // n_head % 2 == 0]
    config = BDHConfig(
        n_layer=draw(st.integers(1, 3)),
        n_embd=n_embd,
        n_head=n_head,
        mlp_internal_dim_multiplier=draw(st.sampled_from(fitting)),
        vocab_size=draw(st.sampled_from([2, 3, 7, n_embd, 30])),
    )
    return Case(
        config,
        batch=draw(st.integers(1, 3)),
        time=draw(st.integers(min_time, max_time)),
        seed=draw(st.integers(0, 2**16)),
        scale=draw(st.sampled_from([1.0, 5.0, 50.0])),
    )
