"""Every test here runs on every port. A port that is missing is an error: the test command installs them all."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest

import bdh_spec
from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_spec import Model
from bdh_spec.rope import Phase

PORTS = ("numpy", "torch", "jax", "mlx")

# XLA compiles each model, dtype and verb for a second or more. In `make test` one model stands for all of these on JAX; the
# others are left to `make test-thorough`, and the standard tier (`make conform`) looks at more models.
COMPILED = (
    "test_every_stage_agrees",
    "test_r15_every_gradient_agrees",
    "test_r13_any_split_agrees_with_the_parallel_form",
    "test_a_model_is_loaded_on_one_thread_and_each_call_may_come_from_another",
    "test_several_threads_may_ask_one_model_at_once",
    "test_the_smallest_sizes_and_many_texts_agree",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        values = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if values.get("port") == "jax" and getattr(item, "originalname", "") in COMPILED and not stands_for_all(values):
            item.add_marker("thorough")


def stands_for_all(values: Mapping[str, Any]) -> bool:
    """Whether a test of many models is that of the one."""
    if "case" in values:
        return values["case"].config == CONFIGS["three_heads"]
    usual = {"config": "three_heads", "split": (2, 3, 1), "channel": "states", "batch": 130, "time": 3}
    return all(values[name] == value for name, value in usual.items() if isinstance(values.get(name), type(value)))


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
