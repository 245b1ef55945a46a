"""R16 as a trainer needs it: a rate per step, several batches to a step, and optimisers that stop, move and go on."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import bdh_spec
from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_conformance.yardstick.tolerances import error
from bdh_spec import AdamW, Model, OptimizerError, OptimizerState, Params, TokensError

CASE = Case(dataclasses.replace(CONFIGS["plain"], dropout=0.0), 4, 6, seed=1, scale=20)
DROPPING = Case(dataclasses.replace(CONFIGS["plain"], dropout=0.3), 4, 6, seed=1, scale=20)
SETTINGS = AdamW(learning_rate=1e-2, eps=1e-3, clip=0.5, seed=5)
NARROW = ("bfloat16",)  # the suite looks at float16 too


def widest(port: str) -> str:
    return "float64" if "float64" in bdh_spec.get_backend(port).capabilities.dtypes else "float32"


def fresh(port: str, case: Case = CASE, dtype: str | None = None, params: Params | None = None) -> Model:
    return bdh_spec.get_backend(port).load(params or case.params, case.config, device="cpu", dtype=dtype or widest(port))


def agree(ours: Params, theirs: Params, allowed: float = 1e-10) -> None:
    assert max(error(np.ravel(a), np.ravel(b)) for a, b in zip(ours, theirs, strict=True)) <= allowed


def steps(model: Model, optimizer: Any, case: Case, first: int, last: int) -> list[float]:
    """The losses of some steps, each on tokens of its own and at a rate of its own."""
    batches = ((np.roll(case.tokens, i, axis=1), np.roll(case.targets, i, axis=1)) for i in range(first, last))
    return [model.train_step(optimizer, *batch, rate=1e-2 / (i + 1)) for i, batch in enumerate(batches, first)]


def test_a_step_s_own_rate_is_that_of_settings_that_say_so(port: str) -> None:
    ours, theirs = fresh(port), fresh(port)
    with_rates, plain = ours.optimizer(SETTINGS), theirs.optimizer(dataclasses.replace(SETTINGS, learning_rate=3e-3))
    for _ in range(3):
        ours.train_step(with_rates, CASE.tokens, CASE.targets, rate=3e-3)
        theirs.train_step(plain, CASE.tokens, CASE.targets)
    agree(ours.params(), theirs.params())
    before = ours.params()
    ours.train_step(with_rates, CASE.tokens, CASE.targets, rate=0.0)
    agree(ours.params(), before, 0.0)
    ours.train_step(with_rates, CASE.tokens, CASE.targets)  # and this one at the settings' rate again
    assert error(ours.params().decoder.ravel(), before.decoder.ravel()) > 1e-4


def test_batches_of_one_step_are_one_large_batch(port: str) -> None:
    """Their targets count alike, however many each has: 1, 6 and 11 of them here, and none at all."""
    ours, theirs = fresh(port), fresh(port)
    targets = CASE.targets.copy()
    targets[0, :5], targets[1] = -100, np.where(CASE.targets[1] == -100, 0, CASE.targets[1])
    ignored = np.full_like(targets[:1], -100)
    batches = [(CASE.tokens[:1], targets[:1]), (CASE.tokens[1:2], targets[1:2]), (CASE.tokens[2:], targets[2:])]
    one, other = ours.optimizer(SETTINGS), theirs.optimizer(SETTINGS)
    for _ in range(2):
        parts = ours.train_on(one, [*batches, (CASE.tokens[:1], ignored)])
        whole = theirs.train_step(other, CASE.tokens, targets)
        assert parts == pytest.approx(whole, rel=1e-10)
    agree(ours.params(), theirs.params())


def test_batches_of_one_step_may_differ_in_their_shapes(port: str) -> None:
    model, reference = fresh(port), fresh("numpy", dtype="float64")
    batches = [(CASE.tokens, CASE.targets), (CASE.tokens[:1, :3], CASE.targets[:1, :3])]
    losses = [m.train_on(m.optimizer(SETTINGS), batches, rate=5e-3) for m in (model, reference)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    agree(model.params(), reference.params())


def test_r8_each_batch_of_a_step_drops_values_of_its_own(port: str) -> None:
    still = AdamW(learning_rate=0.0, weight_decay=0.0)
    model = fresh(port, DROPPING, "float32")  # of the sizes and dtype that other tests compile as well
    one = (DROPPING.tokens, DROPPING.targets)
    first = model.train_step(model.optimizer(still), *one)
    twice = model.train_on(model.optimizer(still), [one, one])
    assert twice != first
    assert twice == model.train_on(model.optimizer(still), [one, one])


@pytest.mark.parametrize("dtype", ["float32", *NARROW])
def test_a_run_taken_up_again_goes_on_bit_for_bit(port: str, dtype: str) -> None:
    if dtype not in bdh_spec.get_backend(port).capabilities.dtypes:
        pytest.skip(f"not claimed: {port} has no {dtype}")
    whole = fresh(port, DROPPING, dtype)
    optimizer = whole.optimizer(SETTINGS)
    steps(whole, optimizer, DROPPING, 0, 3)
    state, params = whole.export_optimizer(optimizer), whole.params()
    assert state.step == 3
    assert state.settings == SETTINGS
    assert {values.dtype for five in (state.first, state.second) for values in five} == {np.dtype(np.float32)}
    resumed = fresh(port, DROPPING, dtype, state.masters or params)
    again = resumed.import_optimizer(state)
    assert steps(resumed, again, DROPPING, 3, 7) == steps(whole, optimizer, DROPPING, 3, 7)
    assert all(np.array_equal(a, b) for a, b in zip(resumed.params(), whole.params(), strict=True))
    assert state.step == 3  # what was exported has not moved on with its model


def test_an_optimizer_moves_between_ports_and_back(port: str) -> None:
    """Three steps on this port, three on another, three here again: those of the specification."""
    reference, model = fresh("numpy", dtype="float64"), fresh(port)
    expected = steps(reference, reference.optimizer(SETTINGS), CASE, 0, 9)
    optimizer, found = model.optimizer(SETTINGS), []
    for first, onto in ((0, "torch" if port != "torch" else "jax"), (3, port), (6, "numpy")):
        found += steps(model, optimizer, CASE, first, first + 3)
        state, params = model.export_optimizer(optimizer), model.params()
        model = fresh(onto, params=params)
        optimizer = model.import_optimizer(state)
    assert found == pytest.approx(expected, rel=1e-9)
    agree(model.params(), reference.params(), 1e-9)


@pytest.mark.parametrize("dtype", NARROW)
def test_r16_what_rounding_takes_off_a_narrow_weight_is_not_lost(port: str, dtype: str) -> None:
    if dtype not in bdh_spec.get_backend(port).capabilities.dtypes:
        pytest.skip(f"not claimed: {port} has no {dtype}")
    case = dataclasses.replace(CASE, scale=5.0)
    model, reference = fresh(port, case, dtype), fresh("numpy", case, "float64")
    start, settings = model.params(), AdamW(weight_decay=0.0, eps=1e-2)
    ours, theirs = model.optimizer(settings), reference.optimizer(settings)
    rate = 3e-5 if dtype == "bfloat16" else 4e-6  # a small part of the distance from a weight to its neighbours
    model.train_step(ours, case.tokens, case.targets, rate=rate)
    assert np.mean(model.params().decoder != start.decoder) < 0.2, "where one step moves the weights nothing is shown"
    for _ in range(79):
        model.train_step(ours, case.tokens, case.targets, rate=rate)
    for _ in range(80):
        reference.train_step(theirs, case.tokens, case.targets, rate=rate)
    wanted = (reference.params().decoder - case.params.decoder).ravel()
    assert error((model.params().decoder - start.decoder).ravel(), wanted) < 0.5, "lost steps would make it 1"
    masters = model.export_optimizer(ours).masters
    assert masters is not None
    assert error((masters.decoder - start.decoder).ravel(), wanted) < 0.2
    assert np.mean(masters.decoder != model.params().decoder) > 0.9


def test_frozen_weights_stay_and_their_slopes_enter_no_norm(port: str) -> None:
    model, reference = fresh(port), fresh("numpy", dtype="float64")
    settings = dataclasses.replace(SETTINGS, frozen=("embed", "lm_head"))
    optimizer, theirs, before = model.optimizer(settings), reference.optimizer(settings), model.params()
    for _ in range(2):
        model.train_step(optimizer, CASE.tokens, CASE.targets)
        reference.train_step(theirs, CASE.tokens, CASE.targets)
    after = model.params()
    assert np.array_equal(after.embed, before.embed)
    assert np.array_equal(after.lm_head, before.lm_head)
    assert not np.array_equal(after.decoder, before.decoder)
    agree(after, reference.params())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_model_of_frozen_weights_stays(dtype: str) -> None:
    """PyTorch's own optimiser wants something to move."""
    model = fresh("torch", dtype=dtype)
    before = model.params()
    optimizer = model.optimizer(dataclasses.replace(SETTINGS, frozen=Params._fields))
    model.train_step(optimizer, CASE.tokens, CASE.targets)
    agree(model.params(), before, 0.0)
    assert model.export_optimizer(optimizer).step == 1


