"""R1 to R13 in MLX: the equations under the specification's names and in its order, and the module that holds the weights.

Axes: B batch, T time, h head (nh of them), N neurons per head, D embedding width, V vocabulary.
Nothing in here evaluates an array, except ``generate``, which has to know a token before it can read it, and ``load_weights``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.nn.layers import embedding
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten

from bdh_mlx import weights
from bdh_mlx.rope import rope, rotation, table_of
from bdh_spec.checks import check_targets, check_tokens
from bdh_spec.config import BDHConfig
from bdh_spec.errors import CapabilityError
from bdh_spec.model import EPS, IGNORE
from bdh_spec.params import INIT_STD, Params, shapes
from bdh_spec.rope import Phase
from bdh_spec.sampling import Sampling, check_length, sample, uniform

CHUNK = 256  # tokens of a prompt read at once: more and the scores (T, T) of a long one would outgrow memory


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


class RecurrentState(NamedTuple):
    """What a model remembers of a text (R13). A tree of arrays, so that ``mx.compile`` takes it as it is."""

    position: mx.array  # tokens read so far: uint64, no axes
    layers: tuple[mx.array, ...]  # L of B h N D, never narrower than float32


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
    x: mx.array, params: Params, cos: mx.array, sin: mx.array, memory: mx.array | None = None, keep: mx.array | float = 1.0
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
    xy_sparse = x_sparse * y_sparse * keep  # B h T N
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


def dropout(
    config: BDHConfig, tokens_shape: tuple[int, ...], dtype: mx.Dtype, key: mx.array | None = None
) -> list[mx.array | float]:
    """Fresh masks for one step of training, one (B, nh, T, N) per layer: 0, or 1/(1-p) where a value is kept (R8)."""
    if config.dropout == 0:
        return [1.0] * config.n_layer
    (B, T), kept = tokens_shape, 1 - config.dropout
    shape = (B, config.n_head, T, config.n_neurons)
    keys = [None] * config.n_layer if key is None else list(mx.random.split(key, config.n_layer))
    return [mx.random.bernoulli(kept, shape, key=k).astype(dtype) / kept for k in keys]


def merge_heads(xy_sparse: mx.array) -> mx.array:
    """Lay the heads side by side, head-major (R9)."""
    B, nh, T, N = xy_sparse.shape
    return xy_sparse.swapaxes(1, 2).reshape(B, T, nh * N)


def readout(x: mx.array, params: Params) -> mx.array:
    """Logits of the next token (R11)."""
    return x @ params.lm_head  # B T V


def run(
    tokens: mx.array,
    params: Params,
    config: BDHConfig,
    *,
    phase: Phase = "exact",
    keep: Sequence[mx.array | float] | None = None,
) -> tuple[mx.array, list[Stages]]:
    """All layers in parallel form: the last x (B, T, D) and what each layer computed."""
    cos, sin = rotation(0, tokens.shape[1], table_of(config), wide(params.encoder.dtype), phase)
    x, layers = embed(tokens, params), []
    for i in range(config.n_layer):
        layers.append(layer(x, params, cos, sin, keep=1.0 if keep is None else keep[i]))
        x = layers[-1].x
    return x, layers


def trace(tokens: mx.array, params: Params, config: BDHConfig, *, phase: Phase = "exact") -> dict[str, mx.array]:
    """Every stage of the parallel form by name, in the order of its computation."""
    x, layers = run(tokens, params, config, phase=phase)
    stages = {f"layers.{i}.{name}": value for i, kept in enumerate(layers) for name, value in kept._asdict().items()}
    return {"embed": embed(tokens, params), **stages, "logits": readout(x, params)}


def forward(
    tokens: mx.array,
    params: Params,
    config: BDHConfig,
    *,
    phase: Phase = "exact",
    keep: Sequence[mx.array | float] | None = None,
) -> mx.array:
    """The parallel form: tokens (B, T) to logits (B, T, V)."""
    x, _ = run(tokens, params, config, phase=phase, keep=keep)
    return readout(x, params)


def loss(logits: mx.array, targets: mx.array) -> mx.array:
    """Mean cross entropy in nats over the targets that are not ignored (R12)."""
    targets = targets.astype(mx.int32)  # MLX would compare -100 with bytes as the byte 156
    counted = targets != IGNORE
    at_target = mx.take_along_axis(log_softmax(logits), mx.where(counted, targets, 0)[..., None], axis=-1)[..., 0]
    return -mx.where(counted, at_target, 0).sum() / counted.sum()


def log_softmax(logits: mx.array) -> mx.array:
    """Log-probabilities over the last axis, in at least float32."""
    shifted = widen(logits) - mx.stop_gradient(widen(logits).max(-1, keepdims=True))
    exponentials = mx.expm1(shifted) + 1  # mx.exp is no better than float32 on float64 arrays
    return shifted - mx.log(exponentials.sum(-1, keepdims=True))


def init_state(batch: int, config: BDHConfig, dtype: mx.Dtype = mx.float32) -> RecurrentState:
    """The state before the first token: zeros."""
    shape = (batch, config.n_head, config.n_neurons, config.n_embd)
    return RecurrentState(mx.array(0, dtype=mx.uint64), tuple(mx.zeros(shape, wide(dtype)) for _ in range(config.n_layer)))


def advance(
    state: RecurrentState, tokens: mx.array, params: Params, config: BDHConfig, *, phase: Phase = "exact"
) -> tuple[mx.array, RecurrentState]:
    """Read tokens (B, T) after the text that the state remembers: their logits (B, T, V), and the state after them (R13).

    T = 1 is the recurrent form, a larger T the chunked one; both compute what ``forward`` computes on the whole text.
    """
    T = tokens.shape[1]
    cos, sin = rotation(state.position, T, table_of(config), wide(params.encoder.dtype), phase)
    x, memories = embed(tokens, params), []
    for memory in state.layers:
        stages = layer(x, params, cos, sin, memory)
        memories.append(write(memory, stages.rotated, x))
        x = stages.x
    return readout(x, params), RecurrentState(state.position + T, tuple(memories))


@lru_cache(maxsize=16)
def reader(config: BDHConfig, phase: Phase, device: mx.DeviceType) -> Any:
    """``advance`` for this model: on a GPU compiled, which fuses the update of a state into one pass over it.

    Not on a CPU, where MLX hands every new kernel to a C++ compiler for a second, if it finds one.
    """
    plain = partial(advance, config=config, phase=phase)
    return mx.compile(plain) if device == mx.gpu else plain


def read_on(held: list[RecurrentState], tokens: mx.array, params: Params, config: BDHConfig, *, phase: Phase) -> mx.array:
    """``advance`` over tokens of any length, evaluated chunk by chunk: the logits; ``held`` then holds the new state.

    Each state is written over the one before it, which is why ``held`` is a list: a state that the caller still holds
    elsewhere stays intact, since MLX reuses no buffer that somebody can see.
    """
    step = reader(config, phase, mx.default_device().type)
    state, logits = held.pop(), []
    for start in range(0, tokens.shape[1], CHUNK):
        part, state = step(state, tokens[:, start : start + CHUNK], params)
        mx.eval(part, state)
        logits.append(part)
    held.append(state)
    return mx.concatenate(logits, axis=1)


class Embedding(embedding.Embedding):
    """MLX's own, which does not let itself be quantized alone."""

    def to_quantized(self, *_: Any, **__: Any) -> Any:
        """A refusal: all that ``nn.quantize`` finds in a BDH is this table, and a BDH reads it as numbers."""
        raise CapabilityError(
            "nn.quantize would pack the embedding of a BDH, which is read as numbers, and nothing else of it:"
            " load the model in bfloat16 or float16"
        )


