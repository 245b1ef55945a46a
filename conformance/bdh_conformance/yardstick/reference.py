"""The specification behind the protocol, on whatever weights a tolerance is computed with."""

from __future__ import annotations

from typing import Any

import numpy as np

from bdh_conformance.yardstick.noise import Noisy
from bdh_spec.config import BDHConfig
from bdh_spec.model import RecurrentState
from bdh_spec.numpy_backend import NumpyBackend, NumpyModel
from bdh_spec.params import Array, Params
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
