"""The parallel, the chunked and the recurrent form against the specification, and what the state costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bdh_conformance.yardstick.agreement import assert_agrees
from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_conformance.yardstick.tolerances import FLOAT64, Expectation
from bdh_spec import RecurrentState as ExportedState
from bdh_spec import get_backend
from bdh_spec.rope import PHASES, Phase
from bdh_torch import BDH, RecurrentState, forms
from bdh_torch.backend import TorchBackend, TorchModel

CASES = {name: Case(config, time=11, seed=1, scale=10) for name, config in CONFIGS.items()}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_phase = pytest.mark.parametrize("phase", PHASES)


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths at which small texts already take the chunked form, the last chunk ragged."""
    monkeypatch.setattr(forms, "CHUNK", 4)
    monkeypatch.setattr(forms, "WHOLE", 5)
    monkeypatch.setattr(forms, "WHOLE_WITH_GRADIENTS", 5)


def both(case: Case, phase: Phase = "exact") -> tuple[TorchModel, Any]:
    """The port and the specification in float64."""
    given = {"device": "cpu", "dtype": "float64", "phase": phase}
    return (
        TorchBackend().load(case.params, case.config, **given),
        get_backend("numpy").load(case.params, case.config, **given),
    )


def agree(actual: dict[str, np.ndarray], reference: dict[str, np.ndarray], case: Case) -> None:
    assert_agrees("torch", actual, {name: Expectation(value, FLOAT64, FLOAT64) for name, value in reference.items()}, str(case))


@each_phase
@each_case
def test_every_stage_and_the_order_of_stages(case: Case, phase: Phase) -> None:
    port, reference = both(case, phase)
    actual, expected = port.trace(case.tokens), reference.trace(case.tokens)
    assert list(actual) == list(expected)
    agree(actual, expected, case)
    assert np.array_equal(actual["logits"], port.forward(case.tokens))


@each_case
def test_r15_every_gradient(case: Case) -> None:
    port, reference = both(case)
    (loss, slopes), (expected, reference_slopes) = (m.gradients(case.tokens, case.targets) for m in (port, reference))
    assert loss == pytest.approx(expected, rel=FLOAT64)
    agree(slopes._asdict(), reference_slopes._asdict(), case)


@pytest.mark.usefixtures("short_chunks")
@each_phase
@each_case
def test_r13_a_long_text_is_read_in_chunks(case: Case, phase: Phase) -> None:
    port, reference = both(case, phase)
    agree({"logits": port.forward(case.tokens)}, {"logits": reference.forward(case.tokens)}, case)


@pytest.mark.usefixtures("short_chunks")
@each_case
def test_r15_gradients_pass_through_the_chunks_of_a_long_text(case: Case) -> None:
    port, reference = both(case)
    _, slopes = port.gradients(case.tokens, case.targets)
    agree(slopes._asdict(), reference.gradients(case.tokens, case.targets)[1]._asdict(), case)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("split", [(1,) * 11, (1, 10), (10, 1), (2, 1, 5, 3), (6, 5)], ids=str)
@pytest.mark.parametrize("donate", [True, False])
@each_case
def test_r13_any_split_of_a_text_computes_the_same(case: Case, split: tuple[int, ...], donate: bool) -> None:
    port, reference = both(case)
    state, logits, start = port.init_state(case.batch), [], 0
    for length in split:
        part, state = port.advance(state, case.tokens[:, start : start + length], donate=donate)
        logits.append(part)
        start += length
    _, after = reference.advance(reference.init_state(case.batch), case.tokens)
    actual = {f"layers.{i}": memory for i, memory in enumerate(port.export_state(state).layers)}
    expected = {f"layers.{i}": memory for i, memory in enumerate(reference.export_state(after).layers)}
    agree({"logits": np.concatenate(logits, axis=1), **actual}, {"logits": reference.forward(case.tokens), **expected}, case)


