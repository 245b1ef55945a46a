"""R15: the hand-derived gradient against central differences."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings

from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_conformance.yardstick.strategies import cases
from bdh_spec import Params, model
from bdh_spec.gradients import gradients

STEP = 1e-4  # along directions of length one


class CrossesKinkError(Exception):
    """Some relu changes its mind between the points of a difference, where no derivative exists."""


def slope_along(direction: Params, case: Case, keep: list[np.ndarray] | None = None) -> float:
    """The derivative of the loss along a direction, by a fourth-order central difference."""
    active = set()

    def loss(distance: float) -> float:
        moved = Params(*(w + distance * d for w, d in zip(case.params, direction, strict=True)))
        x, layers = model.run(case.tokens, moved, case.config, keep=keep)
        active.add(b"".join(np.packbits(s > 0).tobytes() for layer in layers for s in (layer.x_sparse, layer.y_sparse)))
        return model.loss(model.readout(x, moved), case.targets)

    near, far = loss(STEP) - loss(-STEP), loss(2 * STEP) - loss(-2 * STEP)
    if len(active) > 1:
        raise CrossesKinkError
    return (8 * near - far) / (12 * STEP)


def assert_slopes(slopes: Params, name: str, case: Case, keep: list[np.ndarray] | None = None) -> None:
    """Demand that the slopes in one weight are the loss's along three directions that cross no kink."""
    checked = 0
    for seed in range(30):
        direction = along(name, case, seed)
        with contextlib.suppress(CrossesKinkError):
            claimed = sum(float(np.sum(s * d)) for s, d in zip(slopes, direction, strict=True))
            assert claimed == pytest.approx(slope_along(direction, case, keep), rel=1e-7, abs=1e-9)
            checked += 1
        if checked == 3:
            return
    pytest.fail(f"only {checked} directions of {name} cross no kink in {case}")


def along(name: str, case: Case, seed: int) -> Params:
    """A random direction of length one in one weight, the others at rest."""
    rng = np.random.default_rng(seed)
    normal = {n: rng.normal(size=w.shape) for n, w in case.params._asdict().items()}
    return Params(*(v / np.linalg.norm(v) * (n == name) for n, v in normal.items()))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", Params._fields)
def test_r15_every_gradient_is_the_slope_of_the_loss(config: str, name: str) -> None:
    case = Case(CONFIGS[config], time=6, seed=3, scale=25)
    value, slopes = gradients(case.tokens, case.targets, case.params, case.config)
    assert value == model.loss(model.forward(case.tokens, case.params, case.config), case.targets)
    assert_slopes(slopes, name, case)


@pytest.mark.parametrize("freqs", ["trained", "paired"])
@pytest.mark.parametrize("name", Params._fields)
def test_r15_every_gradient_is_the_slope_of_the_loss_by_a_table_of_the_models_own(name: str, freqs: str) -> None:
    case = Case(CONFIGS["three_heads"], time=6, seed=3, scale=25, freqs=freqs)
    _, slopes = gradients(case.tokens, case.targets, case.params, case.config)
    assert_slopes(slopes, name, case)


@pytest.mark.parametrize("name", Params._fields)
def test_r8_gradients_pass_through_the_dropout_mask(name: str) -> None:
    case = Case(CONFIGS["three_heads"], time=6, seed=5, scale=25)
    keep = model.dropout(case.config, case.tokens.shape, np.dtype(np.float64), np.random.default_rng(0))
    _, slopes = gradients(case.tokens, case.targets, case.params, case.config, keep=keep)
    _, undropped = gradients(case.tokens, case.targets, case.params, case.config)
    assert_slopes(slopes, name, case, keep)
    assert not np.allclose(getattr(slopes, name), getattr(undropped, name))


def test_r15_the_slope_of_relu_at_zero_is_zero() -> None:
    case = Case(CONFIGS["plain"], scale=20)
    params = case.params._replace(encoder=np.zeros_like(case.params.encoder))
    _, slopes = gradients(case.tokens, case.targets, params, case.config)
    assert not slopes.encoder.any()
    assert slopes.lm_head.any()


@settings(max_examples=25)
@given(cases(min_time=2))
def test_r15_an_ignored_target_has_no_slope(case: Case) -> None:
    """Causality backwards: a loss of the first token alone moves only what the first token read."""
    targets = np.full_like(case.targets, -100)
    targets[:, 0] = 0
    _, whole = gradients(case.tokens, targets, case.params, case.config)
    _, alone = gradients(case.tokens[:, :1], targets[:, :1], case.params, case.config)
    for name, a, b in zip(Params._fields, whole, alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * max(1.0, np.abs(b).max()), err_msg=name)
