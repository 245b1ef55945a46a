"""R1 to R10 in MLX: the embedding and one layer, under the specification's names and in its order.

Axes: B batch, T time, h head (nh of them), N neurons per head, D embedding width.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from bdh_mlx.rope import rope
from bdh_spec.config import BDHConfig
from bdh_spec.model import EPS
from bdh_spec.params import Params


class Stages(NamedTuple):
    """What one layer computes, in order. What nobody asks for is never evaluated."""

    x_sparse: mx.array  # B h T N  R3
    rotated: mx.array  # B h T N  R4
    scores: mx.array  # B h T T  R5
    attention: mx.array  # B h T D  R5
    yKV: mx.array  # B h T D  R6
    y_sparse: mx.array  # B h T N  R7
    xy_sparse: mx.array  # B h T N  R7, after dropout (R8)
    decoded: mx.array  # B T D    R9, before its norm
    y: mx.array  # B T D    R9
    x: mx.array  # B T D    R10, what the next layer starts from


def wide(dtype: mx.Dtype) -> mx.Dtype:
    """The dtype of norms, states and losses: float32 where the weights are narrower."""
    return mx.float64 if dtype == mx.float64 else mx.float32


def widen(x: mx.array) -> mx.array:
    """The same values in at least float32."""
    return x.astype(wide(x.dtype))


def embed(tokens: mx.array, params: Params) -> mx.array:
    """Look the tokens up and normalise (R1)."""
    looked_up = widen(params.embed)[tokens]  # widened first: the gradient adds up every occurrence of a token
    return layer_norm(looked_up).astype(params.embed.dtype)  # B T D


def layer_norm(x: mx.array) -> mx.array:
    """Centre and scale over the last axis: biased variance, eps inside the root, no affine (R2).

    Not ``mx.fast.layer_norm``: it works in float32 for float64 too, and its gradient takes the variance as a difference of
    two large numbers.
    """
    x = widen(x)
    centred = x - x.mean(-1, keepdims=True)
    return centred * mx.rsqrt((centred * centred).mean(-1, keepdims=True) + EPS)


def relu(x: mx.array) -> mx.array:
    """Keep what is positive; the slope at 0 is 0 (R15)."""
    return mx.maximum(x, 0)


def scores(rotated: mx.array) -> mx.array:
    """Similarity of each token with strictly earlier ones: K is Q, no scale, no softmax (R5)."""
    return mx.tril(rotated @ rotated.swapaxes(-1, -2), k=-1)  # B h T T


def read(memory: mx.array, rotated: mx.array) -> mx.array:
    """What the state holds for these queries (R13)."""
    return widen(rotated) @ memory  # B h T D


def write(memory: mx.array, rotated: mx.array, x: mx.array) -> mx.array:
    """The state after these tokens (R13), in the buffer of ``memory`` if nobody else holds that."""
    k, v = widen(rotated).swapaxes(-1, -2), widen(x)[:, None]  # B h N T, B 1 T D
    return memory + (k * v if x.shape[1] == 1 else k @ v)  # B h N D


def layer(
    x: mx.array, params: Params, cos: mx.array, sin: mx.array, memory: mx.array | None = None, keep: mx.array | None = None
) -> Stages:
    """Run one layer on x (B, T, D).

    ``memory`` is the layer's state before these tokens, absent at the start of a text. ``keep`` is the dropout mask of
    training, already divided by its probability (R8).
    """
    x_sparse = relu(x[:, None] @ params.encoder)  # B h T N
    rotated = rope(x_sparse, cos, sin)  # B h T N
    similar = scores(rotated)  # B h T T
    attention = attend(similar, x, rotated, memory)  # B h T D
    yKV = layer_norm(attention).astype(x.dtype)  # B h T D
    y_sparse = relu(yKV @ params.encoder_v)  # B h T N
    xy_sparse = x_sparse * y_sparse if keep is None else x_sparse * y_sparse * keep  # B h T N
    decoded = merge_heads(xy_sparse) @ params.decoder  # B T D
    y = layer_norm(decoded).astype(x.dtype)
    return Stages(
        x_sparse, rotated, similar, attention, yKV, y_sparse, xy_sparse, decoded, y, layer_norm(x + y).astype(x.dtype)
    )


def attend(similar: mx.array, x: mx.array, rotated: mx.array, memory: mx.array | None) -> mx.array:
    """Mix the values of earlier tokens: those of this call by their scores, those before it by the state (R5, R13)."""
    if memory is not None and x.shape[1] == 1:
        return read(memory, rotated)  # a lone token has no earlier one in its call
    attention = widen(similar) @ widen(x)[:, None]  # B h T D
    return attention if memory is None else attention + read(memory, rotated)


def dropout(config: BDHConfig, tokens_shape: tuple[int, ...], dtype: mx.Dtype, key: mx.array) -> list[mx.array | None]:
    """Fresh masks for one step of training, one (B, nh, T, N) per layer: 0, or 1/(1-p) where a value is kept (R8)."""
    if config.dropout == 0:
        return [None] * config.n_layer
    (B, T), kept = tokens_shape, 1 - config.dropout
    shape = (B, config.n_head, T, config.n_neurons)
    keys = mx.random.split(key, config.n_layer)
    return [mx.random.bernoulli(kept, shape, key=k).astype(dtype) / kept for k in keys]


def merge_heads(xy_sparse: mx.array) -> mx.array:
    """Lay the heads side by side, head-major (R9)."""
    B, nh, T, N = xy_sparse.shape
    return xy_sparse.swapaxes(1, 2).reshape(B, T, nh * N)
