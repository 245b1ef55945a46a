"""One optimiser for all ports, and nothing but the five weights moves (R8, R15)."""

import dataclasses

import numpy as np
import pytest

import bdh_spec
from bdh_conformance import Expectation, assert_agrees
from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_spec import AdamW, Model

CASE = Case(dataclasses.replace(CONFIGS["plain"], dropout=0.0), time=6, seed=1, scale=20)
SETTINGS = AdamW(learning_rate=1e-2, weight_decay=0.1, clip=0.5)
# float64 is what separates a wrong AdamW from rounding; a port without it is held to float32 rounding of three steps, in
# which a slope near zero can flip Adam's sign and move one weight by a whole learning rate: hence the lot, not each weight.
ALLOWED = {"float64": 1e-10, "float32": 1e-4}


def fresh(port: str, case: Case = CASE, dtype: str | None = None) -> Model:
    backend = bdh_spec.get_backend(port)
    dtype = dtype or ("float64" if "float64" in backend.capabilities.dtypes else "float32")
    return backend.load(case.params, case.config, device="cpu", dtype=dtype)


def test_three_steps_move_the_weights_as_the_specification_does(port: str) -> None:
    model, reference = fresh(port), fresh("numpy", dtype="float64")
    ours, theirs = model.optimizer(SETTINGS), reference.optimizer(SETTINGS)
    for _ in range(3):
        losses = [m.train_step(o, CASE.tokens, CASE.targets) for m, o in ((model, ours), (reference, theirs))]
        assert losses[0] == pytest.approx(losses[1], rel=ALLOWED[model.dtype])
    moved = {
        name: Expectation(w.ravel(), ALLOWED[model.dtype], ALLOWED[model.dtype])
        for name, w in reference.params()._asdict().items()
    }
    assert_agrees(port, {name: w.ravel() for name, w in model.params()._asdict().items()}, moved)


def test_training_lowers_the_loss(port: str) -> None:
    model = fresh(port, dtype="float32")
    optimizer, before = model.optimizer(AdamW(learning_rate=1e-2)), model.loss(CASE.tokens, CASE.targets)
    for _ in range(10):
        model.train_step(optimizer, CASE.tokens, CASE.targets)
    assert model.loss(CASE.tokens, CASE.targets) < 0.5 * before


def test_r8_dropout_acts_in_training_only_and_follows_its_seed(port: str) -> None:
    case = Case(dataclasses.replace(CASE.config, dropout=0.5), time=6, seed=1, scale=20)

    def first_losses(seed: int) -> list[float]:
        model = fresh(port, case, "float32")
        optimizer = model.optimizer(AdamW(learning_rate=0.0, weight_decay=0.0, seed=seed))
        return [model.train_step(optimizer, case.tokens, case.targets) for _ in range(3)]

    model = fresh(port, case, "float32")
    still = model.loss(case.tokens, case.targets)
    assert still == model.loss(case.tokens, case.targets)
    assert still == pytest.approx(fresh("numpy", case, "float64").loss(case.tokens, case.targets), rel=1e-5)
    losses = first_losses(0)
    assert len({*losses, still}) == 4
    assert losses == first_losses(0)
    assert losses != first_losses(1)
    model.train_step(model.optimizer(AdamW(learning_rate=0.0, weight_decay=0.0)), case.tokens, case.targets)
    assert np.array_equal(model.forward(case.tokens), model.forward(case.tokens))
