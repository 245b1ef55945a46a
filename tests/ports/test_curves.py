"""Two hundred steps from one initialisation, on the same tokens: the ports give one curve, and the picture of it is drawn."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import bdh_spec
from bdh_conformance.channels import CHANNELS
from bdh_conformance.channels.curve import CURVES, STEPS
from bdh_conformance.channels.loading import load
from bdh_conformance.yardstick.tolerances import CHAOS

CURVE, (CASE,) = CHANNELS["curve"], CURVES
FOUND = importlib.util.spec_from_file_location("curves", Path(__file__).parents[2] / "examples" / "curves.py")
DRAWN = importlib.util.module_from_spec(FOUND)
FOUND.loader.exec_module(DRAWN)


@pytest.mark.parametrize("dtype", CURVE.dtypes)
def test_r16_a_port_gives_the_curve_of_the_specification(port: str, dtype: str) -> None:
    observed = CURVE.observe(load(bdh_spec.get_backend(port), replace(CASE), dtype, device="cpu"), CASE)
    wrong = [compared.complaint for compared in CURVE.compare(observed, CASE, dtype) if compared.complaint]
    assert not wrong


@pytest.mark.thorough
def test_the_curve_is_one_of_learning_and_of_rules_not_of_rounding() -> None:
    expected = CURVE.expected(CASE, "float32")
    first, *_, last = (expected[name].reference for name in expected if name.endswith("losses"))
    assert last.mean() < 0.8 * first.mean()
    assert sum(len(each.reference) for name, each in expected.items() if name.endswith("losses")) == STEPS
    allowed = max(float(np.max(each.allowed)) for each in expected.values())
    assert allowed < CHAOS["float32"] / 10, "two hundred steps have made chaos of rounding: look for a calmer case"


def test_the_picture_shows_a_model_that_learns() -> None:
    few = replace(DRAWN.CONFIG, max_steps=30)
    losses = DRAWN.curve(bdh_spec.get_backend("numpy"), "float64", few)
    assert losses[-5:].mean() < losses[:5].mean() - 0.5
