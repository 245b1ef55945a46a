"""R1 to R13: the equations, in the order in which a token meets them.

Axes: B batch, T time, h head (nh of them), N neurons per head, D embedding width, V vocabulary.
Every function runs in the dtype of the weights; the specification is the float64 run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from bdh_spec.config import BDHConfig
from bdh_spec.params import Array, Params
from bdh_spec.rope import Phase, frequencies, rope, rotation

EPS = 1e-5
IGNORE = -100  # targets of this value count for nothing


class Stages(NamedTuple):
    """What one layer computes, in order: the stages of a trace, and what its gradient needs."""

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


@dataclass(frozen=True)
class RecurrentState:
    """What a model remembers of a text (R13): its length and, per layer, one matrix per head."""

    position: int  # tokens read so far
    layers: tuple[Array, ...]  # L of B h N D, never narrower than float32

    @property
    def batch(self) -> int:
        return int(self.layers[0].shape[0])


def embed(tokens: Array, params: Params) -> Array:
    """Look the tokens up and normalise (R1)."""
    return layer_norm(params.embed[tokens])  # B T D


def layer_norm(x: Array) -> Array:
    """Centre and scale over the last axis: biased variance, eps inside the root, no affine (R2)."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + EPS)


def relu(x: Array) -> Array:
    """Keep what is positive."""
    return np.maximum(x, 0)


def scores(rotated: Array) -> Array:
    """Similarity of each token with strictly earlier ones: K is Q, no scale, no softmax (R5)."""
    return np.tril(rotated @ rotated.swapaxes(-1, -2), k=-1)  # B h T T


def read(memory: Array, rotated: Array) -> Array:
    """What the state holds for these queries (R13)."""
    return rotated @ memory  # B h T D


def write(memory: Array, rotated: Array, x: Array) -> Array:
    """The state after these tokens (R13)."""
    return memory + rotated.swapaxes(-1, -2) @ x[:, None]  # B h N D


def frequencies_of(config: BDHConfig) -> Array:
    """Turns per token of each neuron of a model (N,): its own table if it brings one, or else the normative one."""
    return frequencies(config.n_neurons) if config.freqs is None else config.freqs.array


def layer(x: Array, params: Params, cos: Array, sin: Array, memory: Array | None = None, keep: Array | float = 1.0) -> Stages:
    """Run one layer on x (B, T, D).

    ``memory`` is the layer's state before these tokens, absent at the start of a text. ``keep`` is the dropout mask of
    training, already divided by its probability (R8).
    """
    x_sparse = relu(x[:, None] @ params.encoder)  # B h T N
    rotated = rope(x_sparse, cos, sin)  # B h T N
    similar = scores(rotated)  # B h T T
    attention = similar @ x[:, None]  # B h T D
    if memory is not None:
        attention = attention + read(memory, rotated)
    yKV = layer_norm(attention)  # B h T D
    y_sparse = relu(yKV @ params.encoder_v)  # B h T N
    xy_sparse = x_sparse * y_sparse * keep  # B h T N
    decoded = merge_heads(xy_sparse) @ params.decoder  # B T D
    y = layer_norm(decoded)
    return Stages(x_sparse, rotated, similar, attention, yKV, y_sparse, xy_sparse, decoded, y, layer_norm(x + y))


def dropout(config: BDHConfig, tokens_shape: tuple[int, ...], dtype: np.dtype[Any], rng: np.random.Generator) -> list[Array]:
    """Fresh masks for one step of training, one (B, nh, T, N) per layer: 0, or 1/(1-p) where a value is kept (R8)."""
    (B, T), kept = tokens_shape, 1 - config.dropout
    shape = (B, config.n_head, T, config.n_neurons)
    return [(rng.random(shape) < kept).astype(dtype) / dtype.type(kept) for _ in range(config.n_layer)]


def merge_heads(xy_sparse: Array) -> Array:
    """Lay the heads side by side, head-major (R9)."""
    B, nh, T, N = xy_sparse.shape
    return xy_sparse.swapaxes(1, 2).reshape(B, T, nh * N)


def readout(x: Array, params: Params) -> Array:
    """Logits of the next token (R11)."""
    return x @ params.lm_head  # B T V


def run(
    tokens: Array, params: Params, config: BDHConfig, *, phase: Phase = "exact", keep: Sequence[Array] | None = None
) -> tuple[Array, list[Stages]]:
    """All layers in parallel form: the last x (B, T, D) and what each layer computed."""
    cos, sin = rotation(0, tokens.shape[1], frequencies_of(config), params.encoder.dtype, phase)
    x, layers = embed(tokens, params), []
    for i in range(config.n_layer):
        layers.append(layer(x, params, cos, sin, keep=1.0 if keep is None else keep[i]))
        x = layers[-1].x
    return x, layers


def trace(tokens: Array, params: Params, config: BDHConfig, *, phase: Phase = "exact") -> dict[str, Array]:
    """Every stage of the parallel form by name, in the order of its computation."""
    x, layers = run(tokens, params, config, phase=phase)
    stages = {f"layers.{i}.{name}": value for i, kept in enumerate(layers) for name, value in kept._asdict().items()}
    return {"embed": embed(tokens, params), **stages, "logits": readout(x, params)}


def forward(tokens: Array, params: Params, config: BDHConfig, *, phase: Phase = "exact") -> Array:
    """The parallel form: tokens (B, T) to logits (B, T, V)."""
    return trace(tokens, params, config, phase=phase)["logits"]


def loss(logits: Array, targets: Array) -> float:
    """Mean cross entropy in nats over the targets that are not ignored (R12)."""
    counted = targets != IGNORE
    return float(-log_softmax(logits[counted])[np.arange(counted.sum()), targets[counted]].mean())


def log_softmax(logits: Array) -> Array:
    """Log-probabilities over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def init_state(batch: int, config: BDHConfig, dtype: DTypeLike = np.float32) -> RecurrentState:
    """The state before the first token: zeros."""
    shape = (batch, config.n_head, config.n_neurons, config.n_embd)
    return RecurrentState(0, tuple(np.zeros(shape, dtype) for _ in range(config.n_layer)))


def advance(
    state: RecurrentState, tokens: Array, params: Params, config: BDHConfig, *, phase: Phase = "exact"
) -> tuple[Array, RecurrentState]:
    """Read tokens (B, T) after the text that the state remembers: their logits (B, T, V), and the state after them (R13).

    T = 1 is the recurrent form, a larger T the chunked one; both compute what ``forward`` computes on the whole text.
    """
    T = tokens.shape[1]
    cos, sin = rotation(state.position, T, frequencies_of(config), params.encoder.dtype, phase)
    x, memories = embed(tokens, params), []
    for memory in state.layers:
        stages = layer(x, params, cos, sin, memory)
        memories.append(write(memory, stages.rotated, x))
        x = stages.x
    return readout(x, params), RecurrentState(state.position + T, tuple(memories))
