"""The port named ``torch``: the protocol around the module, NumPy in and NumPy out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from bdh_spec import AdamW, BDHConfig, CapabilityError, OptimizerState, Spread, Team
from bdh_spec.dtypes import DTYPES
from bdh_spec.int8 import are_int8
from bdh_spec.model import RecurrentState as ExportedState
from bdh_spec.model import Stages
from bdh_spec.params import Array, Params
from bdh_spec.protocol import VERBS, Backend, Batch, Capabilities, Model
from bdh_spec.rope import Phase
from bdh_spec.spread import KINDS
from bdh_torch.forms import Kernel, is_counted, is_kept_in_int8
from bdh_torch.layer import wide
from bdh_torch.model import BDH, RecurrentState
from bdh_torch.optimizer import Optimizer, add
from bdh_torch.rope import stored

NAMES = Params("embed.weight", "encoder", "encoder_v", "decoder", "lm_head")  # of the weights in a state dict
PER_HEAD = ("x_sparse", "rotated", "scores", "attention", "yKV", "y_sparse", "xy_sparse")
MATMULS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]  # made at import
# PyTorch has one set of switches and one generator for all threads.
switching, dropping = Lock(), Lock()
allowed: list[list[str]] = []  # what the switches were at first, once for each call that needs them off


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 in float32, whatever the process has allowed: TF32 and bfloat16 are other functions.

    Of calls that overlap, the first turns the switches and the last turns them back.
    """
    with switching:
        allowed.append(allowed[0] if allowed else [switch.fp32_precision for switch in MATMULS])
        for switch in MATMULS:
            switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        with switching:
            before = allowed.pop()
            if not allowed:
                for switch, precision in zip(MATMULS, before, strict=True):
                    switch.fp32_precision = precision


