"""R11 to R13 in MLX: the equations under the specification's names and in its order, and the module that holds the weights.

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
from bdh_mlx.forms import CHUNK, Kernel, known, streams
from bdh_mlx.layer import Stages, dropout, embed, layer, layer_norm, wide, widen, write
from bdh_mlx.rope import rotation, table_of
from bdh_mlx.streamed import gated
from bdh_spec.checks import check_targets, check_tokens
from bdh_spec.config import BDHConfig
from bdh_spec.errors import CapabilityError
from bdh_spec.model import IGNORE
from bdh_spec.params import INIT_STD, Params, shapes
from bdh_spec.rope import Phase
from bdh_spec.sampling import Sampling, check_length, sample, uniform


class RecurrentState(NamedTuple):
    """What a model remembers of a text (R13). A tree of arrays, so that ``mx.compile`` takes it as it is."""

    position: mx.array  # tokens read so far: uint64, no axes
    layers: tuple[mx.array, ...]  # L of B h N D, never narrower than float32


def readout(x: mx.array, params: Params) -> mx.array:
    """Logits of the next token (R11)."""
    return x @ params.lm_head  # B T V


def run(
    tokens: mx.array,
    params: Params,
    config: BDHConfig,
    *,
    phase: Phase = "exact",
    keep: Sequence[mx.array | None] | None = None,
) -> tuple[mx.array, list[Stages]]:
    """All layers in parallel form: the last x (B, T, D) and what each layer computed."""
    cos, sin = rotation(0, tokens.shape[1], table_of(config), wide(params.encoder.dtype), phase)
    x, layers = embed(tokens, params), []
    for i in range(config.n_layer):
        layers.append(layer(x, params, cos, sin, keep=None if keep is None else keep[i]))
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
    key: mx.array | None = None,
    kernel: Kernel | None = None,
) -> mx.array:
    """Tokens (B, T) to logits (B, T, V): by the kernel of a name, or else the one for this size. ``key`` switches dropout on.

    Time and memory grow linearly with a long text.
    """
    if not streams(kernel, tokens, config):
        keep = None if key is None else dropout(config, tokens.shape, params.encoder.dtype, key)
        return readout(run(tokens, params, config, phase=phase, keep=keep)[0], params)
    x = embed(tokens, params)
    for k in [None] * config.n_layer if key is None or config.dropout == 0 else mx.random.split(key, config.n_layer):
        y = layer_norm(gated(x, params, config, phase, k)).astype(x.dtype)  # R9
        x = layer_norm(x + y).astype(x.dtype)  # R10
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
    return logits[0] if len(logits) == 1 else mx.concatenate(logits, axis=1)


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

    def __init__(self, config: BDHConfig, *, phase: Phase = "exact", kernel: Kernel | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # MLX leaves it untyped
        self.config, self.phase, self.kernel = config, phase, known(kernel)
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
        key = fresh_key() if self.training and self.config.dropout else None
        logits = forward(idx, self.params(), self.config, phase=self.phase, key=key, kernel=self.kernel)
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


def fresh_key() -> mx.array:
    """A key of dropout from MLX's own generator, so that ``mx.random.seed`` decides."""
    return mx.random.randint(-(2**31), 2**31, (2,), dtype=mx.int32).view(mx.uint32)


def fresh_seed() -> int:
    """A seed from MLX's own generator."""
    high, low = (int(np.array(mx.random.randint(0, 2**31 - 1))) for _ in range(2))
    return high << 31 | low


def _blank(ids: mx.array) -> Any:
    """What can be known of an array without evaluating it, as an array that can be checked."""
    return np.zeros(ids.shape, np.int64 if mx.issubdtype(ids.dtype, mx.integer) else np.float32)


def _last(logits: mx.array) -> Any:
    return np.array(widen(logits[:, -1]))  # B V
