"""R11 to R13: pure functions over a pytree of five weights, in the specification's order.

Axes: B batch, T time, h head (nh of them), N neurons per head, D embedding width, V vocabulary.
Activations have the dtype of the weights. Sums, norms, the state and the logits are never narrower than float32.
``config`` and ``phase`` are static: ``jax.jit(forward, static_argnames=("config", "phase"))``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bdh_jax.forms import Kernel, chunk, streams
from bdh_jax.layer import Stages, dropout, embed, layer, product, residual, saved, wide, write
from bdh_jax.rope import Array, later, rotation, words
from bdh_jax.streamed import gated
from bdh_spec.config import BDHConfig
from bdh_spec.model import IGNORE, frequencies_of
from bdh_spec.params import INIT_STD, Params, shapes
from bdh_spec.rope import Phase

SAVED = ("scores", "attention", "decoded")  # what a gradient keeps of each layer: the tensors without an N axis


class RecurrentState(NamedTuple):
    """What a model remembers of a text (R13)."""

    position: Array  # tokens read so far: uint32 (2,), high word first
    layers: Array  # L B h N D, never narrower than float32


def init(config: BDHConfig, key: Array, dtype: Any = jnp.float32) -> Params:
    """Fresh weights, normal with standard deviation 0.02."""
    keys = jax.random.split(key, len(Params._fields))
    return Params(*(INIT_STD * jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes(config), strict=True)))


def readout(x: Array, params: Params) -> Array:
    """Logits of the next token (R11)."""
    return product(x, params.lm_head)  # B T V


def run(
    tokens: Array,
    params: Params,
    config: BDHConfig,
    *,
    phase: Phase = "exact",
    key: Array | None = None,
    kernel: Kernel | None = None,
) -> Array:
    """The last x (B, T, D). One compiled body serves all layers; ``key`` switches dropout on."""
    by_heads = streams(kernel, tokens.shape, config)
    length = chunk(tokens.shape[1]) if by_heads else tokens.shape[1]
    turn = rotation(words(0), length, frequencies_of(config), wide(params.encoder.dtype), phase)

    def at_once(x: Array, key: Array | None) -> Array:
        keep = 1.0 if key is None else dropout(config, x.shape[:2], x.dtype, key)
        return layer(x, params, *turn, keep=keep).x

    def streamed(x: Array, key: Array | None) -> Array:
        return residual(x, saved(gated(x, params, config, phase, turn, key), "decoded"))[1]

    body = jax.checkpoint(
        streamed if by_heads else at_once,
        policy=jax.checkpoint_policies.save_only_these_names(*SAVED),
        prevent_cse=False,  # a scan already keeps the recomputation apart
    )
    keys = None if key is None or config.dropout == 0 else jax.random.split(key, config.n_layer)
    return lax.scan(lambda x, key: (body(x, key), None), embed(tokens, params), keys, length=config.n_layer)[0]


def trace(tokens: Array, params: Params, config: BDHConfig, *, phase: Phase = "exact") -> dict[str, Array]:
    """Every stage of the parallel form by name, in the order of its computation."""
    cos, sin = rotation(words(0), tokens.shape[1], frequencies_of(config), wide(params.encoder.dtype), phase)
    first = embed(tokens, params)

    def step(x: Array, _: None) -> tuple[Array, Stages]:
        stages = layer(x, params, cos, sin)
        return stages.x, stages

    x, layers = lax.scan(step, first, length=config.n_layer)
    stages = [first, *(value[i] for i in range(config.n_layer) for value in layers), readout(x, params)]
    return dict(zip(stage_names(config), stages, strict=True))


def stage_names(config: BDHConfig) -> list[str]:
    """The names of a trace in the order of their computation, which jit forgets: it sorts a dictionary."""
    return ["embed", *(f"layers.{i}.{name}" for i in range(config.n_layer) for name in Stages._fields), "logits"]


def forward(tokens: Array, params: Params, config: BDHConfig, *, phase: Phase = "exact", kernel: Kernel | None = None) -> Array:
    """Tokens (B, T) to logits (B, T, V): all at once, or beyond 1024 tokens in chunks, so that time stays linear.

    ``kernel`` chooses by name what is otherwise chosen by size: plain, or streamed, which never holds all neurons.

    >>> config = BDHConfig(n_layer=2, n_embd=8, n_head=2, mlp_internal_dim_multiplier=2)
    >>> forward(jnp.zeros((1, 3), int), init(config, jax.random.key(0)), config).shape
    (1, 3, 256)
    """
    return readout(run(tokens, params, config, phase=phase, kernel=kernel), params)


def loss(logits: Array, targets: Array) -> Array:
    """Mean cross entropy in nats over the targets that are not ignored (R12)."""
    counted = targets != IGNORE
    chosen = jnp.take_along_axis(log_softmax(logits), jnp.where(counted, targets, 0)[..., None], axis=-1)[..., 0]
    return -jnp.where(counted, chosen, 0).sum() / counted.sum()


def log_softmax(logits: Array) -> Array:
    """Log-probabilities over the last axis."""
    return jax.nn.log_softmax(logits)


def init_state(batch: int, config: BDHConfig, dtype: Any = jnp.float32) -> RecurrentState:
    """The state before the first token: zeros, for weights of ``dtype``."""
    shape = (config.n_layer, batch, config.n_head, config.n_neurons, config.n_embd)
    return RecurrentState(words(0), jnp.zeros(shape, wide(dtype)))


def advance(
    state: RecurrentState,
    tokens: Array,
    params: Params,
    config: BDHConfig,
    *,
    phase: Phase = "exact",
    count: Array | int | None = None,
) -> tuple[Array, RecurrentState]:
    """Read tokens (B, T) after the text that the state remembers: their logits (B, T, V), and the state after them (R13).

    T = 1 is the recurrent form, a larger T the chunked one; both compute what ``forward`` computes on the whole text.
    Under ``jax.jit(..., donate_argnums=0)`` the state is updated in place. ``count``, an ordinary value, says how many of the
    tokens there are: those beyond it only fill a shape, and the state never sees them.
    """
    T = tokens.shape[1]
    cos, sin = rotation(state.position, T, frequencies_of(config), wide(params.encoder.dtype), phase)

    def step(x: Array, memory: Array) -> tuple[Array, tuple[Array, Array]]:
        stages = layer(x, params, cos, sin, memory)
        return stages.x, (seen(stages.rotated), seen(x))

    def seen(x: Array) -> Array:
        return x if count is None else jnp.where(jnp.arange(T)[:, None] < count, x, 0)

    x, (rotated, read_from) = lax.scan(step, embed(tokens, params), state.layers)
    # Written after all layers have read: one pass in place, where a loop that does both would copy the whole state.
    layers = jax.vmap(write)(state.layers, rotated, read_from)
    return readout(x, params), RecurrentState(later(state.position, T if count is None else count), layers)
