"""The protocol in JAX: NumPy in, NumPy out, and nothing compiled twice.

The compiled functions belong to the module, so a second model of the same sizes finds them ready.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from bdh_jax import forms, model, training
from bdh_jax.bdh import forward
from bdh_jax.forms import Kernel
from bdh_jax.generation import advance_donated, filled, pieces
from bdh_jax.layer import wide
from bdh_jax.model import RecurrentState
from bdh_jax.parallel import DATA, PLATFORMS, JAXTeam, devices_of, find_device, is_launched, lying, mesh, shardings
from bdh_jax.rope import words
from bdh_spec.config import BDHConfig
from bdh_spec.dtypes import DTYPES
from bdh_spec.model import IGNORE, loss
from bdh_spec.model import RecurrentState as ExportedState
from bdh_spec.optimizer import AdamW, OptimizerState, dropout_seed
from bdh_spec.params import Array, Params, cast
from bdh_spec.protocol import USUAL, Backend, Batch, Capabilities, Model, own_texts
from bdh_spec.rope import Phase
from bdh_spec.spread import KINDS, Spread, Team

trace = jax.jit(model.trace, static_argnames=("config", "phase"))
unrounded = jax.jit(training.unrounded)


@dataclass
class Optimizer:
    """AdamW's memory: its settings, the steps made, and the moments on the device."""

    settings: AdamW
    moments: training.Moments
    step: int = 0


class JAXModel(Model):
    """The pure functions behind the protocol."""

    def __init__(
        self, params: Params, config: BDHConfig, *, device: str, dtype: str, phase: Phase, kernel: Kernel | None = None
    ) -> None:
        super().__init__(config, device=device, dtype=dtype, phase=phase)
        self._device = self._find(device)
        self._how: dict[str, Any] = {"phase": phase, "kernel": kernel}
        self._still = replace(config, dropout=0.0)  # configurations that differ in nothing but dropout share programs
        with self._precision():
            self._params = self._placed(cast(params, jnp.dtype(dtype)))

    def params(self) -> Params:
        return Params(*(self._numpy(weight) for weight in self._params))

    def _find(self, device: str) -> jax.Device | jax.sharding.Sharding:
        return find_device(device)

    def _placed(self, five: Params) -> Params:
        """A copy, on the device, of five values of the weights' shapes."""
        placed: Params = self._put(five)
        return placed

    def _ids(self, ids: Array) -> Any:
        """Tokens of a step."""
        return ids

    def _forward(self, tokens: Array) -> Array:
        with self._precision():
            logits = forward(self._filled(tokens), self._params, self._still, **self._how)
        return self._numpy(logits)[:, : tokens.shape[1]]

    def _init_state(self, batch: int) -> RecurrentState:
        c = self.config
        return self._state(0, np.zeros((c.n_layer, batch, c.n_head, c.n_neurons, c.n_embd), np.float32))

    def _advance(self, native: RecurrentState, position: int, tokens: Array, donate: bool) -> tuple[Array, RecurrentState]:
        logits = []
        with self._precision():
            native = native if donate else self._put(native)
            for chunk, count in pieces(tokens, self.config):
                part, native = advance_donated(native, chunk, self._params, self._still, phase=self.phase, count=count)
                logits.append(self._numpy(part)[:, :count])
        return np.concatenate(logits, axis=1), native

    def _loss(self, tokens: Array, targets: Array) -> float:
        return loss(self._forward(tokens), targets)  # by the program of forward

    def _gradients(self, tokens: Array, targets: Array) -> tuple[float, Params]:
        value, slopes = self._add(None, Batch(tokens, targets), 0, self._still)
        return value, Params(*(self._numpy(slope) for slope in slopes))

    def _trace(self, tokens: Array) -> dict[str, Array]:
        with self._precision():
            stages = trace(tokens.astype(np.int32), self._params, self._still, phase=self.phase)
        return {name: self._numpy(stages[name]) for name in model.stage_names(self.config)}

    def _export_state(self, native: RecurrentState) -> tuple[Array, ...]:
        return tuple(self._numpy(native.layers))

    def _import_state(self, state: ExportedState) -> RecurrentState:
        return self._state(state.position, np.stack(state.layers))

    def _state(self, position: int, layers: Array) -> RecurrentState:
        with self._precision():
            # The position as well: what is on no device yet, or was put on none, is another argument, and another program.
            return RecurrentState(*self._put((words(position), layers.astype(wide(self.dtype)))))

    def _optimizer(self, settings: AdamW) -> Optimizer:
        with self._precision():
            return Optimizer(settings, self._moments())

    def _train_step(self, native: Optimizer, batches: list[Batch], rate: float) -> float:
        settings, native.step = native.settings, native.step + 1
        value, total = 0.0, None
        for part, batch in enumerate(batches):
            share, total = self._add(total, batch, dropout_seed(settings.seed, native.step, part), self.config)
            value += share
        with self._precision():
            rates = training.rates_at(native.step, settings, rate)
            self._params, native.moments = training.apply(self._params, total, native.moments, rates, frozen=settings.frozen)
        return value

    def _add(self, total: Params | None, batch: Batch, seed: int, config: BDHConfig) -> tuple[float, Params]:
        """The share of a batch in the loss, and its slopes added to those of other batches."""
        tokens, targets = self._ids(self._filled(batch.tokens)), self._ids(self._filled(batch.targets, IGNORE))
        with self._precision():
            value, total = training.add_gradients(
                tokens, targets, self._params, total, words(seed), batch.share, config, **self._how
            )
            return float(value), total

    def _export_optimizer(self, native: Optimizer) -> OptimizerState:
        with self._precision():
            held = native.moments._replace(masters=native.moments.masters and unrounded(self._params, native.moments))
            return OptimizerState(native.settings, native.step, *jax.tree.map(self._numpy, held))

    def _import_optimizer(self, state: OptimizerState) -> Optimizer:
        with self._precision():
            return Optimizer(state.settings, self._moments(state.first, state.second, state.masters), state.step)

    def _moments(
        self, first: Params | None = None, second: Params | None = None, masters: Params | None = None
    ) -> training.Moments:
        """The moments on the device: zeros, and the weights as they are, where none are given. Made without a program."""
        dtype, narrow = np.dtype(wide(self.dtype)), training.is_narrow(self._params)
        held = [self._numpy(weight) for weight in self._params]
        zeros = Params(*map(np.zeros_like, held))
        moments = training.Moments(first or zeros, second or zeros, (masters or Params(*held)) if narrow else None)
        given = jax.tree.map(lambda value: np.asarray(value, dtype), moments)
        return training.Moments(*(five and self._placed(five) for five in given))

    def _put(self, held: Any, where: Any = None) -> Any:
        """A copy there, or on the device, that is nobody else's, so that it may be donated. It takes no program."""
        where = where or self._device
        there = jax.device_put(held, where)  # on a CPU this shares the memory of NumPy, whatever it is told
        return jax.device_put(there, where, may_alias=False)

    def _filled(self, tokens: Array, fill: int | None = None) -> Array:
        return filled(tokens, forms.length(tokens.shape, self.config), fill)

    def _precision(self) -> AbstractContextManager[None]:
        """Where float64 exists: for a float64 model and no longer than the call, whatever the process has chosen."""
        return jax.enable_x64(True) if self.dtype == "float64" else nullcontext()

    def _numpy(self, value: jax.Array) -> Array:
        """A copy that no later donation can touch."""
        return np.array(value, np.float64 if self.dtype == "float64" else np.float32)


