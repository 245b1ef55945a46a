"""The specification behind the protocol, on whatever weights a tolerance is computed with."""

from __future__ import annotations

from typing import Any

import numpy as np

from bdh_spec.config import BDHConfig
from bdh_spec.numpy_backend import NumpyBackend, NumpyModel
from bdh_spec.params import Array, Params
from bdh_spec.rope import Phase


class Specification(NumpyModel):
    """The specification in the precision of the weights it is given, rounding noise included."""

    def __init__(self, params: Params, config: BDHConfig, phase: Phase = "exact") -> None:
        super().__init__(params, config, device="cpu", dtype=params.embed.dtype.name, phase=phase)
        self._params = Params(*(weight.copy() for weight in params))  # cast would have taken the noise off
        self.backend = NumpyBackend.name


class Stepwise(Specification):
    """The specification reading token by token: what a chunk's scores add up at once cancels in other places in a state.

    Rounding may add up to twenty times as much on one of the two ways as on the other, and a port may go either.
    """

    def _advance(self, native: Any, position: int, tokens: Array, donate: bool) -> tuple[Array, Any]:
        parts = []
        for token in np.split(tokens, tokens.shape[1], axis=1):
            part, native = super()._advance(native, position, token, donate)
            parts.append(part)
        return np.concatenate(parts, axis=1), native
