"""The protocol's face of the MLX port: NumPy in, NumPy out, on a device."""

from __future__ import annotations

import os
from functools import partial
from importlib import metadata
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from bdh_mlx.device import computing_on
from bdh_mlx.forms import Kernel
from bdh_mlx.layer import wide, widen
from bdh_mlx.model import RecurrentState, forward, init_state, loss, read_on, trace
from bdh_mlx.optimizer import Moments, add, dropout_key, moments, unrounded, update
from bdh_mlx.parallel import MLXTeam, added, group, is_launched, summed
from bdh_spec.config import BDHConfig
from bdh_spec.dtypes import DTYPES
from bdh_spec.errors import CapabilityError
from bdh_spec.model import RecurrentState as ExportedState
from bdh_spec.optimizer import AdamW, OptimizerState
from bdh_spec.params import Array, Params
from bdh_spec.protocol import USUAL, Backend, Batch, Capabilities, Model, own_texts
from bdh_spec.rope import Phase
from bdh_spec.spread import Spread, Team


class MLXModel(Model):
    """BDH in MLX behind the protocol. Its own form of a state is a list of one ``RecurrentState``.

    Whatever outlives a call is evaluated in it: MLX evaluates an array in the thread that described it, and in no other.
    """

    def __init__(
        self, params: Params, config: BDHConfig, *, device: str, dtype: str, phase: Phase, kernel: Kernel | None = None
    ) -> None:
        super().__init__(config, device=device, dtype=dtype, phase=phase)
        self._reads = partial(forward, config=config, phase=phase, kernel=kernel)
        kind, _, index = device.partition(":")
        self._device, self._dtype = mx.Device(getattr(mx, kind), int(index or 0)), getattr(mx, dtype)
        with computing_on(self._device):
            self._params = Params(*(_array(weight, self._dtype) for weight in params))
            mx.eval(*self._params)

    def params(self) -> Params:
        with computing_on(self._device):
            return Params(*map(_numpy, self._params))

    def _forward(self, tokens: Array) -> Array:
        with computing_on(self._device):
            return _numpy(self._reads(mx.array(tokens), self._params))

    def _init_state(self, batch: int) -> list[RecurrentState]:
        with computing_on(self._device):
            state = init_state(batch, self.config, self._dtype)
            mx.eval(state)
            return [state]

    def _advance(self, native: Any, position: int, tokens: Array, donate: bool) -> tuple[Array, Any]:
        held = native if donate else list(native)
        with computing_on(self._device):
            return _numpy(read_on(held, mx.array(tokens), self._params, self.config, phase=self.phase)), held

    def _loss(self, tokens: Array, targets: Array) -> float:
        with computing_on(self._device):
            return float(_numpy(self._loss_of(self._params, mx.array(tokens), mx.array(targets))))

    def _gradients(self, tokens: Array, targets: Array) -> tuple[float, Params]:
        with computing_on(self._device):
            value, slopes = self._value_and_slopes(mx.array(tokens), mx.array(targets))
            return float(_numpy(value)), Params(*map(_numpy, slopes))

    def _trace(self, tokens: Array) -> dict[str, Array]:
        with computing_on(self._device):
            stages = trace(mx.array(tokens), self._params, self.config, phase=self.phase)
            return {name: _numpy(value) for name, value in stages.items()}

    def _export_state(self, native: Any) -> tuple[Array, ...]:
        with computing_on(self._device):
            return tuple(_numpy(memory) for memory in native[0].layers)

    def _import_state(self, state: ExportedState) -> list[RecurrentState]:
        with computing_on(self._device):
            layers = tuple(_array(memory, wide(self._dtype)) for memory in state.layers)
            return [RecurrentState(mx.array(state.position, dtype=mx.uint64), layers)]

    def _optimizer(self, settings: AdamW) -> Moments:
        with computing_on(self._device):
            memory = moments(self._params, settings)
            mx.eval(memory.weights, memory.first, memory.second)
            return memory

    def _train_step(self, native: Moments, batches: list[Batch], rate: float) -> float:
        with computing_on(self._device):
            loss, slopes = self._total(native, batches)
            moved = update(self._params, slopes, native, rate)
            mx.eval(moved, native.weights, native.first, native.second)
            self._params = moved
            return loss

    def _total(self, native: Moments, batches: list[Batch]) -> tuple[float, Params]:
        """The loss of a step, and its slopes."""
        loss, total = 0.0, None
        for part, (tokens, targets, share) in enumerate(batches):
            key = dropout_key(native, self._place_of(part))
            value, slopes = self._value_and_slopes(mx.array(tokens), mx.array(targets), key)
            total = slopes if share == 1 else add(total, slopes, share)
            mx.eval(value, total)
            loss += share * float(_numpy(value))
        assert total is not None  # a step has a batch
        return loss, total

    def _place_of(self, part: int) -> int:
        """The number of a batch among those of its step."""
        return part

    def _export_optimizer(self, native: Moments) -> OptimizerState:
        with computing_on(self._device):
            narrow = self._dtype != wide(self._dtype)
            masters = Params(*map(_numpy, unrounded(self._params, native))) if narrow else None
            first, second = (Params(*map(_numpy, held)) for held in (native.first, native.second))
            return OptimizerState(native.settings, native.step, first, second, masters)

    def _import_optimizer(self, state: OptimizerState) -> Moments:
        with computing_on(self._device):
            first, second = self._widely(state.first), self._widely(state.second)
            weights = self._widely(state.masters) if state.masters else Params(*map(widen, self._params))
            mx.eval(weights, first, second)
            return Moments(state.settings, weights, first, second, state.step)

    def _widely(self, five: Params) -> Params:
        return Params(*(_array(values, wide(self._dtype)) for values in five))

    def _value_and_slopes(self, tokens: mx.array, targets: mx.array, key: mx.array | None = None) -> tuple[mx.array, Params]:
        value, slopes = mx.value_and_grad(self._loss_of)(self._params, tokens, targets, key)
        return value, Params(*slopes)

    def _loss_of(self, params: Params, tokens: mx.array, targets: mx.array, key: mx.array | None = None) -> mx.array:
        return loss(self._reads(tokens, params, key=key), targets)


