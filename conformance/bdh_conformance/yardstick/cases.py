"""Small models and texts that do not hide bugs, drawn by Hypothesis or built by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from bdh_spec.config import BDHConfig
from bdh_spec.int8 import rounded, widened
from bdh_spec.params import INIT_STD, Array, Params, cast, init
from bdh_spec.rope import Frequencies, frequencies

WEIGHTS = ("normal", "mixed", "ties", "dead", "faint")
FREQS = ("published", "trained", "paired")
STORED = ("float", "int8")
DROPOUT = BDHConfig().dropout
SIZES = {"L": "n_layer", "h": "n_head", "D": "n_embd", "V": "vocab_size", "m": "mlp_internal_dim_multiplier"}


@dataclass(frozen=True)
class Case:
    """One model and one batch of texts, all of it from a few numbers that a failure can print."""

    config: BDHConfig
    batch: int = 2
    time: int = 5
    seed: int = 0
    scale: float = 1.0  # of the weights, in units of a fresh model's
    weights: str = field(default="normal", kw_only=True)
    freqs: str = field(default="published", kw_only=True)  # how fast neurons turn, of which the configuration is made to tell
    stored: str = field(default="float", kw_only=True)  # how a port is given the weights

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.config.n_neurons)  # one table for all seeds: JAX compiles a model for its table
        object.__setattr__(self, "config", replace(self.config, freqs=TABLES[self.freqs](self.config.n_neurons, rng)))

    def __str__(self) -> str:
        c = self.config
        sizes = f"L{c.n_layer} h{c.n_head} D{c.n_embd} N{c.n_neurons} V{c.vocab_size}"
        rest = [f"dropout={c.dropout}"] * (c.dropout != DROPOUT) + [f"weights={self.weights}"] * (self.weights != "normal")
        rest += [f"freqs={self.freqs}"] * (self.freqs != "published") + [f"stored={self.stored}"] * (self.stored != "float")
        words = [f"B{self.batch} T{self.time} {sizes} m{c.mlp_internal_dim_multiplier} seed={self.seed} scale={self.scale}"]
        return " ".join(words + rest)

    @classmethod
    def parse(cls, text: str) -> Case:
        """The case that a failure printed.

        >>> str(Case.parse("B1 T2 L2 h2 D4 m4 V7 seed=7 scale=0.3"))
        'B1 T2 L2 h2 D4 N8 V7 m4 seed=7 scale=0.3'
        """
        sizes, rest = {}, {}
        for word in text.split():
            match = re.fullmatch(r"([BTLhDNVm])(\d+)|(seed|scale|dropout|weights|freqs|stored)=(\S+)", word)
            if match is None:
                raise ValueError(f"{word!r} is no part of a case: give one such as {cls(CONFIGS['plain'])}")
            if match[1]:
                sizes[match[1]] = int(match[2])
            else:
                rest[match[3]] = match[4]
        if missing := [size for size in SIZES if size not in sizes]:
            raise ValueError(f"the case {text!r} lacks {', '.join(missing)}: give one such as {cls(CONFIGS['plain'])}")
        numbers = {name: sizes[size] for size, name in SIZES.items()}
        config = BDHConfig.from_dict({**numbers, "dropout": float(rest.get("dropout", DROPOUT))})
        if sizes.get("N", config.n_neurons) != config.n_neurons:
            raise ValueError(f"N{sizes['N']} in a case whose other sizes make it N{config.n_neurons}: leave N out")
        kinds = {
            "weights": rest.get("weights", "normal"),
            "freqs": rest.get("freqs", "published"),
            "stored": rest.get("stored", "float"),
        }
        for (word, kind), known in zip(kinds.items(), (WEIGHTS, FREQS, STORED), strict=True):
            if kind not in known:
                raise ValueError(f"{word}={kind} in a case: choose from {', '.join(known)}")
        batch, time = sizes.get("B", cls.batch), sizes.get("T", cls.time)
        return cls(config, batch, time, int(rest.get("seed", 0)), float(rest.get("scale", 1.0)), **kinds)

    @cached_property
    def params(self) -> Params:
        """Float64 weights: of those in int8, what they stand for."""
        return self.drawn if self.stored == "float" else widened(self.given, np.float64)

    @cached_property
    def given(self) -> Params:
        """The weights as a port is given them."""
        return self.params if self.stored == "float" else rounded(self.drawn)

    @cached_property
    def drawn(self) -> Params:
        """Float64 weights, before any rounding to int8."""
        weights = cast(init(self.config, np.random.default_rng(self.seed)), np.float64)
        scaled = Params(*(weight * self.scale for weight in weights))
        return SHAPERS[self.weights](scaled, self._rng)

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


def mixed(params: Params, rng: np.random.Generator) -> Params:
    """Weights of which every tensor, and every row in it, has a size of its own, over two orders of magnitude."""

    def resized(weight: Array) -> Array:
        return weight * 10 ** rng.uniform(-0.5, 0.5) * 10 ** rng.uniform(-0.5, 0.5, (*weight.shape[:-1], 1))

    return Params(*(resized(weight) for weight in params))


def ties(params: Params, rng: np.random.Generator) -> Params:
    """A head whose columns each pick one feature, so that logits tie exactly, whatever the order of summation."""
    D, V = params.lm_head.shape
    head = np.zeros((D, V))
    head[rng.integers(0, min(D, 3), V), np.arange(V)] = INIT_STD * 50
    return params._replace(lm_head=head)


def dead(params: Params, _: np.random.Generator) -> Params:
    """Neurons without weights, one of each kind in every head: their relus read exact zeros, where the slope is 0 (R15)."""
    encoder, encoder_v = params.encoder.copy(), params.encoder_v.copy()
    encoder[:, :, 0] = encoder_v[:, :, 1] = 0
    return params._replace(encoder=encoder, encoder_v=encoder_v)


def faint(params: Params, _: np.random.Generator) -> Params:
    """A decoder so small that the norm's epsilon swallows what it adds: all layers read nearly the same x."""
    return params._replace(decoder=params.decoder * 1e-5)


