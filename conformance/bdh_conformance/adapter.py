"""A start for adapters: a model that claims one verb at first, and others as they come."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from bdh_spec import AdamW, BDHConfig, CapabilityError, Model, Params, RecurrentState
from bdh_spec.params import Array
from bdh_spec.rope import Phase


class PartialModel(Model):
    """A model of the protocol without verbs: write ``_forward`` and claim it, then the next.

    A verb that is not written raises CapabilityError, and what is not claimed the suite does not ask for.
    """

    def __init__(self, params: Params, config: BDHConfig, *, device: str, dtype: str, phase: Phase) -> None:
        super().__init__(config, device=device, dtype=dtype, phase=phase)
        self.given = Params(*(np.array(weight) for weight in params))

    def params(self) -> Params:
        """The weights that were loaded; a port that trains gives those that it has now."""
        narrow = np.float64 if self.dtype == "float64" else np.float32
        return Params(*(weight.astype(narrow) for weight in self.given))

    def optimizer(self, settings: AdamW) -> Any:
        self._refuse("train")

    def _forward(self, tokens: Array) -> Array:
        self._refuse("forward")

    def _forward_padded(self, tokens: Array, lengths: Array) -> Array:
        self._refuse("padded")

    def _init_state(self, batch: int) -> Any:
        self._refuse("advance")

    def _advance(self, native: Any, position: int, tokens: Array, donate: bool) -> tuple[Array, Any]:
        self._refuse("advance")

    def _loss(self, tokens: Array, targets: Array) -> float:
        self._refuse("loss")

    def _gradients(self, tokens: Array, targets: Array) -> tuple[float, Params]:
        self._refuse("gradients")

    def _trace(self, tokens: Array) -> dict[str, Array]:
        self._refuse("trace")

    def _export_state(self, native: Any) -> tuple[Array, ...]:
        self._refuse("state")

    def _import_state(self, state: RecurrentState) -> Any:
        self._refuse("state")

    def _train_step(self, optimizer: Any, tokens: Array, targets: Array) -> float:
        self._refuse("train")

    def _refuse(self, verb: str) -> NoReturn:
        raise CapabilityError(f"this port has no {verb}: write it in {type(self).__name__} and claim it in its capabilities")