class TorchModel(Model):
    """A ``BDH`` behind the protocol."""

    def __init__(
        self, params: Params, config: BDHConfig, *, device: str, dtype: str, phase: Phase, kernel: Kernel | None = None
    ) -> None:
        super().__init__(config, device=device, dtype=dtype, phase=phase)
        self._native = self._module(params, kernel)

    @property
    def module(self) -> BDH:
        """The native model."""
        assert self._native is not None  # only a model in int8 has none
        return self._native

    @property
    def wide(self) -> str:
        """The dtype of what must not be narrower than float32."""
        return "float64" if self.dtype == "float64" else "float32"

    def params(self) -> Params:
        return Params(*(to_numpy(weight) for weight in self._weights()))

    def _module(self, params: Params, kernel: Kernel | None) -> BDH | None:
        module = filled(lambda: BDH(self.config, phase=self.phase, kernel=kernel), params, self.device, self.dtype)
        return laid_out(module, self.device)

    @full_precision()
    @torch.no_grad()
    def _forward(self, tokens: Array) -> Array:
        logits, _ = self.module(self._to_device(tokens))
        return to_numpy(logits)

    @full_precision()
    @torch.no_grad()
    def _forward_padded(self, tokens: Array, lengths: Array) -> Array:
        T = tokens.shape[1]
        kept = np.arange(T) >= T - lengths[:, None]  # B T
        return to_numpy(self.module.trace(self._to_device(tokens), kept=self._to_device(kept)))

    @torch.no_grad()
    def _init_state(self, batch: int) -> RecurrentState:
        return self.module.init_state(batch)

    @full_precision()
    @torch.no_grad()
    def _advance(self, native: Any, position: int, tokens: Array, donate: bool) -> tuple[Array, Any]:
        logits, after = self.module.advance(native, self._to_device(tokens), donate=donate)
        return to_numpy(logits), after

    @full_precision()
    @torch.no_grad()
    def _loss(self, tokens: Array, targets: Array) -> float:
        _, value = self.module(self._to_device(tokens), self._to_device(targets))
        return float(value)

    @full_precision()
    def _gradients(self, tokens: Array, targets: Array) -> tuple[float, Params]:
        value, slopes = self._slopes(tokens, targets)
        return value, Params(*(to_numpy(slope) for slope in slopes))

    @full_precision()
    @torch.no_grad()
    def _trace(self, tokens: Array) -> dict[str, Array]:
        seen: dict[str, list[Array]] = {}
        nh, B = self.config.n_head, len(tokens)

        def note(name: str, value: Tensor) -> Tensor:
            # A copy at once, because a later stage may take over the memory of an earlier one.
            seen.setdefault(name, []).append(to_numpy(batch_first(value, nh, B) if name in PER_HEAD else value))
            return value

        self.module.trace(self._to_device(tokens), note)
        layers = {f"layers.{i}.{name}": seen[name][i] for i in range(self.config.n_layer) for name in Stages._fields}
        return {"embed": seen["embed"][0], **layers, "logits": seen["logits"][0]}

    def _export_state(self, native: Any) -> tuple[Array, ...]:
        nh = self.config.n_head
        return tuple(to_numpy(batch_first(memory, nh, len(memory) // nh)) for memory in native.layers)  # B h N D

    def _import_state(self, state: ExportedState) -> RecurrentState:
        layers = (from_numpy(memory.swapaxes(0, 1), self.device, self.wide).flatten(0, 1) for memory in state.layers)  # h*B N D
        return RecurrentState(state.position, tuple(layers))

    def _optimizer(self, settings: AdamW) -> Optimizer:
        return Optimizer(self._weights(), settings)

    @full_precision()
    def _train_step(self, native: Any, batches: list[Batch], rate: float) -> float:
        value, slopes = self._total(native, batches)
        native.step(slopes, rate)
        return value

    def _total(self, native: Any, batches: list[Batch]) -> tuple[float, list[Tensor]]:
        """The loss of a step, and its slopes in at least float32."""
        value, total = 0.0, None
        for part, (tokens, targets, share) in enumerate(batches):
            with self._dropping(native.next_seed(part)):
                loss, slopes = self._slopes(tokens, targets)
            value, total = value + share * loss, add(total, slopes, share)
        assert total is not None  # a step has a batch
        return value, total

    def _export_optimizer(self, native: Any) -> OptimizerState:
        first, second, masters = (held and Params(*map(to_numpy, held)) for held in native.export())
        return OptimizerState(native.settings, native.steps, first, second, masters)

    def _import_optimizer(self, state: OptimizerState) -> Optimizer:
        held = (
            [from_numpy(w, self.device, self.wide) for w in five or ()] for five in (state.first, state.second, state.masters)
        )
        native = self._optimizer(state.settings)
        native.restore(state.step, *held)
        return native

    @contextmanager
    def _dropping(self, seed: int) -> Iterator[None]:
        """Train with the masks of this seed, and leave PyTorch's generators as they were."""
        device = torch.device(self.device)
        with dropping, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            self.module.train()
            try:
                yield
            finally:
                self.module.eval()

    def _slopes(self, tokens: Array, targets: Array) -> tuple[float, tuple[Tensor, ...]]:
        _, value = self.module(self._to_device(tokens), self._to_device(targets))
        return value.item(), torch.autograd.grad(value, self._weights())

    def _weights(self) -> list[torch.nn.Parameter]:
        return [self.module.get_parameter(name) for name in NAMES]

    def _to_device(self, ids: Array) -> Tensor:
        return torch.tensor(ids, device=self.device)


class TorchBackend(Backend):
    """The port named ``torch``."""

    name = "torch"
    kernel: ClassVar[Kernel | None] = None  # the default
    capabilities = Capabilities(dtypes=DTYPES, verbs=VERBS, shares=KINDS)

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def devices(self) -> tuple[str, ...]:
        present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        return tuple(device for device, here in present.items() if here)

    def memory(self, device: str) -> int | None:
        if device.startswith("cuda"):
            return int(torch.cuda.get_device_properties(device).total_memory)
        return int(torch.mps.recommended_max_memory()) if device == "mps" else super().memory(device)

    def team(self) -> Team:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # as torchrun sets it
            return Team()
        from bdh_torch.parallel import TorchTeam  # a program of one process need not wait for what many take

        return TorchTeam()

    def _load_spread(
        self, params: Params, config: BDHConfig, spread: Spread, *, device: str, dtype: str, phase: Phase
    ) -> Model:
        from bdh_torch.parallel import SpreadModel

        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        return SpreadModel(params, config, spread, device=device, dtype=dtype, phase=phase, kernel=self.kernel)

    def _load(self, params: Params, config: BDHConfig, *, device: str, dtype: str, phase: Phase) -> Model:
        if device == "mps" and dtype == "float64":
            raise CapabilityError("the torch port has no dtype 'float64' on mps: choose float32, or the device cpu")
        if are_int8(params) and is_kept_in_int8(params.encoder.values.size, device):
            from bdh_torch.int8 import Int8Model  # it is a TorchModel

            return Int8Model(params, config, device=device, dtype=dtype, phase=phase, kernel=self.kernel)
        return TorchModel(params, config, device=device, dtype=dtype, phase=phase, kernel=self.kernel)


class StreamedTorchBackend(TorchBackend):
    """The same with the streamed kernel at every size: bdh-conform bdh_torch.backend:StreamedTorchBackend."""

    kernel = "streamed"


class PlainTorchBackend(TorchBackend):
    """The same with the plain kernel at every size."""

    kernel = "plain"


def filled(empty: Callable[[], BDH], params: Params, device: str, dtype: str) -> BDH:
    """A module with copies of these weights."""
    return assigned(empty, Params(*(from_numpy(weight, device, dtype) for weight in params)), device)


def assigned(empty: Callable[[], BDH], weights: Params, device: str) -> BDH:
    """A module that takes over these tensors as its weights."""
    with torch.device("meta"):  # no weights to draw: they are given
        module = empty().eval()
    tensors = dict(zip(NAMES, weights, strict=True))
    module.load_state_dict({**tensors, "attn.freqs": stored(module.attn.table).to(device)}, assign=True)
    return module


def laid_out(module: BDH, device: str) -> BDH:
    """The same module, its weights in the order of memory in which the device decodes fastest."""
    return module.laid_out_for_decoding() if device == "cpu" and is_counted(module.encoder_v) else module


def from_numpy(value: Array, device: str, dtype: str) -> Tensor:
    """A copy on the device, by way of a dtype that PyTorch can take from NumPy: not every bfloat16 is its own."""
    kind = np.float64 if dtype == "float64" else np.float32
    return torch.tensor(np.ascontiguousarray(value, kind)).to(device, getattr(torch, dtype))


def to_numpy(value: Tensor) -> Array:
    """A copy in NumPy: float64 if it is float64, else float32."""
    return value.detach().to("cpu", wide(value.dtype), copy=True, memory_format=torch.contiguous_format).numpy()


def batch_first(value: Tensor, nh: int, B: int) -> Tensor:
    """What the port keeps as (h*B, T, K) or (h, B*T, K), as the protocol has it: (B, h, T, K)."""
    return value.view(nh, B, -1, value.shape[-1]).transpose(0, 1)
