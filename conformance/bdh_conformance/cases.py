"""Small models and texts that do not hide bugs, drawn by Hypothesis or built by hand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from hypothesis import strategies as st

from bdh_spec.config import BDHConfig
from bdh_spec.params import Array, Params, cast, init


@dataclass(frozen=True)
class Case:
    """One model and one batch of texts, all of it from a few numbers that a failure can print."""

    config: BDHConfig
    batch: int = 2
    time: int = 5
    seed: int = 0
    scale: float = 1.0  # of the weights, in units of a fresh model's

    def __str__(self) -> str:
        c = self.config
        sizes = f"L{c.n_layer} h{c.n_head} D{c.n_embd} N{c.n_neurons} V{c.vocab_size}"
        return f"B{self.batch} T{self.time} {sizes} m{c.mlp_internal_dim_multiplier} seed={self.seed} scale={self.scale}"

    @cached_property
    def params(self) -> Params:
        """Float64 weights."""
        weights = cast(init(self.config, np.random.default_rng(self.seed)), np.float64)
        return Params(*(weight * self.scale for weight in weights))

    @cached_property
    def tokens(self) -> Array:
        """Tokens (B, T) with the first and the last id among them where there is room."""
        tokens = self._rng.integers(0, self.config.vocab_size, (self.batch, self.time))
        tokens.flat[0], tokens.flat[-1] = self.config.vocab_size - 1, 0
        return tokens

    @cached_property
    def targets(self) -> Array:
        """Targets (B, T), one of them ignored where more than one is there."""
        targets = self._rng.integers(0, self.config.vocab_size, (self.batch, self.time))
        if targets.size > 1:
            targets.flat[targets.size // 2] = -100
        return targets

    @property
    def _rng(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.batch, self.time])


# Each of these sizes shows bugs that others hide: one head, heads that do not divide, D == V, N == D, odd multipliers.
CONFIGS = {
    "plain": BDHConfig(n_layer=2, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=11),
    "one_head": BDHConfig(n_layer=2, n_embd=6, n_head=1, mlp_internal_dim_multiplier=3, vocab_size=13),
    "three_heads": BDHConfig(n_layer=3, n_embd=8, n_head=3, mlp_internal_dim_multiplier=7, vocab_size=9),
    "square_head": BDHConfig(n_layer=2, n_embd=12, n_head=2, mlp_internal_dim_multiplier=3, vocab_size=12),
    "square_encoder": BDHConfig(n_layer=2, n_embd=8, n_head=4, mlp_internal_dim_multiplier=4, vocab_size=300),
    "one_layer": BDHConfig(n_layer=1, n_embd=10, n_head=2, mlp_internal_dim_multiplier=6, vocab_size=7),
}


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
