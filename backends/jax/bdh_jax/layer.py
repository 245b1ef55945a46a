"""R1 to R10: the embedding and one layer, in the specification's order.

Axes: B batch, T time, h head (nh of them), N neurons per head, D embedding width.
Activations have the dtype of the weights. Sums, norms and the state are never narrower than float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bdh_jax.rope import Array, rope
from bdh_spec.config import BDHConfig
from bdh_spec.model import EPS
from bdh_spec.params import Params


class Stages(NamedTuple):
    """What one layer computes, in order: the stages of a trace."""

    x_sparse: Array  # B h T N  R3
    rotated: Array  # B h T N  R4
    scores: Array  # B h T T  R5
    attention: Array  # B h T D  R5
    yKV: Array  # B h T D  R6
    y_sparse: Array  # B h T N  R7
    xy_sparse: Array  # B h T N  R7, after dropout (R8)
    decoded: Array  # B T D    R9, before its norm
    y: Array  # B T D    R9
    x: Array  # B T D    R10, what the next layer starts from


def embed(tokens: Array, params: Params) -> Array:
    """Look the tokens up and normalise (R1)."""
    return layer_norm(params.embed[tokens]).astype(params.embed.dtype)  # B T D


def layer_norm(x: Array) -> Array:
    """Centre and scale over the last axis: biased variance, eps inside the root, no affine (R2)."""
    x = x.astype(wide(x.dtype))
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred * centred).mean(-1, keepdims=True) + EPS)


def relu(x: Array) -> Array:
    """Keep what is positive; the slope at 0 is 0 (R15), where that of a maximum would be 1/2."""
    return jax.nn.relu(x)


def wide(dtype: Any) -> Any:
    """The dtype of sums: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def product(a: Array, b: Array) -> Array:
    """``a @ b`` without shortcuts such as TF32, summed and returned in a wide dtype."""
    dtype = jnp.promote_types(a.dtype, b.dtype)
    return jnp.matmul(a.astype(dtype), b.astype(dtype), precision="highest", preferred_element_type=wide(dtype))


def for_every_head(x: Array, encoder: Array) -> Array:
    """x (B, T, D) as (B, nh, T, D): a product batched over heads, where XLA would transpose the encoder for a wider one."""
    return jnp.broadcast_to(x[:, None], (x.shape[0], encoder.shape[0], *x.shape[1:]))


def scores(rotated: Array) -> Array:
    """Similarity of each token with strictly earlier ones: K is Q, no scale, no softmax (R5)."""
    return jnp.tril(product(rotated, rotated.swapaxes(-1, -2)), k=-1)  # B h T T


def read(memory: Array, rotated: Array) -> Array:
    """What the state holds for these queries (R13)."""
    return product(rotated, memory)  # B h T D


def write(memory: Array, rotated: Array, x: Array) -> Array:
    """The state after these tokens (R13)."""
    return memory + product(rotated.swapaxes(-1, -2), x[:, None])  # B h N D


def layer(x: Array, params: Params, cos: Array, sin: Array, memory: Array | None = None, keep: Array | float = 1.0) -> Stages:
    """Run one layer on x (B, T, D).

    ``memory`` is the layer's state before these tokens, absent at the start of a text. ``keep`` is the dropout mask of
    training, already divided by its probability (R8).
    """
    dtype = x.dtype
    x_sparse = relu(product(for_every_head(x, params.encoder), params.encoder)).astype(dtype)  # B h T N
    rotated = rope(x_sparse, cos, sin).astype(dtype)  # B h T N
    similar = saved(scores(rotated), "scores")  # B h T T
    attention = product(similar, x[:, None])  # B h T D
    if memory is not None:
        attention = attention + read(memory, rotated)
    attention = saved(attention, "attention")
    yKV = layer_norm(attention).astype(dtype)  # B h T D
    y_sparse = relu(product(yKV, params.encoder_v)).astype(dtype)  # B h T N
    xy_sparse = (x_sparse * y_sparse * keep).astype(dtype)  # B h T N
    decoded = saved(product(merge_heads(xy_sparse), params.decoder), "decoded")  # B T D
    return Stages(x_sparse, rotated, similar, attention, yKV, y_sparse, xy_sparse, decoded, *residual(x, decoded))


def residual(x: Array, decoded: Array) -> tuple[Array, Array]:
    """The end of a layer, from what the decoder returned: y and the next x (R9, R10)."""
    y = layer_norm(decoded).astype(x.dtype)
    return y, layer_norm(x + y).astype(x.dtype)


def saved(x: Array, name: str) -> Array:
    """x, named for the policies of gradients."""
    return checkpoint_name(x, name)  # type: ignore[no-untyped-call]  # JAX leaves it untyped


def dropout(config: BDHConfig, tokens_shape: tuple[int, ...], dtype: Any, key: Array) -> Array:
    """A fresh mask (B, nh, T, N) for one layer in training: 0, or 1/(1-p) where a value is kept (R8)."""
    B, T = tokens_shape
    return mask(key, (B, config.n_head, T, config.n_neurons), config, dtype)


def mask(key: Array, shape: tuple[int, ...], config: BDHConfig, dtype: Any) -> Array:
    """The same of any shape."""
    kept = 1 - config.dropout
    return jax.random.bernoulli(key, jnp.float32(kept), shape).astype(dtype) / kept


def merge_heads(xy_sparse: Array) -> Array:
    """Lay the heads side by side, head-major (R9)."""
    B, nh, T, N = xy_sparse.shape
    return xy_sparse.swapaxes(1, 2).reshape(B, T, nh * N)
