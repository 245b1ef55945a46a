"""The protocol in JAX: NumPy in, NumPy out, and nothing compiled twice.

The compiled functions belong to the module, so a second model of the same sizes finds them ready.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdh_jax import model, training
from bdh_jax.bdh import forward
from bdh_jax.generation import advance_donated, advance_kept, buffer_length, pieces
from bdh_jax.model import RecurrentState, init_state, wide
from bdh_jax.parallel import DATA, PLATFORMS, devices_of, find_device, lying, mesh, shardings
from bdh_jax.rope import words
from bdh_spec.config import BDHConfig
from bdh_spec.dtypes import DTYPES
from bdh_spec.model import IGNORE
from bdh_spec.model import RecurrentState as ExportedState
from bdh_spec.optimizer import AdamW, OptimizerState, dropout_seed
from bdh_spec.params import Array, Params, cast
from bdh_spec.protocol import USUAL, Backend, Batch, Capabilities, Model, own_texts
from bdh_spec.rope import Phase
from bdh_spec.spread import KINDS, Spread

objective = jax.jit(training.objective, static_argnames=("config", "phase"))
gradients = jax.jit(training.gradients, static_argnames=("config", "phase"))
trace = jax.jit(model.trace, static_argnames=("config", "phase"))


@dataclass
class Optimizer:
    """AdamW's memory: its settings, the steps made, and the moments on the device."""

    settings: AdamW
    moments: training.Moments
    step: int = 0