class SpreadModel(JAXModel):
    """The same functions over weights that lie on a mesh of devices: where its parts meet, the compiler puts the sum."""

    def __init__(self, params: Params, config: BDHConfig, spread: Spread, *, device: str, dtype: str, phase: Phase) -> None:
        self._mesh = mesh(device, spread)
        self._shardings = shardings(self._mesh, spread)
        super().__init__(params, config, device=device, dtype=dtype, phase=phase)

    def _find(self, device: str) -> jax.sharding.Sharding:
        return lying(self._mesh)  # all of it on each

    def _placed(self, five: Params) -> Params:
        placed: Params = self._put(five, self._shardings)
        return placed

    def _ids(self, ids: Array) -> Any:
        divides = len(ids) % self._mesh.shape[DATA] == 0  # those of a step do
        return jax.device_put(ids, lying(self._mesh, DATA)) if divides else ids

    def _numpy(self, value: jax.Array) -> Array:
        with self._precision():  # of a part that lies with another process, nothing can be read here
            return super()._numpy(jax.device_put(value, self._device))

    def _train_step(self, native: Optimizer, batches: list[Batch], rate: float) -> float:
        own_texts(batches, 0, self._mesh.shape[DATA])  # which refuses what does not divide
        value = super()._train_step(native, batches, rate)
        # Nobody tells the compiler where to leave what it has moved.
        with self._precision():
            self._params, native.moments = jax.device_put(self._params, self._shardings), self._in_place(native.moments)
        return value

    def _in_place(self, moments: training.Moments) -> training.Moments:
        first, second, masters = (jax.device_put(five, five and self._shardings) for five in moments)
        return training.Moments(first, second, masters)


class JAXBackend(Backend):
    """The port named ``jax``. Its devices are JAX's platforms: ``cuda``, ``rocm``, ``tpu``, ``cpu``, or ``cuda:1``."""

    name = "jax"
    capabilities = Capabilities(dtypes=DTYPES, verbs=(*USUAL, "frequencies", "int8"), compiles=True, shares=KINDS)
    kernel: ClassVar[Kernel | None] = None

    def version(self) -> str:
        return f"jax {jax.__version__}"

    def devices(self) -> tuple[str, ...]:
        return tuple(platform for platform in PLATFORMS if devices_of(platform))

    def memory(self, device: str) -> int | None:
        has: dict[str, int] = find_device(device).memory_stats() or {}
        return has.get("bytes_limit") or super().memory(device)

    def team(self) -> Team:
        return JAXTeam() if is_launched() else Team()

    def _load(self, params: Params, config: BDHConfig, *, device: str, dtype: str, phase: Phase) -> Model:
        return JAXModel(params, config, device=device, dtype=dtype, phase=phase, kernel=self.kernel)

    def _load_spread(
        self, params: Params, config: BDHConfig, spread: Spread, *, device: str, dtype: str, phase: Phase
    ) -> Model:
        return SpreadModel(params, config, spread, device=device, dtype=dtype, phase=phase)


class StreamedJAXBackend(JAXBackend):
    """The same port, reading with the streamed kernel at every size: ``bdh-conform bdh_jax.backend:StreamedJAXBackend``."""

    kernel = "streamed"
