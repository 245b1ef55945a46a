"""Models of a case: loaded, and knowing how to load their like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.reference import Specification
from bdh_spec import Backend, Model, Params
from bdh_spec.protocol import VERBS
from bdh_spec.rope import Phase


@dataclass(frozen=True)
class Origin:
    """Where a loaded model came from."""

    backend: Backend
    device: str | None
    dtype: str
    phase: Phase


ORIGINS: WeakKeyDictionary[Model, Origin] = WeakKeyDictionary()


def load(backend: Backend, case: Case, dtype: str, phase: Phase = "exact", device: str | None = None) -> Model:
    """A model of this case, which knows how to load its like: some properties compare two sets of weights."""
    return load_params(Origin(backend, device, dtype, phase), case.given, case)


def load_params(origin: Origin, params: Params, case: Case) -> Model:
    model = origin.backend.load(params, case.config, device=origin.device, dtype=origin.dtype, phase=origin.phase)
    ORIGINS[model] = origin
    return model


def loaded_again(model: Model, case: Case) -> Model:
    """Another model of the same port with the weights of the case."""
    origin = ORIGINS.get(model)
    return load_params(origin, case.given, case) if origin else Specification(case.params, case.config, model.phase)


def sibling(model: Model, case: Case, change: Callable[[Params], Params], n_layer: int) -> Model:
    """Another model of the same port, with weights changed in a way that keeps the noise of a reference, and other layers."""
    config, origin = replace(case.config, n_layer=n_layer), ORIGINS.get(model)
    if origin is not None:
        return load_params(origin, change(case.params), replace(case, config=config))
    return model.over(change(model.own_params), config) if isinstance(model, Specification) else model


def claims(model: Model, *verbs: str) -> bool:
    """Whether the model's port has these verbs."""
    origin = ORIGINS.get(model)
    return set(verbs) <= set(origin.backend.capabilities.verbs if origin else VERBS)
