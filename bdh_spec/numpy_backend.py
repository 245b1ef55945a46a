"""The specification as a port of itself."""

from __future__ import annotations

from typing import Any

import numpy as np

from bdh_spec import model
from bdh_spec.config import BDHConfig
from bdh_spec.dtypes import WIDE
from bdh_spec.gradients import gradients
from bdh_spec.int8 import widened
from bdh_spec.model import RecurrentState
from bdh_spec.optimizer import AdamW, Moments, OptimizerState, begin, dropout_seed, update
from bdh_spec.params import Array, Params, cast
from bdh_spec.protocol import VERBS, Backend, Batch, Capabilities, Model
from bdh_spec.rope import Phase

CHUNK = 256  # tokens read at once: more and the scores (T, T) of a long prompt would outgrow memory


class NumpyModel(Model):
    """The specification behind the protocol."""

    def __init__(self, params: Params, config: BDHConfig, *, device: str, dtype: str, phase: Phase) -> None:
        super().__init__(config, device=device, dtype=dtype, phase=phase)
        params = widened(params, dtype)  # R17
        self._params = Params(*(weight.copy() for weight in cast(params, dtype)))

    def params(self) -> Params:
        return Params(*(weight.copy() for weight in self._params))

    def _forward(self, tokens: Array) -> Array:
        return model.forward(tokens, self._params, self.config, phase=self.phase)

    def _forward_padded(self, tokens: Array, lengths: Array) -> Array:
        logits = np.zeros((*tokens.shape, self.config.vocab_size), self.dtype)
        for b, start in enumerate(tokens.shape[1] - lengths):
            logits[b, start:] = self._forward(tokens[b : b + 1, start:])[0]
        return logits

    def _init_state(self, batch: int) -> RecurrentState:
        return model.init_state(batch, self.config, np.dtype(self.dtype))

    def _advance(self, native: Any, position: int, tokens: Array, donate: bool) -> tuple[Array, Any]:
        logits = []
        for start in range(0, tokens.shape[1], CHUNK):
            chunk = tokens[:, start : start + CHUNK]
            part, native = model.advance(native, chunk, self._params, self.config, phase=self.phase)
            logits.append(part)
        return np.concatenate(logits, axis=1), native

    def _loss(self, tokens: Array, targets: Array) -> float:
        return model.loss(self._forward(tokens), targets)

    def _gradients(self, tokens: Array, targets: Array) -> tuple[float, Params]:
        return gradients(tokens, targets, self._params, self.config, phase=self.phase)

    def _trace(self, tokens: Array) -> dict[str, Array]:
        return model.trace(tokens, self._params, self.config, phase=self.phase)

    def _export_state(self, native: Any) -> tuple[Array, ...]:
        return tuple(memory.copy() for memory in native.layers)

    def _import_state(self, state: RecurrentState) -> RecurrentState:
        return RecurrentState(state.position, tuple(memory.astype(self.dtype) for memory in state.layers))

    def _optimizer(self, settings: AdamW) -> Moments:
        return begin(self._params, settings)

    def _train_step(self, native: Any, batches: list[Batch], rate: float) -> float:
        loss_before, slopes = self._slopes(native, batches)
        update(self._params, slopes, native, rate)
        return loss_before

    def _slopes(self, moments: Moments, batches: list[Batch]) -> tuple[float, Params]:
        """The loss of a step and its slopes: each batch counts by its share of the targets."""
        value, total = 0.0, Params(*(np.zeros_like(weight) for weight in self._params))
        for part, (tokens, targets, share) in enumerate(batches):
            rng = np.random.default_rng(dropout_seed(moments.settings.seed, moments.step + 1, part))
            keep = model.dropout(self.config, tokens.shape, np.dtype(self.dtype), rng)
            loss, slopes = gradients(tokens, targets, self._params, self.config, phase=self.phase, keep=keep)
            value, total = value + share * loss, Params(*(t + share * g for t, g in zip(total, slopes, strict=True)))
        return value, total

    def _export_optimizer(self, native: Any) -> OptimizerState:
        first, second = (Params(*map(np.copy, held)) for held in (native.first, native.second))
        return OptimizerState(native.settings, native.step, first, second)

    def _import_optimizer(self, state: OptimizerState) -> Moments:
        first, second = ([m.astype(self.dtype) for m in held] for held in (state.first, state.second))
        return Moments(state.settings, first, second, state.step)


class NumpyBackend(Backend):
    """The port named ``numpy``."""

    name = "numpy"
    capabilities = Capabilities(dtypes=WIDE, verbs=VERBS)

    def version(self) -> str:
        return f"numpy {np.__version__}"

    def devices(self) -> tuple[str, ...]:
        return ("cpu",)

    def _load(self, params: Params, config: BDHConfig, *, device: str, dtype: str, phase: Phase) -> Model:
        return NumpyModel(params, config, device=device, dtype=dtype, phase=phase)