class JAXModel(Model):
    """The pure functions behind the protocol."""

    def __init__(self, params: Params, config: BDHConfig, *, device: str, dtype: str, phase: Phase) -> None:
        super().__init__(config, device=device, dtype=dtype, phase=phase)
        self._device = self._find(device)
        with self._precision():
            self._params = self._placed(cast(params, jnp.dtype(dtype)))

    def params(self) -> Params:
        return Params(*(self._numpy(weight) for weight in self._params))

    def _find(self, device: str) -> jax.Device | jax.sharding.Sharding:
        return find_device(device)

    def _placed(self, five: Params) -> Params:
        """A copy, on the device, of five values of the weights' shapes."""
        return Params(*(jnp.array(value, copy=True, device=self._device) for value in five))

    def _ids(self, ids: Array) -> Any:
        """Tokens of a step."""
        return ids.astype(np.int32)

    def _forward(self, tokens: Array) -> Array:
        with self._precision():
            logits = forward(padded(tokens), self._params, self.config, phase=self.phase)
        return self._numpy(logits)[:, : tokens.shape[1]]

    def _init_state(self, batch: int) -> RecurrentState:
        with self._precision(), jax.default_device(self._device):
            return jax.device_put(init_state(batch, self.config, self.dtype), self._device)

    def _advance(self, native: RecurrentState, position: int, tokens: Array, donate: bool) -> tuple[Array, RecurrentState]:
        logits, step = [], advance_donated if donate else advance_kept
        with self._precision():
            for start, length in pieces(tokens.shape[1]):
                chunk = tokens[:, start : start + length].astype(np.int32)
                part, native = step(native, chunk, self._params, self.config, phase=self.phase)
                logits.append(part)
                step = advance_donated  # the state between two chunks is nobody else's
        return np.concatenate([self._numpy(part) for part in logits], axis=1), native

    def _loss(self, tokens: Array, targets: Array) -> float:
        with self._precision():
            return float(objective(padded(tokens), padded(targets, IGNORE), self._params, self.config, phase=self.phase))

    def _gradients(self, tokens: Array, targets: Array) -> tuple[float, Params]:
        with self._precision():
            value, slopes = gradients(padded(tokens), padded(targets, IGNORE), self._params, self.config, phase=self.phase)
        return float(value), Params(*(self._numpy(slope) for slope in slopes))

    def _trace(self, tokens: Array) -> dict[str, Array]:
        with self._precision():
            stages = trace(tokens.astype(np.int32), self._params, self.config, phase=self.phase)
        return {name: self._numpy(stages[name]) for name in model.stage_names(self.config)}

    def _export_state(self, native: RecurrentState) -> tuple[Array, ...]:
        return tuple(self._numpy(native.layers))

    def _import_state(self, state: ExportedState) -> RecurrentState:
        with self._precision():
            layers = jnp.asarray(np.stack(state.layers), wide(self.dtype))
            return jax.device_put(RecurrentState(words(state.position), layers), self._device)

    def _optimizer(self, settings: AdamW) -> Optimizer:
        with self._precision():
            return Optimizer(settings, training.init_moments(self._params))

    def _train_step(self, native: Optimizer, batches: list[Batch], rate: float) -> float:
        settings, native.step = native.settings, native.step + 1
        rates = training.rates_at(native.step, settings, rate)
        seeds = [words(dropout_seed(settings.seed, native.step, part)) for part in range(len(batches))]
        ids = [(self._ids(tokens), self._ids(targets)) for tokens, targets, _ in batches]
        how: dict[str, Any] = {"config": self.config, "phase": self.phase}
        with self._precision():
            if len(batches) == 1:
                value, self._params, native.moments = training.train_step(
                    *ids[0], self._params, native.moments, seeds[0], rates, frozen=settings.frozen, **how
                )
                return float(value)
            loss, total = 0.0, jax.tree.map(jnp.zeros_like, native.moments.first)
            for pair, seed, batch in zip(ids, seeds, batches, strict=True):
                value, total = training.add_gradients(*pair, self._params, total, seed, batch.share, **how)
                loss += float(value)
            self._params, native.moments = training.apply(self._params, total, native.moments, rates, frozen=settings.frozen)
        return loss

    def _export_optimizer(self, native: Optimizer) -> OptimizerState:
        with self._precision():
            held = native.moments._replace(masters=native.moments.masters and training.unrounded(self._params, native.moments))
            return OptimizerState(native.settings, native.step, *jax.tree.map(self._numpy, held))

    def _import_optimizer(self, state: OptimizerState) -> Optimizer:
        with self._precision():
            fresh = training.init_moments(self._params)
            given = training.Moments(state.first, state.second, fresh.masters and (state.masters or fresh.masters))
            wide = jax.tree.map(lambda value, like: np.asarray(value, like.dtype), given, fresh)
            return Optimizer(state.settings, training.Moments(*(five and self._placed(five) for five in wide)), state.step)

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
        return Params(*(jnp.array(value, copy=True, device=where) for value, where in zip(five, self._shardings, strict=True)))

    def _ids(self, ids: Array) -> jax.Array:
        return jax.device_put(ids.astype(np.int32), lying(self._mesh, DATA))

    def _init_state(self, batch: int) -> RecurrentState:
        with self._precision():
            return jax.device_put(init_state(batch, self.config, self.dtype), self._device)

    def _optimizer(self, settings: AdamW) -> Optimizer:
        native = super()._optimizer(settings)
        native.moments = self._in_place(native.moments)
        return native

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
    capabilities = Capabilities(dtypes=DTYPES, verbs=(*USUAL, "frequencies"), compiles=True, shares=KINDS)

    def version(self) -> str:
        return f"jax {jax.__version__}"

    def devices(self) -> tuple[str, ...]:
        return tuple(platform for platform in PLATFORMS if devices_of(platform))

    def memory(self, device: str) -> int | None:
        has: dict[str, int] = find_device(device).memory_stats() or {}
        return has.get("bytes_limit") or super().memory(device)

    def _load(self, params: Params, config: BDHConfig, *, device: str, dtype: str, phase: Phase) -> Model:
        return JAXModel(params, config, device=device, dtype=dtype, phase=phase)

    def _load_spread(
        self, params: Params, config: BDHConfig, spread: Spread, *, device: str, dtype: str, phase: Phase
    ) -> Model:
        return SpreadModel(params, config, spread, device=device, dtype=dtype, phase=phase)


def padded(tokens: Array, fill: int | None = None) -> Array:
    """Tokens (B, T) as int32, with more of them up to a power of two, so that lengths share programs.

    What comes later in a text changes nothing before it, and targets of -100 count for nothing. The last token is repeated: a
    weight that is not finite and belongs to another is then never met, where zero times it would not be zero.
    """
    extra = buffer_length(tokens.shape[1]) - tokens.shape[1]
    longer = np.repeat(tokens[:, -1:], extra, axis=1) if fill is None else np.full((len(tokens), extra), fill)
    return np.concatenate([tokens, longer], axis=1).astype(np.int32)
