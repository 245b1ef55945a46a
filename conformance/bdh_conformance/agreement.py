"""The one comparison of this project, with a message that can be acted on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bdh_conformance.tolerances import Expectation, error, slope
from bdh_spec.params import Array


def assert_agrees(port: str, actual: Mapping[str, Array], expected: Mapping[str, Expectation], case: str = "") -> None:
    """Demand that a port computed what the specification says, stage by stage in the specification's order.

    Raises AssertionError at the first stage that differs, naming the last one that agreed. NaN never agrees.
    """
    agreed = "nothing before it"
    for name, expectation in expected.items():
        if complaint := disagreement(actual.get(name), expectation):
            raise AssertionError(
                f"{port} differs from the specification at {name} (agrees through {agreed})\n  {complaint}\n  {case}"
            )
        agreed = name


def disagreement(actual: Array | None, expected: Expectation) -> str:
    """What is wrong with an array, or an empty string."""
    reference = expected.reference
    if actual is None:
        return "it is missing"
    if actual.dtype not in (np.float32, np.float64):
        return f"dtype {actual.dtype}, wanted float32 or float64"
    if actual.shape != reference.shape:
        return f"shape {actual.shape}, wanted {reference.shape}"
    if not np.isfinite(actual).all():
        return f"{np.sum(~np.isfinite(actual))} of {actual.size} values are not finite; first at {first(~np.isfinite(actual))}"
    worst, scaled = error(actual, reference), slope(actual, reference)
    if not worst <= expected.allowed:
        return describe(actual, reference, worst, expected.allowed)
    if not abs(scaled) <= expected.allowed_slope:
        return f"all of it is scaled by 1 {scaled:+.1e}, allowed {expected.allowed_slope:.1e}"
    return ""


def describe(actual: Array, reference: Array, worst: float, allowed: float) -> str:
    """Where two finite arrays of one shape differ most."""
    difference = np.abs(actual - reference)
    at = np.unravel_index(np.argmax(difference), difference.shape)
    values = f"{actual[at]:.6g} against {reference[at]:.6g}"
    return f"worst row off by {worst:.1e}, allowed {allowed:.1e}; worst value at {[int(i) for i in at]}: {values}"


def first(where: Array) -> list[int]:
    """The index of the first true value."""
    return [int(i) for i in np.argwhere(where)[0]]