@each_phase
@pytest.mark.parametrize("start", [0, 10**4, 10**6, 2**24 + 1, 2**40, 2**63 - 11])
def test_r4_positions_far_into_a_text(start: int, phase: Phase) -> None:
    case = CASES["three_heads"]
    c, rng = case.config, np.random.default_rng(2)
    given = ExportedState(start, tuple(rng.normal(size=(2, c.n_head, c.n_neurons, c.n_embd)) for _ in range(c.n_layer)))
    actual, expected = (m.advance(m.import_state(given), case.tokens)[0] for m in both(case, phase))
    agree({"logits": actual}, {"logits": expected}, case)


@pytest.fixture
def streaming() -> tuple[BDH, RecurrentState, Tensor]:
    """A model, a state of it that has read something, and tokens to read next."""
    case = CASES["three_heads"]
    model = TorchBackend().load(case.params, case.config, device="cpu").module
    tokens = torch.tensor(case.tokens)
    with torch.no_grad():
        _, state = model.advance(model.init_state(2), tokens[:, :4])
    return model, state, tokens[:, 4:]


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("length", [1, 7])
@torch.no_grad()
def test_r13_a_donated_state_is_updated_in_place(streaming: tuple[BDH, RecurrentState, Tensor], length: int) -> None:
    model, state, tokens = streaming
    _, after = model.advance(state, tokens[:, :length], donate=True)
    assert [m.data_ptr() for m in after.layers] == [m.data_ptr() for m in state.layers]


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("records", [True, False])
def test_r13_a_state_that_is_kept_stays_as_it_is(
    streaming: tuple[BDH, RecurrentState, Tensor], length: int, records: bool
) -> None:
    model, state, tokens = streaming
    before = [memory.clone() for memory in state.layers]
    with torch.set_grad_enabled(records):
        model.advance(state, tokens[:, :length])
    assert all(torch.equal(a, b) for a, b in zip(before, state.layers, strict=True))


def test_r15_gradients_pass_through_a_donated_state(streaming: tuple[BDH, RecurrentState, Tensor]) -> None:
    model, _, tokens = streaming
    model.double()
    state, logits = model.init_state(2), []
    for token in tokens.split(3, dim=1):
        part, state = model.advance(state, token, donate=True)
        logits.append(part)
    slopes = torch.autograd.grad(torch.cat(logits, dim=1).square().sum(), list(model.parameters()))
    whole = torch.autograd.grad(model.trace(tokens).square().sum(), list(model.parameters()))
    for slope, expected in zip(slopes, whole, strict=True):
        torch.testing.assert_close(slope, expected, rtol=0, atol=FLOAT64 * expected.abs().max().item())


class Allocations(TorchDispatchMode):
    """The largest tensor that any operation makes, in values, leaving out memory that ``known`` tensors own."""

    def __init__(self, known: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_r13_a_step_makes_nothing_larger_than_one_token_of_neurons(dtype: torch.dtype) -> None:
    config = CONFIGS["plain"]
    model = BDH(config).to(dtype).eval()
    state = model.init_state(3)
    _, state = model.advance(state, torch.zeros(3, 9, dtype=torch.long), donate=True)
    with Allocations((*state.layers, *model.parameters())) as made:
        for _ in range(3):
            _, state = model.advance(state, torch.zeros(3, 1, dtype=torch.long), donate=True)
    assert made.largest <= max(3 * config.n_head * config.n_neurons, 3 * config.vocab_size)
    assert all(memory.dtype == torch.float32 for memory in state.layers)


@pytest.mark.usefixtures("short_chunks")
@torch.no_grad()
def test_r13_a_long_prompt_makes_nothing_larger_than_one_chunk_of_neurons_or_its_logits() -> None:
    config = CONFIGS["plain"]
    model, T = BDH(config).eval(), 40
    state = model.init_state(1)
    with Allocations((*state.layers, *model.parameters())) as made:
        model.advance(state, torch.zeros(1, T, dtype=torch.long), donate=True)
    assert made.largest <= max(4 * config.n_head * config.n_neurons, T * config.vocab_size)
