"""The specification behind the protocol, on whatever weights a tolerance is computed with."""

from __future__ import annotations

from bdh_spec.config import BDHConfig
from bdh_spec.numpy_backend import NumpyBackend, NumpyModel
from bdh_spec.params import Params
from bdh_spec.rope import Phase


class Specification(NumpyModel):
    """The specification in the precision of the weights it is given, rounding noise included."""

    def __init__(self, params: Params, config: BDHConfig, phase: Phase = "exact") -> None:
        super().__init__(params, config, device="cpu", dtype=params.embed.dtype.name, phase=phase)
        self._params = Params(*(weight.copy() for weight in params))  # cast would have taken the noise off
        self.backend = NumpyBackend.name
