"""One small model, one reference, and a counter of compilations: JAX compiles per shape, so tests share theirs."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import pytest

import bdh_spec
from bdh_jax.backend import JAXBackend
from bdh_spec.numpy_backend import NumpyBackend
from bdh_spec.params import Params, init
from bdh_spec.protocol import Model

CONFIG = bdh_spec.BDHConfig(n_layer=3, n_embd=8, n_head=3, mlp_internal_dim_multiplier=6, vocab_size=11, dropout=0.2)
Load = Callable[..., tuple[Model, Model]]


@pytest.fixture(scope="session")
def config() -> bdh_spec.BDHConfig:
    return CONFIG


@pytest.fixture(scope="session")
def params() -> Params:
    """Weights large enough for every stage to matter."""
    return Params(*(10 * weight for weight in init(CONFIG, np.random.default_rng(0))))


@pytest.fixture(scope="session")
def pair(params: Params) -> Load:
    """This port and the specification with the same weights; the specification in float64 whatever the port's dtype."""

    def load(dtype: str = "float64", phase: str = "exact") -> tuple[Model, Model]:
        return (
            JAXBackend().load(params, CONFIG, dtype=dtype, phase=phase),
            NumpyBackend().load(params, CONFIG, dtype="float64", phase=phase),
        )

    return load


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, CONFIG.vocab_size, (2, 8))


@pytest.fixture(scope="session")
def targets(tokens: np.ndarray) -> np.ndarray:
    """Shifted tokens, some of them ignored."""
    shifted = np.roll(tokens, -1, axis=1)
    shifted[0, :3] = -100
    return shifted


_compiled: list[str] = []


def _count(event: str, _seconds: float, **_: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(event)


@pytest.fixture(scope="session", autouse=True)
def _listen() -> None:
    jax.monitoring.register_event_duration_secs_listener(_count)


@pytest.fixture
def compilations() -> list[str]:
    """A list that grows by one for every program that XLA compiles, the smallest helpers included."""
    _compiled.clear()
    return _compiled
