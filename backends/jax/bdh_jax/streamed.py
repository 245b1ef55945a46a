"""One layer, R3 to R9, that never holds all neurons: heads one after the other, long texts in chunks.

The same function as ``layer.layer``, the form to read beside the specification. There arrays (B, nh, T, N) pass through
memory; here one head lives at a time, and of a long text one chunk. A gradient keeps of a head what has no axis N and computes
the rest again.

Axes: B batch, T time, N neurons per head, D embedding width, C tokens of a chunk.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bdh_jax.layer import layer_norm, mask, product, read, relu, saved, scores, wide
from bdh_jax.rope import Array, rope, rotation, turned_on
from bdh_spec.config import BDHConfig
from bdh_spec.model import frequencies_of
from bdh_spec.params import Params
from bdh_spec.rope import Phase

SAVED = ("scores", "attention")  # what a gradient keeps of each head

Rotation: TypeAlias = tuple[Array, Array]  # cosine and sine, each (C, N)


class Head(NamedTuple):
    """The weights of one head, and the key of what it drops."""

    encoder: Array  # D N
    encoder_v: Array  # D N
    decoder: Array  # N D
    key: Array | None


class Chunk(NamedTuple):
    """Some tokens, the position of the first, how far that turns each neuron, and the key of what they drop."""

    x: Array  # B C D
    start: Array
    shift: Rotation  # 1 N
    key: Array | None


def gated(x: Array, params: Params, config: BDHConfig, phase: Phase, local: Rotation, key: Array | None = None) -> Array:
    """x (B, T, D) to what the decoder returns, (B, T, D) and at least float32: all of a layer but its last two norms.

    ``local`` is the rotation of the first tokens, as many as ``forms.chunk`` says.
    """
    keys = None if key is None else jax.random.split(key, config.n_head)
    heads = Head(params.encoder, params.encoder_v, params.decoder.reshape(config.n_head, config.n_neurons, -1), keys)
    reading = whole if x.shape[1] == len(local[0]) else in_chunks
    body = jax.checkpoint(
        partial(reading, config=config, phase=phase, local=local),
        policy=jax.checkpoint_policies.save_only_these_names(*SAVED),
        prevent_cse=False,
    )
    first = jnp.zeros(x.shape, wide(x.dtype))
    return lax.scan(lambda decoded, head: (decoded + body(x, head), None), first, heads)[0]


def whole(x: Array, head: Head, config: BDHConfig, phase: Phase, local: Rotation) -> Array:
    """What the decoder makes of one head, in parallel form: x (B, T, D) to (B, T, D)."""
    return read_head(x, head, config, local, None, head.key)[0]


def in_chunks(x: Array, head: Head, config: BDHConfig, phase: Phase, local: Rotation) -> Array:
    """The same in chunked form: the text is read through a state, and no tensor has two axes T."""
    (B, T, D), C = x.shape, len(local[0])
    n = -(-T // C)
    stacked = jnp.pad(x, ((0, 0), (0, n * C - T), (0, 0))).reshape(B, n, C, D).swapaxes(0, 1)
    starts = jnp.asarray(np.array([[0, c * C] for c in range(n)], np.uint32))
    table, dtype = frequencies_of(config), wide(x.dtype)
    shifts = jax.vmap(lambda start: rotation(start, 1, table, dtype, "exact"))(starts)
    keys = None if head.key is None else jax.random.split(head.key, n)

    def step(memory: Array, chunk: Chunk) -> tuple[Array, Array]:
        # A phase that is rounded at each position is no sum of two.
        turn = turned_on(local, chunk.shift) if phase == "exact" else rotation(chunk.start, C, table, dtype, phase)
        decoded, rotated = read_head(chunk.x, head, config, turn, memory, chunk.key)
        return memory + product(rotated.swapaxes(-1, -2), chunk.x), decoded  # R13

    memory = jnp.zeros((B, config.n_neurons, D), dtype)
    chunks = Chunk(stacked, starts, shifts, keys)
    _, decoded = lax.scan(jax.checkpoint(step, prevent_cse=False), memory, chunks)
    return decoded.swapaxes(0, 1).reshape(B, n * C, D)[:, :T]


def read_head(
    x: Array, head: Head, config: BDHConfig, turn: Rotation, memory: Array | None, key: Array | None
) -> tuple[Array, Array]:
    """What the decoder makes of one head, (B, C, D), and its neurons as they were turned, (B, C, N)."""
    dtype = x.dtype
    x_sparse = relu(product(x, head.encoder)).astype(dtype)  # B C N  R3
    rotated = rope(x_sparse, *turn).astype(dtype)  # R4
    attention = product(saved(scores(rotated), "scores"), x)  # B C D  R5
    if memory is not None:
        attention = attention + read(memory, rotated)
    yKV = layer_norm(saved(attention, "attention")).astype(dtype)  # R6
    xy_sparse = (x_sparse * relu(product(yKV, head.encoder_v)).astype(dtype)).astype(dtype)  # R7
    if key is not None:
        xy_sparse = (xy_sparse * mask(key, xy_sparse.shape, config, dtype)).astype(dtype)  # R8
    return product(xy_sparse, head.decoder), rotated  # R9: heads add up
