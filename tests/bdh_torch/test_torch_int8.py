"""Weights in int8 that stay so while a CPU decodes (R17), in every form that ``forms`` chooses from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from bdh_conformance import assert_agrees, expect
from bdh_conformance.outcomes import BAD
from bdh_conformance.plan import TIERS, plan
from bdh_conformance.runner import Run
from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.reference import Stepwise
from bdh_spec import AdamW, BDHConfig, Params
from bdh_spec.int8 import rounded
from bdh_torch import forms, int8
from bdh_torch.backend import TorchBackend, TorchModel
from bdh_torch.int8 import Int8Model

CASE = Case(BDHConfig(3, 8, 0.0, 2, 24, 11), 2, 7, seed=5, scale=20.0, stored="int8")  # N = 96
KEPT = {"KEPT_IN_INT8": 0}
# Thresholds at which a small model is decoded in one form, and what is called then and otherwise not.
FORMS: dict[str, tuple[dict[str, float], set[str]]] = {
    "whole": (KEPT | {"COUNTED": 2**60}, {"product", "decoded"}),
    "blocks": (KEPT | {"COUNTED": 2**60, "BLOCK_OF_STATE": 7 * 8 * 8}, {"product", "decoded"}),
    "chosen": (KEPT | {"COUNTED": 0, "COPIED": 9}, {"product", "columns", "decoded_of"}),
    "pieces": (KEPT | {"COUNTED": 0, "COPIED": 9, "BLOCK_OF_STATE": 300}, {"product", "columns", "decoded_of"}),
    "many": (KEPT | {"COUNTED": 0, "COPIED": -1}, {"product", "decoded"}),
    "rows": (KEPT | {"COUNTED": 2**60, "KEPT": 0, "KEPT_SHARE": 0.5}, {"product", "decoded"}),
}
SPIED = ("product", "decoded", "columns", "decoded_of")
Choose = Callable[[str], Counter[str]]


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Choose:
    """Set the thresholds of a form, and count what is called."""

    def chosen(form: str) -> Counter[str]:
        calls: Counter[str] = Counter()

        def counted(name: str) -> Callable[..., torch.Tensor]:
            function = getattr(int8, name)

            def called(*args: object) -> torch.Tensor:
                calls[name] += 1
                found: torch.Tensor = function(*args)
                return found

            return called

        for name, value in FORMS[form][0].items():
            monkeypatch.setattr(forms, name, value)
        for name in SPIED:
            monkeypatch.setattr(int8, name, counted(name))
        return calls

    return chosen


def load(case: Case, dtype: str = "float32") -> TorchModel:
    model = TorchBackend().load(case.given, case.config, device="cpu", dtype=dtype)
    assert isinstance(model, TorchModel)
    return model


def token_by_token(model: TorchModel, tokens: np.ndarray, *, donate: bool) -> np.ndarray:
    state, logits = model.init_state(len(tokens)), []
    for t in range(tokens.shape[1]):
        part, after = model.advance(state, tokens[:, t : t + 1], donate=donate)
        logits.append(part)
        state = after
    return np.concatenate(logits, axis=1)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_r17_every_form_decodes_what_the_weights_stand_for(choose: Choose, form: str, dtype: str, batch: int) -> None:
    calls, case = choose(form), replace(CASE, batch=batch)
    model = load(case, dtype)
    assert isinstance(model, Int8Model)
    found = {f"donate={donate}": token_by_token(model, case.tokens, donate=donate) for donate in (False, True)}

    def run(params: Params) -> dict[str, np.ndarray]:
        reader = Stepwise(params, case.config)
        logits, _ = reader.advance(reader.init_state(batch), case.tokens)
        return dict.fromkeys(found, logits)

    assert_agrees("torch in int8", found, expect(run, case.params, dtype))
    assert set(calls) == FORMS[form][1]


@pytest.mark.parametrize("form", FORMS)
def test_r17_the_suite_passes_every_form(choose: Choose, form: str) -> None:
    choose(form)
    run = Run(TorchBackend(), "cpu", explains=False)
    tier = replace(TIERS["standard"], examples=0, narrow_examples=0, sized_examples=0)
    results = [run.run(check) for check in plan(tier, TorchBackend.capabilities, channels=["int8"]) if not check.reason]
    assert [result.worst.message for result in results if result.status in BAD and result.worst] == []
    assert sum(result.cases for result in results) > 1


def test_r17_weights_take_a_quarter_until_somebody_trains_the_model(choose: Choose) -> None:
    choose("whole")
    model = load(CASE)
    assert isinstance(model, Int8Model)
    held = model._held
    assert held is not None
    bytes_held = sum(tensor.numel() * tensor.itemsize for weight in held for tensor in weight)
    assert bytes_held == sum(weight.nbytes for weight in CASE.given)
    model.forward(CASE.tokens)
    assert model._held is held
    before = token_by_token(model, CASE.tokens, donate=True)
    optimizer = model.optimizer(AdamW(learning_rate=0.1))
    assert model._held is None
    model.train_step(optimizer, CASE.tokens, CASE.targets)
    assert np.abs(token_by_token(model, CASE.tokens, donate=True) - before).max() > 0.01
    assert model.module is model.module


def test_r17_the_weights_are_copies(choose: Choose) -> None:
    choose("whole")
    given = rounded(CASE.drawn)
    model = TorchBackend().load(given, CASE.config, device="cpu")
    before = model.forward(CASE.tokens)
    for weight in given:
        weight.values[...] = 1
        weight.scale[...] = 1
    np.testing.assert_array_equal(model.forward(CASE.tokens), before)


def test_r17_small_models_are_of_floating_point_numbers() -> None:
    assert not isinstance(load(CASE), Int8Model)


@pytest.mark.thorough  # 25 million weights
def test_r17_the_default_size_is_decoded_in_int8() -> None:
    case = Case(BDHConfig(n_layer=2), 1, 5, seed=3, scale=1.0, stored="int8")
    model = load(case)
    assert isinstance(model, Int8Model)

    def run(params: Params) -> dict[str, np.ndarray]:
        reader = Stepwise(params, case.config)
        return {"logits": reader.advance(reader.init_state(1), case.tokens)[0]}

    found = {"logits": token_by_token(model, case.tokens, donate=True)}
    assert_agrees("torch in int8", found, expect(run, case.params, "float32", runs=1))