SHAPERS: dict[str, Callable[[Params, np.random.Generator], Params]] = {
    "normal": lambda params, _: params,
    "mixed": mixed,
    "ties": ties,
    "dead": dead,
    "faint": faint,
}


def trained(n_neurons: int, rng: np.random.Generator) -> Frequencies:
    """BDH's table after some steps of an optimiser that took it for a weight: each entry has moved by itself.

    Slow ones have turned negative. One has passed a whole turn, one turns backwards, and one hardly any more.
    """
    table = frequencies(n_neurons) + np.sum(rng.uniform(-1.5e-3, 1.5e-3, (8, n_neurons)), axis=0)
    fast, back, still = rng.permutation(n_neurons).tolist()[:3] if n_neurons > 2 else (0, 1, None)
    table[fast] += rng.choice([-2, 1, 2])
    table[back] = -abs(table[back]) - rng.uniform(0, 0.1)
    if still is not None:
        table[still] = rng.uniform(1e-10, 1e-8)
    return Frequencies(table)


def paired(n_neurons: int, rng: np.random.Generator) -> Frequencies:
    """A table that is not BDH's, and as there turns both neurons of a pair alike."""
    return Frequencies(trained(n_neurons, rng).array[0::2].repeat(2))


TABLES: dict[str, Callable[[int, np.random.Generator], Frequencies | None]] = {
    "published": lambda n_neurons, rng: None,
    "trained": trained,
    "paired": paired,
}

# Each of these sizes shows bugs that others hide: one head, heads that do not divide, D == V, N == D, odd multipliers.
CONFIGS = {
    "plain": BDHConfig(n_layer=2, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=11),
    "one_head": BDHConfig(n_layer=2, n_embd=6, n_head=1, mlp_internal_dim_multiplier=3, vocab_size=13),
    "three_heads": BDHConfig(n_layer=3, n_embd=8, n_head=3, mlp_internal_dim_multiplier=7, vocab_size=9),
    "square_head": BDHConfig(n_layer=2, n_embd=12, n_head=2, mlp_internal_dim_multiplier=3, vocab_size=12),
    "square_encoder": BDHConfig(n_layer=2, n_embd=8, n_head=4, mlp_internal_dim_multiplier=4, vocab_size=300),
    "one_layer": BDHConfig(n_layer=1, n_embd=10, n_head=2, mlp_internal_dim_multiplier=6, vocab_size=7),
}

# The shapes (config, B, T) of generated cases, small ones first. JAX compiles each once; values are drawn freely.
POOL = (
    (CONFIGS["plain"], 1, 1),
    (CONFIGS["one_layer"], 1, 3),
    (CONFIGS["one_head"], 1, 6),
    (CONFIGS["plain"], 2, 6),
    (CONFIGS["three_heads"], 2, 5),
    (CONFIGS["square_head"], 2, 4),
    (CONFIGS["square_encoder"], 3, 4),
)

# What a run must have met, or the bugs that hide behind it are not excluded.
COVERAGE: dict[str, Callable[[Case], bool]] = {
    "nh = 1": lambda case: case.config.n_head == 1,
    "nh = 3": lambda case: case.config.n_head == 3,
    "L = 1": lambda case: case.config.n_layer == 1,
    "B = 1": lambda case: case.batch == 1,
    "T = 1": lambda case: case.time == 1,
    "V > 256": lambda case: case.config.vocab_size > 256,
    "V = D": lambda case: case.config.vocab_size == case.config.n_embd,
    "V != D": lambda case: case.config.vocab_size != case.config.n_embd,
    "N = D": lambda case: case.config.n_neurons == case.config.n_embd,
    "odd multiplier": lambda case: case.config.mlp_internal_dim_multiplier % 2 == 1,
    "weights at std 0.02": lambda case: case.scale == 1 and case.weights == "normal",
    "weights of order one": lambda case: case.scale * INIT_STD >= 0.4 and case.weights == "normal",
    "mixed scales": lambda case: case.weights == "mixed",
    "ids 0 and V-1": lambda case: {0, case.config.vocab_size - 1} <= set(case.tokens.flat),
}