def test_an_optimizer_of_another_model_is_refused(port: str) -> None:
    model, other = fresh(port), fresh(port)
    optimizer = other.optimizer(SETTINGS)
    sentence = "this optimiser belongs to another model: carry it over with export_optimizer and import_optimizer"
    for use in (lambda: model.train_step(optimizer, CASE.tokens, CASE.targets), lambda: model.export_optimizer(optimizer)):
        with pytest.raises(OptimizerError) as raised:
            use()
        assert str(raised.value) == sentence


@pytest.mark.parametrize("rate", [-1e-3, float("nan"), float("inf"), "fast", True])
def test_a_rate_that_is_none_is_refused_before_anything_moves(port: str, rate: Any) -> None:
    model = fresh(port)
    before, optimizer = model.params(), model.optimizer(SETTINGS)
    with pytest.raises(OptimizerError, match=rf"^rate is {rate!r}: give a finite number of at least 0$"):
        model.train_step(optimizer, CASE.tokens, CASE.targets, rate=rate)
    assert model.export_optimizer(optimizer).step == 0
    agree(model.params(), before, 0.0)


def spoilt(state: OptimizerState) -> Iterator[tuple[OptimizerState, str]]:
    """States that no optimiser of the case has."""
    halved = state.first._replace(encoder=state.first.encoder[..., :8])
    yield dataclasses.replace(state, first=halved), "first.encoder has shape (2, 8, 8), the weight (2, 8, 16)"
    turned = state.second._replace(lm_head=state.second.lm_head.T)
    yield dataclasses.replace(state, second=turned), "second.lm_head has shape (11, 8), the weight (8, 11)"
    yield dataclasses.replace(state, masters=turned), "masters.lm_head has shape (11, 8), the weight (8, 11)"
    whole = state.first._replace(embed=state.first.embed.astype(int))
    yield dataclasses.replace(state, first=whole), "first.embed has dtype int64: give float32 or float64"
    yield dataclasses.replace(state, step=-1), "the optimiser made -1 steps: give a whole number of at least 0"


def test_a_state_of_another_optimizer_is_refused(port: str) -> None:
    model = fresh(port)
    state = model.export_optimizer(model.optimizer(SETTINGS))
    for wrong, sentence in spoilt(state):
        with pytest.raises(OptimizerError) as raised:
            model.import_optimizer(wrong)
        assert str(raised.value).startswith(sentence)


def test_a_step_of_no_targets_is_refused(port: str) -> None:
    model = fresh(port)
    optimizer, nothing = model.optimizer(SETTINGS), (CASE.tokens, np.full_like(CASE.targets, -100))
    for batches in ([], [nothing], [nothing, nothing]):
        with pytest.raises(TokensError, match="no batch of this step has a target that counts"):
            model.train_on(optimizer, batches)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\)"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"seed": -1}, "seed is -1"),
        ({"frozen": ("head",)}, "frozen names head: the weights are embed"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_make_no_step_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OptimizerError, match=sentence):
        AdamW(**settings)
