"""R14 on the device: from logits to a token, so that one seed gives one text on every port."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from bdh_jax.rope import Array
from bdh_spec.sampling import uniform

DIVERGED = -1  # the token drawn from logits that are not finite


def uniforms(seed: int, start: int, length: int, batch: int) -> np.ndarray:
    """The draws for ``length`` positions from ``start`` on, float64 (T, B): they depend on nothing the device computes."""
    return np.array([[uniform(seed, start + t, b) for b in range(batch)] for t in range(length)]).reshape(length, batch)


def sample(logits: Array, draw: Array, temperature: Array, top_k: Array) -> Array:
    """Choose one token per row of logits (B, V) by inverse CDF at ``draw`` (B,), in the precision of the draw.

    Temperature 0 means the best, the lowest id if tied. ``top_k`` runs from 1 to V; ``DIVERGED`` stands for a row that is
    not finite. Both are ordinary values: another one is no other program.
    """
    greedy = jnp.argmax(logits, axis=-1)
    cumulative = jnp.cumsum(
        probabilities(logits.astype(draw.dtype), jnp.where(temperature == 0, 1, temperature), top_k), axis=-1
    )
    drawn = jnp.sum(cumulative <= (draw * cumulative[:, -1])[:, None], axis=-1)
    chosen = jnp.where(temperature == 0, greedy, drawn)
    return jnp.where(jnp.isfinite(logits).all(axis=-1), chosen, DIVERGED).astype(jnp.int32)


def probabilities(logits: Array, temperature: Array, top_k: Array) -> Array:
    """Softmax of logits (B, V) over temperature, everything below the top_k-th value left out."""
    kth = jnp.take(jnp.sort(logits, axis=-1), logits.shape[-1] - top_k, axis=-1)[:, None]
    best = logits.max(axis=-1, keepdims=True)
    weights = jnp.where(logits >= kth, jnp.exp((logits - best) / temperature), 0)
    return weights / weights.sum(axis=-1, keepdims=True)
