"""R14: from logits to a token, so that one seed gives one text on every port."""

from __future__ import annotations

import numpy as np

from bdh_spec.errors import SamplingError
from bdh_spec.params import Array


def uniform(seed: int, position: int, row: int = 0) -> float:
    """The draw that decides the token at ``position`` of text ``row``: 53 bits, from 0 up to but not including 1.

    Counter-based, so a text continued from a saved state draws what the uninterrupted one would have drawn. The bits are
    the top ones of the first word that NumPy's Philox4x64-10 yields for key ``seed`` and counter (0, 0, position, row).
    """
    bits = np.random.Philox(key=seed, counter=[0, 0, position, row]).random_raw()
    return float(int(bits) >> 11) * 2.0**-53


def sample(logits: Array, draw: float, temperature: float = 1.0, top_k: int | None = None) -> int:
    """Choose one token from logits (V,) by inverse CDF at ``draw``; at temperature 0 the best, the lowest id if tied."""
    if not np.isfinite(logits).all():
        raise SamplingError(f"logits hold {logits[~np.isfinite(logits)][0]}: the model has diverged, nothing can be drawn")
    if temperature == 0:
        return int(np.argmax(logits))
    cumulative = np.cumsum(probabilities(logits, temperature, top_k))
    return int(np.searchsorted(cumulative, draw * cumulative[-1], side="right"))


def probabilities(logits: Array, temperature: float, top_k: int | None = None) -> Array:
    """Softmax of logits (V,) over temperature in float64, everything below the top_k-th value left out."""
    kept = np.asarray(logits, np.float64)
    if top_k and top_k < kept.size:
        kth = np.partition(kept, -top_k)[-top_k]
        kept = np.where(kept >= kth, kept, -np.inf)
    weights: Array = np.exp((kept - kept.max()) / temperature)
    return weights / weights.sum()


def check_sampling(max_new_tokens: int, temperature: float, top_k: int | None, seed: int) -> None:
    """Refuse settings that define no distribution."""
    if max_new_tokens < 0:
        raise SamplingError(f"max_new_tokens is {max_new_tokens}: a text cannot shrink; ask for 0 or more")
    if not 0 <= temperature < float("inf"):
        raise SamplingError(f"temperature is {temperature}: it must be a finite number, 0 (greedy) or more")
    if top_k is not None and top_k < 0:
        raise SamplingError(f"top_k is {top_k}: keep 1 or more tokens, or 0 or None for all")
    if not 0 <= seed < 2**64:
        raise SamplingError(f"seed is {seed}: it must be a whole number from 0 to 2^64 - 1")
