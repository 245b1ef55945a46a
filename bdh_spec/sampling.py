"""R14: from logits to a token, so that one seed gives one text on every port."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

import numpy as np

from bdh_spec.errors import SamplingError
from bdh_spec.params import Array


def fresh_seed() -> int:
    """A seed that nobody has used."""
    return secrets.randbits(64)


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a text are drawn. Settings that define no distribution are refused.

    Without a seed every text is a new one.
    """

    temperature: float = 1.0  # 0: always the best
    top_k: int | None = None  # of how many candidates, 0 or None: of all
    seed: int = field(default_factory=fresh_seed)

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise SamplingError(f"temperature is {self.temperature}: it must be a finite number, 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 0:
            raise SamplingError(f"top_k is {self.top_k}: keep 1 or more tokens, or 0 or None for all")
        if not 0 <= self.seed < 2**64:
            raise SamplingError(f"seed is {self.seed}: it must be a whole number from 0 to 2^64 - 1")


def check_length(max_new_tokens: int) -> None:
    """Refuse a number of new tokens that no text can have."""
    if max_new_tokens < 0:
        raise SamplingError(f"max_new_tokens is {max_new_tokens}: a text cannot shrink; ask for 0 or more")


def uniform(seed: int, position: int, row: int = 0) -> float:
    """The draw that decides the token at ``position`` of text ``row``: 53 bits, from 0 up to but not including 1.

    Counter-based, so a text continued from a saved state draws what the uninterrupted one would have drawn. The bits are
    the top ones of the first word that NumPy's Philox4x64-10 yields for key ``seed`` and counter (0, 0, position, row).
    """
    bits = np.random.Philox(key=seed, counter=[0, 0, position, row]).random_raw()
    return float(int(bits) >> 11) * 2.0**-53


def sample(logits: Array, draw: float, how: Sampling) -> int:
    """Choose one token from logits (V,) by inverse CDF at ``draw``; at temperature 0 the best, the lowest id if tied."""
    if not np.isfinite(logits).all():
        raise SamplingError(f"logits hold {logits[~np.isfinite(logits)][0]}: the model has diverged, nothing can be drawn")
    if how.temperature == 0:
        return int(np.argmax(logits))
    cumulative = np.cumsum(probabilities(logits, how))
    return int(np.searchsorted(cumulative, draw * cumulative[-1], side="right"))


def probabilities(logits: Array, how: Sampling) -> Array:
    """Softmax of logits (V,) over temperature in float64, everything below the top_k-th value left out."""
    kept, top_k = np.asarray(logits, np.float64), how.top_k
    if top_k and top_k < kept.size:
        kth = np.partition(kept, -top_k)[-top_k]
        kept = np.where(kept >= kth, kept, -np.inf)
    weights: Array = np.exp((kept - kept.max()) / how.temperature)
    return weights / weights.sum()
