"""Two hundred steps from one initialisation, on the same bytes: the ports give one curve."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import bdh_spec
from bdh_conformance.adversaries.mistakes import MISTAKES

FOUND = importlib.util.spec_from_file_location("curves", Path(__file__).parents[2] / "examples" / "curves.py")
CURVES = importlib.util.module_from_spec(FOUND)
FOUND.loader.exec_module(CURVES)
curve = CURVES.curve

# Of a loss, in nats. In float32 rounding flips a relu now and then, and a step of Adam makes more of it: by step 200 the curves
# are 0.00095 apart at most, in PyTorch, MLX and JAX. The smallest of the mistakes below takes them 0.023 apart.
ALLOWED = 5e-3
WRONG = ("adam_beta_default", "rate_late", "clip_missing", "adam_uncorrected", "theta_2_15")


@pytest.fixture(scope="module")
def wanted() -> np.ndarray:
    return curve(bdh_spec.get_backend("numpy"), "float64")


def test_the_curve_falls(wanted: np.ndarray) -> None:
    assert wanted[:5].mean() > 5.3
    assert wanted[-20:].mean() < 3.6


def test_a_port_gives_the_curve_of_the_specification(port: str, wanted: np.ndarray) -> None:
    assert np.abs(curve(bdh_spec.get_backend(port), "float32") - wanted).max() <= ALLOWED


@pytest.mark.parametrize("mistake", WRONG)
def test_a_known_mistake_gives_another(mistake: str, wanted: np.ndarray) -> None:
    assert np.abs(curve(MISTAKES[mistake].backend(), "float32") - wanted).max() > 4 * ALLOWED
