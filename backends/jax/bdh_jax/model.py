"""R1 to R13: pure functions over a pytree of five weights, in the specification's order.

Axes: B batch, T time, h head (nh of them), N neurons per head, D embedding width, V vocabulary.
Activations have the dtype of the weights. Sums, norms, the state and the logits are never narrower than float32.
``config`` and ``phase`` are static: ``jax.jit(forward, static_argnames=("config", "phase"))``.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from bdh_jax.rope import Array, later, rope, rotation, words
from bdh_spec.config import BDHConfig
from bdh_spec.model import EPS, IGNORE, frequencies_of
from bdh_spec.params import INIT_STD, Params, shapes
from bdh_spec.rope import Phase

PARALLEL = 1024  # tokens up to which scores (T, T) cost less than a state
CHUNK = 256  # tokens read at once beyond that
SAVED = ("scores", "attention", "decoded")  # what a gradient keeps of each layer: the tensors without an N axis


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


class RecurrentState(NamedTuple):
    """What a model remembers of a text (R13)."""

    position: Array  # tokens read so far: uint32 (2,), high word first
    layers: Array  # L B h N D, never narrower than float32


def init(config: BDHConfig, key: Array, dtype: Any = jnp.float32) -> Params:
    """Fresh weights, normal with standard deviation 0.02."""
    keys = jax.random.split(key, len(Params._fields))
    return Params(*(INIT_STD * jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes(config), strict=True)))


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
    y = layer_norm(decoded).astype(dtype)
    return Stages(x_sparse, rotated, similar, attention, yKV, y_sparse, xy_sparse, decoded, y, layer_norm(x + y).astype(dtype))


def saved(x: Array, name: str) -> Array:
    """x, named for the policy of ``run``."""
    return checkpoint_name(x, name)  # type: ignore[no-untyped-call]  # JAX leaves it untyped


def dropout(config: BDHConfig, tokens_shape: tuple[int, ...], dtype: Any, key: Array) -> Array:
    """A fresh mask (B, nh, T, N) for one layer in training: 0, or 1/(1-p) where a value is kept (R8)."""
    (B, T), kept = tokens_shape, 1 - config.dropout
    return jax.random.bernoulli(key, jnp.float32(kept), (B, config.n_head, T, config.n_neurons)).astype(dtype) / kept


def merge_heads(xy_sparse: Array) -> Array:
    """Lay the heads side by side, head-major (R9)."""
    B, nh, T, N = xy_sparse.shape
    return xy_sparse.swapaxes(1, 2).reshape(B, T, nh * N)


def readout(x: Array, params: Params) -> Array:
    """Logits of the next token (R11)."""
    return product(x, params.lm_head)  # B T V


def run(tokens: Array, params: Params, config: BDHConfig, *, phase: Phase = "exact", key: Array | None = None) -> Array:
    """The last x (B, T, D). One compiled body serves all layers; ``key`` switches dropout on."""
    whole_text = at_once if tokens.shape[1] <= PARALLEL else in_chunks
    body = jax.checkpoint(
        partial(whole_text, params=params, config=config, phase=phase),
        policy=jax.checkpoint_policies.save_only_these_names(*SAVED),
        prevent_cse=False,  # a scan already keeps the recomputation apart
    )
    keys = None if key is None or config.dropout == 0 else jax.random.split(key, config.n_layer)
    return lax.scan(lambda x, key: (body(x, key), None), embed(tokens, params), keys, length=config.n_layer)[0]


def at_once(x: Array, key: Array | None, params: Params, config: BDHConfig, phase: Phase) -> Array:
    """A layer in parallel form, x (B, T, D) to x."""
    cos, sin = rotation(words(0), x.shape[1], frequencies_of(config), wide(x.dtype), phase)
    keep = 1.0 if key is None else dropout(config, x.shape[:2], x.dtype, key)
    return layer(x, params, cos, sin, keep=keep).x


def in_chunks(x: Array, key: Array | None, params: Params, config: BDHConfig, phase: Phase) -> Array:
    """A layer in chunked form, x (B, T, D) to x: the text is read through a state, and no tensor has two axes T."""
    B, T, D = x.shape
    chunks, rest = jnp.split(x, [T // CHUNK * CHUNK], axis=1)
    keys = None if key is None else jax.random.split(key, T // CHUNK + 1)

    def step(state: RecurrentState, part: tuple[Array, Array | None]) -> tuple[RecurrentState, Array]:
        chunk, key = part
        cos, sin = rotation(state.position, chunk.shape[1], frequencies_of(config), wide(x.dtype), phase)
        keep = 1.0 if key is None else dropout(config, chunk.shape[:2], x.dtype, key)
        stages = layer(chunk, params, cos, sin, state.layers, keep)
        return RecurrentState(later(state.position, CHUNK), write(state.layers, stages.rotated, chunk)), stages.x

    start = RecurrentState(words(0), jnp.zeros((B, config.n_head, config.n_neurons, D), wide(x.dtype)))
    stacked = chunks.reshape(B, -1, CHUNK, D).swapaxes(0, 1)
    state, done = lax.scan(jax.checkpoint(step, prevent_cse=False), start, (stacked, None if keys is None else keys[:-1]))
    whole = done.swapaxes(0, 1).reshape(B, -1, D)
    if rest.shape[1] == 0:
        return whole
    return jnp.concatenate([whole, step(state, (rest, None if keys is None else keys[-1]))[1]], axis=1)


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


def forward(tokens: Array, params: Params, config: BDHConfig, *, phase: Phase = "exact") -> Array:
    """Tokens (B, T) to logits (B, T, V): all at once, or beyond 1024 tokens in chunks, so that time stays linear.

    >>> config = BDHConfig(n_layer=2, n_embd=8, n_head=2, mlp_internal_dim_multiplier=2)
    >>> forward(jnp.zeros((1, 3), int), init(config, jax.random.key(0)), config).shape
    (1, 3, 256)
    """
    return readout(run(tokens, params, config, phase=phase), params)


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
    state: RecurrentState, tokens: Array, params: Params, config: BDHConfig, *, phase: Phase = "exact"
) -> tuple[Array, RecurrentState]:
    """Read tokens (B, T) after the text that the state remembers: their logits (B, T, V), and the state after them (R13).

    T = 1 is the recurrent form, a larger T the chunked one; both compute what ``forward`` computes on the whole text.
    Under ``jax.jit(..., donate_argnums=0)`` the state is updated in place.
    """
    T = tokens.shape[1]
    cos, sin = rotation(state.position, T, frequencies_of(config), wide(params.encoder.dtype), phase)

    def step(x: Array, memory: Array) -> tuple[Array, tuple[Array, Array]]:
        stages = layer(x, params, cos, sin, memory)
        return stages.x, (stages.rotated, x)

    x, (rotated, read_from) = lax.scan(step, embed(tokens, params), state.layers)
    # Written after all layers have read: one pass in place, where a loop that does both would copy the whole state.
    layers = jax.vmap(write)(state.layers, rotated, read_from)
    return readout(x, params), RecurrentState(later(state.position, T), layers)
