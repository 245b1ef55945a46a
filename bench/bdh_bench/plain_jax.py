"""The plain form in JAX: SPEC.md's rules one after another, whole arrays. Run as it is, or under ``jax.jit``."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bdh_spec import BDHConfig
from bdh_spec.model import EPS, IGNORE
from bdh_spec.params import Params
from bdh_spec.rope import frequencies

Array = jax.Array
Memories = tuple[Array, ...]  # L of B h N D


def forward(tokens: Array, params: Params, config: BDHConfig, key: Array | None = None) -> Array:
    """Tokens (B, T) to logits (B, T, V)."""
    x = embed(tokens, params)
    for i in range(config.n_layer):
        masks = None if key is None else jax.random.fold_in(key, i)
        x = layer(x, attend, params, jnp.uint32(0), config.dropout, masks)
    return x @ params.lm_head  # R11


def loss(params: Params, tokens: Array, targets: Array, config: BDHConfig, key: Array | None = None) -> Array:
    """Mean cross entropy in nats (R12)."""
    logits = forward(tokens, params, config, key).astype(jnp.float32)
    counted = targets != IGNORE
    chosen = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counted, targets, 0))
    return jnp.sum(chosen * counted) / counted.sum()


def train_step(
    params: Params, moments: Any, tokens: Array, targets: Array, key: Array, config: BDHConfig, rate: float
) -> tuple[Array, Params, Any]:
    """The loss, and weights and moments after a step of AdamW."""
    value, slopes = jax.value_and_grad(loss)(params, tokens, targets, config, key if config.dropout else None)
    moves, moments = optimizer(rate).update(slopes, moments, params)
    return value, optax.apply_updates(params, moves), moments


def optimizer(rate: float) -> optax.GradientTransformation:
    """R16 as the framework's users have it."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.1))


def prefill(tokens: Array, params: Params, config: BDHConfig) -> tuple[Array, Memories]:
    """Logits of a text (B, T), and the state after it (R13)."""
    x, memories = embed(tokens, params), []

    def attend_and_write(rotated: Array, v: Array) -> Array:
        memories.append(wide(rotated).swapaxes(-1, -2) @ wide(v))
        return attend(rotated, v)

    for _ in range(config.n_layer):
        x = layer(x, attend_and_write, params, jnp.uint32(0))
    return x @ params.lm_head, tuple(memories)


def step(tokens: Array, memories: Memories, position: Array, params: Params, config: BDHConfig) -> tuple[Array, Memories]:
    """One token (B, 1) of each text: its logits, and a new state (R13)."""
    x, after = embed(tokens, params), list[Array]()

    def read_and_write(rotated: Array, v: Array) -> Array:
        memory = memories[len(after)]
        after.append(memory + wide(rotated).swapaxes(-1, -2) @ wide(v))
        return wide(rotated) @ memory

    for _ in range(config.n_layer):
        x = layer(x, read_and_write, params, position)
    return x @ params.lm_head, tuple(after)


def embed(tokens: Array, params: Params) -> Array:
    """R1."""
    return layer_norm(params.embed[tokens]).astype(params.embed.dtype)


def layer_norm(x: Array) -> Array:
    """R2, in float32."""
    x = wide(x)
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + EPS)


def wide(x: Array) -> Array:
    """The same values as float32."""
    return x.astype(jnp.float32)


def layer(x: Array, attend: Any, params: Params, start: Array, dropout: float = 0.0, key: Array | None = None) -> Array:
    """R3 to R10 on x (B, T, D)."""
    B, T, _ = x.shape
    x_sparse = jax.nn.relu(x[:, None] @ params.encoder)  # B h T N  R3
    rotated = rope(x_sparse, start)  # R4
    yKV = layer_norm(attend(rotated, x[:, None])).astype(x.dtype)  # B h T D  R5, R6
    y_sparse = jax.nn.relu(yKV @ params.encoder_v)  # B h T N  R7
    xy_sparse = x_sparse * y_sparse
    if key is not None:
        xy_sparse *= jax.random.bernoulli(key, 1 - dropout, xy_sparse.shape).astype(x.dtype) / (1 - dropout)  # R8
    y = layer_norm(xy_sparse.swapaxes(1, 2).reshape(B, T, -1) @ params.decoder).astype(x.dtype)  # R9
    return layer_norm(x + y).astype(x.dtype)  # R10


def rope(v: Array, start: Array) -> Array:
    """R4, phases as float32."""
    T, N = v.shape[-2:]
    positions = (start + jnp.arange(T, dtype=jnp.uint32)).astype(jnp.float32)
    angle = 2 * jnp.pi * (positions[:, None] * table(N) % 1)  # T N
    swapped = jnp.stack((-v[..., 1::2], v[..., 0::2]), axis=-1).reshape(v.shape)
    return (v * jnp.cos(angle) + swapped * jnp.sin(angle)).astype(v.dtype)


table = cache(frequencies)


def attend(rotated: Array, v: Array) -> Array:
    """R5: all scores, then the mask."""
    return jnp.tril(rotated @ rotated.swapaxes(-1, -2), k=-1) @ v


SIZES = ("config",)
forward_compiled = partial(jax.jit, static_argnames=SIZES)(forward)
loss_compiled = partial(jax.jit, static_argnames=SIZES)(loss)
prefill_compiled = partial(jax.jit, static_argnames=SIZES)(prefill)
step_compiled = partial(jax.jit, static_argnames=SIZES)(step)
train_step_compiled = partial(jax.jit, static_argnames=(*SIZES, "rate"))(train_step)
