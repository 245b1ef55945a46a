"""The specification behind the protocol, on whatever weights a tolerance is computed with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bdh_conformance.yardstick.noise import Noisy, plain
from bdh_spec.config import BDHConfig
from bdh_spec.dtypes import numpy_dtype
from bdh_spec.model import RecurrentState
from bdh_spec.numpy_backend import NumpyBackend, NumpyModel
from bdh_spec.optimizer import AdamW, Moments, OptimizerState, begin, update
from bdh_spec.params import Array, Params
from bdh_spec.protocol import Batch
from bdh_spec.rope import Phase

READS = 256  # pieces in which a text is read step by step: enough to add up in another order, few enough for long texts


class Specification(NumpyModel):
    """The specification in the precision of the weights it is given, rounding noise included."""

    def __init__(self, params: Params, config: BDHConfig, phase: Phase = "exact") -> None:
        super().__init__(params, config, device="cpu", dtype=params.embed.dtype.name, phase=phase)
        self._params = Params(*(weight.copy() for weight in params))  # cast would have taken the noise off
        self.backend = NumpyBackend.name

    @property
    def own_params(self) -> Params:
        """The weights, noise included."""
        return self._params

    def over(self, params: Params, config: BDHConfig) -> Specification:
        """The same over other weights."""
        return type(self)(params, config, self.phase)

    def _init_state(self, batch: int) -> RecurrentState:
        return self._summed(super()._init_state(batch))

    def _import_state(self, state: RecurrentState) -> RecurrentState:
        return self._summed(super()._import_state(state))

    def _summed(self, state: RecurrentState) -> RecurrentState:
        """A state whose sums round as float32 does where everything else rounds narrower (R13)."""
        encoder = self._params.encoder
        if not isinstance(encoder, Noisy):
            return state
        return RecurrentState(state.position, tuple(encoder.wide(memory) for memory in state.layers))


class Stepwise(Specification):
    """The specification reading step by step: what a chunk's scores add up at once cancels in other places in a state.

    Rounding may add up to twenty times as much on one of the two ways as on the other, and a port may go either.
    """

    def _advance(self, native: Any, position: int, tokens: Array, donate: bool) -> tuple[Array, Any]:
        parts = []
        for piece in np.array_split(tokens, min(tokens.shape[1], READS), axis=1):
            part, native = super()._advance(native, position, piece, donate)
            parts.append(part)
        return np.concatenate(parts, axis=1), native


@dataclass
class Mastered(Moments):
    """Moments, and the weights before rounding."""

    masters: Params = field(kw_only=True)


class Rounding(Specification):
    """The specification over weights held in a narrow dtype (R16): moved unrounded, read rounded."""

    def __init__(self, params: Params, config: BDHConfig, phase: Phase = "exact", *, held: str) -> None:
        super().__init__(params, config, phase)
        self.held = numpy_dtype(held)
        self._params = self._rounded(self._params)

    def over(self, params: Params, config: BDHConfig) -> Specification:
        return Rounding(params, config, self.phase, held=self.held.name)

    def _optimizer(self, settings: AdamW) -> Mastered:
        masters = Params(*map(widened, self._params))
        return Mastered(**vars(begin(masters, settings)), masters=masters)

    def _train_step(self, native: Any, batches: list[Batch], rate: float) -> float:
        loss_before, slopes = self._slopes(native, batches)
        native.masters = self._unrounded(native)
        update(native.masters, Params(*map(widened, slopes)), native, rate)
        self._params = self._rounded(native.masters)
        return loss_before

    def _export_optimizer(self, native: Any) -> OptimizerState:
        return replace(super()._export_optimizer(native), masters=self._unrounded(native))

    def _import_optimizer(self, state: OptimizerState) -> Mastered:
        masters = state.masters or Params(*map(widened, self._params))
        return Mastered(**vars(super()._import_optimizer(state)), masters=masters)

    def _unrounded(self, native: Any) -> Params:
        """The weights before rounding, but for those that have been moved since by somebody else."""
        pairs = zip(native.masters, self._rounded(native.masters), self._params, strict=True)
        return Params(*(np.where(plain(r) == plain(w), m, widened(w)) for m, r, w in pairs))

    def _rounded(self, masters: Params) -> Params:
        return Params(
            *(like(w, plain(m).astype(self.held).astype(w.dtype)) for m, w in zip(masters, self._params, strict=True))
        )


def widened(values: Array) -> Array:
    """A copy whose arithmetic is float32 at least, noise included."""
    return values.wide(plain(values)) if isinstance(values, Noisy) else values.copy()


def like(noisy: Array, values: Array) -> Array:
    """Values that infect with the noise that another array does."""
    return Noisy.wrap(values, noisy.precision, noisy.rng) if isinstance(noisy, Noisy) else values