class SpreadModel(MLXModel):
    """A model whose texts several processes share, each of which is asked the same."""

    def __init__(self, params: Params, config: BDHConfig, spread: Spread, *, device: str, dtype: str, phase: Phase) -> None:
        self._group = group()
        here, wanted = self._group.size(), spread.size
        if here != wanted:
            raise CapabilityError(f"{here} processes for a model that {wanted} share: mlx.launch -n {wanted} starts as many")
        super().__init__(params, config, device=device, dtype=dtype, phase=phase)

    def _total(self, native: Moments, batches: list[Batch]) -> tuple[float, Params]:
        rank, size = self._group.rank(), self._group.size()
        loss, slopes = super()._total(native, own_texts(batches, rank, size))
        whole = Params(*(summed(slope, self._group) for slope in slopes))
        mx.eval(whole)
        return added(loss, self._group), whole

    def _place_of(self, part: int) -> int:
        """As if what each process reads were a batch of its own."""
        return part * self._group.size() + self._group.rank()


class MLXBackend(Backend):
    """The port named ``mlx``.

    Making one asks MLX for whole float32 products: chips with matrix units round their factors to TF32 otherwise. MLX reads
    that wish from the environment before its first product in the process and never again, so a program that has multiplied
    matrices already must set MLX_ENABLE_TF32=0 itself before it does. A value that is set is left alone.
    """

    name = "mlx"
    capabilities = Capabilities(dtypes=DTYPES, verbs=(*USUAL, "frequencies", "int8"), shares=("data",))
    kernel: ClassVar[Kernel | None] = None

    def __init__(self) -> None:
        os.environ.setdefault("MLX_ENABLE_TF32", "0")

    def version(self) -> str:
        return f"mlx {metadata.version('mlx')}"

    def devices(self) -> tuple[str, ...]:
        return ("gpu", "cpu") if mx.is_available(mx.gpu) else ("cpu",)

    def load(
        self,
        params: Params,
        config: BDHConfig,
        *,
        device: str | None = None,
        dtype: str | None = None,
        phase: Phase = "exact",
        spread: Spread | None = None,
    ) -> Model:
        """Put weights on a device: float32 on the GPU if there is one, float64 on the CPU, which alone has it."""
        device = "cpu" if dtype == "float64" and device is None else device
        return super().load(params, config, device=device, dtype=dtype, phase=phase, spread=spread)

    def team(self) -> Team:
        return MLXTeam() if is_launched() else Team()

    def _load_spread(
        self, params: Params, config: BDHConfig, spread: Spread, *, device: str, dtype: str, phase: Phase
    ) -> Model:
        return SpreadModel(params, config, spread, device=device, dtype=dtype, phase=phase)

    def _load(self, params: Params, config: BDHConfig, *, device: str, dtype: str, phase: Phase) -> Model:
        if dtype == "float64" and not device.startswith("cpu"):
            raise CapabilityError(f"the mlx port has no float64 on {device!r}: choose the device cpu or the dtype float32")
        return MLXModel(params, config, device=device, dtype=dtype, phase=phase, kernel=self.kernel)


class StreamedMLXBackend(MLXBackend):
    """The same port, reading with the streamed kernel at every size: ``bdh-conform bdh_mlx.backend:StreamedMLXBackend``."""

    kernel = "streamed"


def _array(values: Array, dtype: mx.Dtype) -> mx.array:
    """A copy in MLX: contiguous, since it takes no array that runs backwards, by way of a width that it and NumPy share."""
    whole = np.ascontiguousarray(values, np.float64 if dtype == mx.float64 else np.float32)
    return mx.array(whole, dtype=wide(dtype)).astype(dtype)


def _numpy(values: mx.array) -> Array:
    return np.array(widen(values), order="C")
