"""NumPy ports of narrow weights: an honest one, and those that lose what rounding takes off (R16)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from bdh_conformance.yardstick.reference import Rounding
from bdh_spec import BDHConfig, Capabilities, Model, OptimizerState, Params, RecurrentState
from bdh_spec.checks import check_tokens
from bdh_spec.numpy_backend import NumpyBackend
from bdh_spec.params import Array, cast
from bdh_spec.protocol import Batch, State, as_tokens
from bdh_spec.rope import Phase
from bdh_spec.sampling import Sampling, fresh_seed, probabilities, uniform

DTYPES = ("bfloat16", "float16")


class Narrow(Rounding):
    """Weights that are rounded, and everything else in float32."""

    def __init__(self, params: Params, config: BDHConfig, *, device: str, dtype: str, phase: Phase) -> None:
        super().__init__(cast(params, np.float32), config, phase, held=dtype)


class KeepsNoMasters(Narrow):
    """Starts each step from the rounded weights."""

    def _unrounded(self, native: Any) -> Params:
        return Params(*(weight.copy() for weight in self._params))


class LosesMasters(Narrow):
    """Writes down the rounded weights for those before rounding."""

    def _export_optimizer(self, native: Any) -> OptimizerState:
        return replace(super()._export_optimizer(native), masters=self.params())


class RoundsMoments(Narrow):
    """Keeps its moments in the weights' dtype."""

    def _train_step(self, native: Any, batches: list[Batch], rate: float) -> float:
        loss = super()._train_step(native, batches, rate)
        for moment in (*native.first, *native.second):
            moment[...] = rounded(moment, self.held)
        return loss


class RoundsState(Narrow):
    """Keeps its state in the weights' dtype, and not in float32 (R13)."""

    def _advance(self, native: Any, position: int, tokens: Array, donate: bool) -> tuple[Array, Any]:
        logits, state = super()._advance(native, position, tokens, donate)
        return logits, RecurrentState(state.position, tuple(rounded(memory, self.held) for memory in state.layers))


class DrawsNarrowly(Narrow):
    """Adds probabilities up in the weights' dtype."""

    def stream(
        self,
        prompt: str | bytes | Array,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
        *,
        state: State | None = None,
    ) -> Iterator[tuple[Array, State]]:
        how = Sampling(temperature, top_k, fresh_seed() if seed is None else seed)
        tokens = check_tokens(as_tokens(prompt), self.config)
        state = self.init_state(len(tokens)) if state is None else state
        for _ in range(max_new_tokens):
            logits, state = self.advance(state, tokens, donate=True)
            drawn = [self._draw(row, uniform(how.seed, state.position, b), how) for b, row in enumerate(logits[:, -1])]
            yield np.array(drawn), state
            tokens = np.array(drawn)[:, None]

    def _draw(self, logits: Array, draw: float, how: Sampling) -> int:
        if how.temperature == 0:
            return int(np.argmax(logits))
        sums = np.cumsum(probabilities(logits, how).astype(self.held)).astype(np.float64)
        return min(int(np.searchsorted(sums, draw * sums[-1], side="right")), logits.size - 1)


def rounded(values: Array, dtype: np.dtype[Any]) -> Array:
    return values.astype(dtype).astype(values.dtype)


class NarrowBackend(NumpyBackend):
    """The honest one."""

    name = "narrow"
    capabilities = Capabilities(DTYPES, verbs=NumpyBackend.capabilities.verbs)

    def _load(self, params: Params, config: BDHConfig, *, device: str, dtype: str, phase: Phase) -> Model:
        return Narrow(params, config, device=device, dtype=dtype, phase=phase)