class BDH(Module):
    """A Baby Dragon Hatchling, for ``nn.value_and_grad``, ``mlx.optimizers`` and ``mx.compile``.

    Its parameters are the five weights and nothing else: frequencies are its configuration's. Dropout acts in training mode
    (``train()``, in which a module of MLX begins) on ``model(idx)`` and ``model(idx, targets)``; ``advance`` and ``generate``
    never drop.
    """

    def __init__(self, config: BDHConfig, *, phase: Phase = "exact") -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # MLX leaves it untyped
        self.config, self.phase = config, phase
        shape = shapes(config)
        self.embed = Embedding(*shape.embed)
        self.embed.weight = mx.random.normal(shape.embed, scale=INIT_STD)
        self.encoder = mx.random.normal(shape.encoder, scale=INIT_STD)
        self.encoder_v = mx.random.normal(shape.encoder_v, scale=INIT_STD)
        self.decoder = mx.random.normal(shape.decoder, scale=INIT_STD)
        self.lm_head = mx.random.normal(shape.lm_head, scale=INIT_STD)

    def params(self) -> Params:
        """The weights as they are now, under the specification's names."""
        return Params(self.embed.weight, self.encoder, self.encoder_v, self.decoder, self.lm_head)

    def __call__(self, idx: mx.array, targets: mx.array | None = None) -> tuple[mx.array, mx.array | None]:
        """Logits (B, T, V), and the mean cross entropy (R12) where targets (B, T) are given.

        Stays lazy, so the ids themselves are not looked at: one outside the vocabulary reads what it should not.
        """
        tokens = check_tokens(_blank(idx), self.config)
        keep = dropout(self.config, idx.shape, self.encoder.dtype) if self.training else None
        logits = forward(idx, self.params(), self.config, phase=self.phase, keep=keep)
        if targets is None:
            return logits, None
        check_targets(_blank(targets), tokens, self.config)
        return logits, loss(logits, targets)

    def init_state(self, batch: int = 1) -> RecurrentState:
        """The state before the first token of ``batch`` texts."""
        return init_state(batch, self.config, self.encoder.dtype)

    def advance(self, state: RecurrentState, idx: mx.array) -> tuple[mx.array, RecurrentState]:
        """Read idx (B, T) after the text that the state remembers: their logits (B, T, V), and the state after them (R13)."""
        check_tokens(_blank(idx), self.config)
        return advance(state, idx, self.params(), self.config, phase=self.phase)

    def generate(
        self,
        idx: mx.array,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> mx.array:
        """The prompt (B, T) and its continuation, (B, T + max_new_tokens).

        One seed gives one text (R14), the same as from every other port. Without a seed the text is a new one each time, by
        MLX's own generator, so that ``mx.random.seed`` makes it come again.
        """
        check_length(max_new_tokens)
        how = Sampling(temperature, top_k, fresh_seed() if seed is None else seed)
        text = unread = check_tokens(idx.tolist(), self.config)
        held, params = [self.init_state(text.shape[0])], self.params()
        for _ in range(max_new_tokens):
            logits = _last(read_on(held, mx.array(unread), params, self.config, phase=self.phase))
            chosen = [sample(row, uniform(how.seed, text.shape[1], b), how) for b, row in enumerate(logits)]
            unread = np.array(chosen)[:, None]
            text = np.concatenate([text, unread], axis=1)
        return mx.array(text, dtype=mx.int32)

    def load_weights(self, file_or_weights: str | Path | Sequence[tuple[str, mx.array]], strict: bool = True) -> BDH:
        """Take the weights of a ``.safetensors`` or ``.npz`` file, or of a list of names and arrays.

        Knows what the older MLX port and its trainer wrote. Frequencies that they trained become those of ``config``, and the
        model computes by them, with an ``OwnFrequenciesWarning``; an unused gate is left out. ``strict=False`` lets weights be
        missing or unknown. All weights are evaluated then, so that any thread may use them; elsewhere, evaluate what you hand
        to another thread.
        """
        found = weights.load(file_or_weights) if isinstance(file_or_weights, (str, Path)) else dict(file_or_weights)
        chosen, freqs = weights.select(found, self.config, strict)
        super().load_weights(list(chosen.items()), strict=False)
        self.config = replace(self.config, freqs=freqs)
        mx.eval(self.params())
        return self

    def save_weights(self, file: str | Path) -> None:
        """Write a ``.safetensors`` file that says what model it is, or an ``.npz``, which cannot."""
        weights.save(file, dict(tree_flatten(self.parameters())), self.config)  # type: ignore[no-untyped-call]  # likewise


def fresh_seed() -> int:
    """A seed from MLX's own generator."""
    high, low = (int(np.array(mx.random.randint(0, 2**31 - 1))) for _ in range(2))
    return high << 31 | low


def _blank(ids: mx.array) -> Any:
    """What can be known of an array without evaluating it, as an array that can be checked."""
    return np.zeros(ids.shape, np.int64 if mx.issubdtype(ids.dtype, mx.integer) else np.float32)


def _last(logits: mx.array) -> Any:
    return np.array(widen(logits[:, -1]))  # B V
