"""Every test here runs on every port. A port that is missing is an error: the test command installs them all."""

from collections.abc import Callable
from functools import cache

import pytest

import bdh_spec
from bdh_conformance.yardstick.cases import Case
from bdh_spec import Model
from bdh_spec.rope import Phase

PORTS = ("numpy", "torch", "jax", "mlx")


@cache
def load(port: str, case: Case, dtype: str, phase: Phase) -> Model:
    return bdh_spec.get_backend(port).load(case.params, case.config, device="cpu", dtype=dtype, phase=phase)


@pytest.fixture(params=PORTS)
def port(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def loaded(port: str) -> Callable[..., Model]:
    """Load a case on the port under test; models that nothing trains are shared between tests."""

    def on_this_port(case: Case, dtype: str = "float32", phase: Phase = "exact") -> Model:
        return load(port, case, dtype, phase)

    return on_this_port


@pytest.fixture
def claims(port: str) -> Callable[[str], None]:
    """Leave a test of a dtype that the port does not claim, saying so."""

    def dtype(name: str) -> None:
        if name not in bdh_spec.get_backend(port).capabilities.dtypes:
            pytest.skip(f"not claimed: {port} has no {name}")

    return dtype
