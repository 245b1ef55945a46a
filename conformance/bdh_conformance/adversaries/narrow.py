"""NumPy ports of narrow weights: an honest one, and those that lose what rounding takes off (R16)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from bdh_conformance.yardstick.reference import Rounding
from bdh_spec import BDHConfig, Capabilities, Model, OptimizerState, Params
from bdh_spec.numpy_backend import NumpyBackend
from bdh_spec.params import Array, cast
from bdh_spec.protocol import Batch
from bdh_spec.rope import Phase

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


def rounded(values: Array, dtype: np.dtype[Any]) -> Array:
    return values.astype(dtype).astype(values.dtype)


class NarrowBackend(NumpyBackend):
    """The honest one."""

    name = "narrow"
    capabilities = Capabilities(DTYPES, verbs=NumpyBackend.capabilities.verbs)

    def _load(self, params: Params, config: BDHConfig, *, device: str, dtype: str, phase: Phase) -> Model:
        return Narrow(params, config, device=device, dtype=dtype, phase=phase)
