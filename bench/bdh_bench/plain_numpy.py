"""The plain form in NumPy: SPEC.md's rules one after another, whole arrays, phases anew in each layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import numpy as np

from bdh_spec import BDHConfig
from bdh_spec.model import EPS
from bdh_spec.params import Array, Params
from bdh_spec.rope import frequencies

Attend: TypeAlias = Callable[[Array, Array], Array]


def forward(tokens: Array, params: Params, config: BDHConfig) -> Array:
    """Tokens (B, T) to logits (B, T, V)."""
    x = layer_norm(params.embed[tokens])  # R1
    for _ in range(config.n_layer):
        x = layer(x, params, 0, attend)
    return x @ params.lm_head  # R11


def prefill(tokens: Array, params: Params, config: BDHConfig) -> tuple[Array, list[Array]]:
    """Logits of a text (B, T), and the state after it: one (B, h, N, D) per layer (R13)."""
    x, memories = layer_norm(params.embed[tokens]), []

    def attend_and_write(rotated: Array, v: Array) -> Array:
        memories.append(rotated.swapaxes(-1, -2) @ v)
        return attend(rotated, v)

    for _ in range(config.n_layer):
        x = layer(x, params, 0, attend_and_write)
    return x @ params.lm_head, memories


def step(tokens: Array, memories: list[Array], position: int, params: Params, config: BDHConfig) -> tuple[Array, list[Array]]:
    """One token (B, 1) of each text: its logits, and a new state (R13)."""
    x, after = layer_norm(params.embed[tokens]), list[Array]()

    def read_and_write(rotated: Array, v: Array) -> Array:
        memory = memories[len(after)]
        after.append(memory + rotated.swapaxes(-1, -2) @ v)
        return rotated @ memory

    for _ in range(config.n_layer):
        x = layer(x, params, position, read_and_write)
    return x @ params.lm_head, after


def layer_norm(x: Array) -> Array:
    """R2."""
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPS)


def layer(x: Array, params: Params, start: int, attend: Attend) -> Array:
    """R3 to R10 on x (B, T, D)."""
    B, T, _ = x.shape
    x_sparse = np.maximum(x[:, None] @ params.encoder, 0)  # B h T N  R3
    rotated = rope(x_sparse, start)  # R4
    yKV = layer_norm(attend(rotated, x[:, None]))  # B h T D  R5, R6
    y_sparse = np.maximum(yKV @ params.encoder_v, 0)  # B h T N  R7
    merged = (x_sparse * y_sparse).transpose(0, 2, 1, 3).reshape(B, T, -1)  # B T h*N  R7
    return layer_norm(x + layer_norm(merged @ params.decoder))  # R9, R10


def rope(v: Array, start: int) -> Array:
    """R4, phases as float32."""
    T, N = v.shape[-2:]
    turns = np.arange(start, start + T).astype(np.float32)[:, None] * table(N) % np.float32(1)
    angle = (2 * np.pi * turns).astype(v.dtype)  # T N
    swapped = np.stack((-v[..., 1::2], v[..., 0::2]), axis=-1).reshape(v.shape)
    return v * np.cos(angle) + swapped * np.sin(angle)


table = cache(frequencies)


def attend(rotated: Array, v: Array) -> Array:
    """R5: all scores, then the mask."""
    return np.tril(rotated @ rotated.swapaxes(-1, -2), k=-1) @ v
