"""The plain form in MLX, as BDH-MLX's users have it: SPEC.md's rules one after another, whole arrays, a mask of ones.

``step`` is the recurrent form that writes a new state; a generation of BDH-MLX calls ``forward`` on the whole text instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import mlx.core as mx

from bdh_spec import BDHConfig
from bdh_spec.model import EPS, IGNORE
from bdh_spec.params import Params
from bdh_spec.rope import frequencies

Attend: TypeAlias = Callable[[mx.array, mx.array], mx.array]


def forward(tokens: mx.array, params: Params, config: BDHConfig, dropout: float = 0.0) -> mx.array:
    """Tokens (B, T) to logits (B, T, V)."""
    x = embed(tokens, params)
    for _ in range(config.n_layer):
        x = layer(x, params, mx.array(0), attend, dropout)
    return x @ params.lm_head  # R11


def loss(params: Params, tokens: mx.array, targets: mx.array, config: BDHConfig, dropout: float = 0.0) -> mx.array:
    """Mean cross entropy in nats (R12)."""
    logits = forward(tokens, params, config, dropout).astype(mx.float32)
    counted = targets != IGNORE
    at_target = mx.take_along_axis(logits, mx.where(counted, targets, 0)[..., None], axis=-1)[..., 0]
    return mx.sum((mx.logsumexp(logits, axis=-1) - at_target) * counted) / mx.sum(counted)


def prefill(tokens: mx.array, params: Params, config: BDHConfig) -> tuple[mx.array, list[mx.array]]:
    """Logits of a text (B, T), and the state after it: one (B, h, N, D) per layer (R13)."""
    x, memories = embed(tokens, params), []

    def attend_and_write(rotated: mx.array, v: mx.array) -> mx.array:
        memories.append(rotated.astype(mx.float32).swapaxes(-1, -2) @ v.astype(mx.float32))
        return attend(rotated, v)

    for _ in range(config.n_layer):
        x = layer(x, params, mx.array(0), attend_and_write)
    return x @ params.lm_head, memories


def step(
    tokens: mx.array, memories: list[mx.array], position: mx.array, params: Params, config: BDHConfig
) -> tuple[mx.array, list[mx.array]]:
    """One token (B, 1) of each text: its logits, and a new state (R13)."""
    x, after = embed(tokens, params), list[mx.array]()

    def read_and_write(rotated: mx.array, v: mx.array) -> mx.array:
        q, memory = rotated.astype(mx.float32), memories[len(after)]
        after.append(memory + q.swapaxes(-1, -2) @ v.astype(mx.float32))
        return q @ memory

    for _ in range(config.n_layer):
        x = layer(x, params, position, read_and_write)
    return x @ params.lm_head, after


def embed(tokens: mx.array, params: Params) -> mx.array:
    """R1."""
    return layer_norm(params.embed[tokens]).astype(params.embed.dtype)


def layer_norm(x: mx.array) -> mx.array:
    """R2, in float32."""
    return mx.fast.layer_norm(x.astype(mx.float32), None, None, EPS)


def layer(x: mx.array, params: Params, start: mx.array, attend: Attend, dropout: float = 0.0) -> mx.array:
    """R3 to R10 on x (B, T, D)."""
    B, T, _ = x.shape
    x_sparse = mx.maximum(x[:, None] @ params.encoder, 0)  # B h T N  R3
    rotated = rope(x_sparse, start)  # R4
    yKV = layer_norm(attend(rotated, x[:, None])).astype(x.dtype)  # B h T D  R5, R6
    y_sparse = mx.maximum(yKV @ params.encoder_v, 0)  # B h T N  R7
    xy_sparse = x_sparse * y_sparse
    if dropout:
        xy_sparse = xy_sparse * mx.random.bernoulli(1 - dropout, xy_sparse.shape) * (1 / (1 - dropout))  # R8
    merged = xy_sparse.transpose(0, 2, 1, 3).reshape(B, T, -1).astype(x.dtype)  # B T h*N
    y = layer_norm(merged @ params.decoder).astype(x.dtype)  # R9
    return layer_norm(x + y).astype(x.dtype)  # R10


def rope(v: mx.array, start: mx.array) -> mx.array:
    """R4, phases as float32."""
    T, N = v.shape[-2:]
    turns = (start + mx.arange(T)).astype(mx.float32)[:, None] * mx.array(table(N)) % 1
    angle = 2 * math.pi * turns  # T N
    swapped = mx.stack([-v[..., 1::2], v[..., 0::2]], axis=-1).reshape(v.shape)
    return (v * mx.cos(angle)).astype(v.dtype) + (swapped * mx.sin(angle)).astype(v.dtype)


table = cache(frequencies)


def attend(rotated: mx.array, v: mx.array) -> mx.array:
    """R5: all scores, then a mask of ones and zeros."""
    T = rotated.shape[-2]
    mask = mx.tril(mx.ones((T, T), rotated.dtype), k=-1)
    return ((rotated @ rotated.transpose(0, 1, 3, 2)) * mask) @ v
