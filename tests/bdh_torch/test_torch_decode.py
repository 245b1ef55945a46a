"""Decoding token by token, in every form that ``forms`` chooses from, against the specification."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bdh_conformance.outcomes import BAD
from bdh_conformance.plan import TIERS, plan
from bdh_conformance.runner import Run
from bdh_conformance.yardstick.agreement import assert_agrees
from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.reference import Stepwise
from bdh_conformance.yardstick.tolerances import FLOAT64, expect
from bdh_spec import BDHConfig
from bdh_spec.params import Params
from bdh_torch import BDH, decode, forms, native
from bdh_torch.attention import read, write
from bdh_torch.backend import TorchBackend, TorchModel

CONFIG = BDHConfig(n_layer=3, n_embd=8, n_head=2, mlp_internal_dim_multiplier=24, vocab_size=11)  # N = 96
KEPT = 5  # tokens that rows remember below
NEVER = {"COUNTED": 2**60, "KEPT": 2**60}
# Thresholds at which a small model is decoded in one form, and what is called then and otherwise not.
FORMS: dict[str, tuple[dict[str, float], set[str]]] = {
    "whole": (NEVER, set()),
    "blocks": (NEVER | {"BLOCK_OF_STATE": 7 * 8 * 8}, {"_through_blocks"}),
    "groups": (NEVER | {"BLOCK_OF_STATE": 96 * 8 * 8}, {"_through_blocks"}),
    "summed": (NEVER | {"COUNTED": 0, "COPIED": -1, "SUMMED": 1}, {"_decoded"}),
    "copied": (NEVER | {"COUNTED": 0, "COPIED": 9, "SUMMED": 9}, {"_through_pairs", "_columns", "_decoded"}),
    "pieces": (
        NEVER | {"COUNTED": 0, "COPIED": 9, "SUMMED": 9, "BLOCK_OF_STATE": 300},
        {"_through_pairs", "_columns", "_decoded"},
    ),
    "neither": (NEVER | {"COUNTED": 0, "COPIED": -1, "SUMMED": -1}, set()),
    "rows": (NEVER | {"KEPT": 0, "KEPT_SHARE": KEPT / 8}, {"_weighted"}),
    "rows_copied": (
        {"KEPT": 0, "KEPT_SHARE": KEPT / 8, "COUNTED": 0, "COPIED": 9, "SUMMED": 9},
        {"_weighted", "_through_pairs", "_columns", "_decoded"},
    ),
}
SPIED = {"_through_blocks", "_through_pairs", "_columns", "_decoded"}
each_form = pytest.mark.parametrize("form", FORMS)


class Chooser:
    """Sets thresholds, and counts what is called. PyTorch's operations read everything, unless C is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch, self.calls, self.usual = monkeypatch, Counter[str](), decode._in_c
        self.in_c(wanted=False)
        for where, name in [*((decode, name) for name in SPIED), (decode.Rows, "_weighted"), (decode, "gated")]:
            monkeypatch.setattr(where, name, self._counted(name, getattr(where, name)))

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            self.calls[name] += 1
            return function(*args, **options)

        return called

    def in_c(self, *, wanted: bool) -> None:
        self.patch.setattr(decode, "_in_c", self.usual if wanted else lambda _: None)

    def __call__(self, thresholds: dict[str, float]) -> None:
        for name, value in thresholds.items():
            self.patch.setattr(forms, name, value)


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Chooser:
    return Chooser(monkeypatch)


def specified(case: Case, lengths: tuple[int, ...]) -> Callable[[Params], dict[str, np.ndarray]]:
    """The specification's logits, and its states after so many tokens."""

    def run(params: Params) -> dict[str, np.ndarray]:
        model = Stepwise(params, case.config)
        state, logits, found = model.init_state(case.batch), [], dict[str, np.ndarray]()
        for first, last in pairwise((0, *lengths)):
            part, state = model.advance(state, case.tokens[:, first:last])
            logits.append(part)
            found |= {f"{last}.{i}": memory for i, memory in enumerate(model.export_state(state).layers)}
        return found | {"logits": np.concatenate(logits, axis=1)}

    return run


def decoded(model: TorchModel, case: Case, lengths: tuple[int, ...], *, reimports: bool = False) -> dict[str, np.ndarray]:
    """The same by single tokens, the state now kept and now donated; or exported and taken in again where one is asked for."""
    state, logits, found = model.init_state(case.batch), [], dict[str, np.ndarray]()
    for t in range(case.time):
        donate = bool(t % 3)
        part, after = model.advance(state, case.tokens[:, t : t + 1], donate=donate)
        if not donate:  # it was kept, so it can be read on from again
            again, _ = model.advance(state, case.tokens[:, t : t + 1])
            assert np.array_equal(part, again)
        logits, state = [*logits, part], after
        if t + 1 in lengths:
            native = copy.deepcopy(state.native)  # looking at a state turns rows into what they add up to: look at a copy
            found |= {f"{t + 1}.{i}": memory for i, memory in enumerate(model._export_state(native))}
            state = model.import_state(model.export_state(state)) if reimports else state
    return found | {"logits": np.concatenate(logits, axis=1)}


@pytest.mark.parametrize(("kind", "reimports"), [("normal", False), ("dead", True)])
@pytest.mark.parametrize("batch", [1, 8])
@each_form
def test_r13_every_form_is_the_specification(choose: Chooser, form: str, batch: int, kind: str, reimports: bool) -> None:
    case, lengths = Case(CONFIG, batch, 8, seed=3, scale=12, weights=kind), (1, KEPT, KEPT + 1, 8)
    thresholds, called = FORMS[form]
    choose(thresholds)
    port = TorchBackend().load(case.params, CONFIG, device="cpu", dtype="float64")
    actual = decoded(port, case, lengths, reimports=reimports)
    assert {name for name in choose.calls if name != "gated"} == called
    assert_agrees("torch", actual, expect(specified(case, lengths), case.params, "float64"), f"{case} {form}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("form", ["blocks", "copied", "rows_copied", "in_c"])
def test_r13_every_dtype_is_as_near_as_it_can_be(choose: Chooser, form: str, batch: int, dtype: str) -> None:
    case, lengths = Case(CONFIG, batch, 8, seed=4, scale=12), (8,)
    choose.in_c(wanted=form == "in_c")
    choose(FORMS["neither" if form == "in_c" else form][0])
    port = TorchBackend().load(case.params, CONFIG, device="cpu", dtype=dtype)
    actual = decoded(port, case, lengths)
    assert_agrees("torch", actual, expect(specified(case, lengths), case.params, dtype), f"{case} {form}")
    _, state = port.module.advance(port.module.init_state(1), torch.zeros(1, 1, dtype=torch.long))
    assert {memory.dtype for memory in state.layers} == {torch.float32}


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_state_is_written_by_pairs_up_to_a_share_of_them(choose: Chooser, batch: int, more: int) -> None:
    G, N, D, rng = 2 * batch, 40, 4, np.random.default_rng(5)
    choose({"COPIED": 0.25})
    pairs = np.zeros(G * N // 2, bool)
    pairs[rng.permutation(pairs.size)[: pairs.size // 4 + more]] = True
    active = torch.from_numpy(np.stack([pairs, pairs & (rng.random(pairs.size) < 0.5)], -1).reshape(2, batch, N))
    rotated = torch.from_numpy(rng.normal(size=(G, 1, N)) * np.repeat(pairs, 2).reshape(G, 1, N))
    state, v = torch.from_numpy(rng.normal(size=(G, N, D))), torch.from_numpy(rng.normal(size=(batch, 1, D)))
    attention, after = read(state, rotated), write(state, rotated, v.repeat(2, 1, 1))
    torch.testing.assert_close(decode.through(state, rotated, v, active), attention, rtol=0, atol=FLOAT64)
    torch.testing.assert_close(state, after, rtol=0, atol=FLOAT64)
    assert choose.calls["_through_pairs"] == 1 - more


@pytest.mark.parametrize(("share", "columns", "sums"), [(0.2, 1, 1), (0.3, 0, 1), (0.6, 0, 0)])
def test_columns_and_rows_are_chosen_up_to_a_share_of_them(choose: Chooser, share: float, columns: int, sums: int) -> None:
    """Of xy_sparse every neuron is active that is active at all, for encoder_v is positive here, and so is what it reads."""
    h, D, N = 2, 4, 20
    choose({"COUNTED": 0, "COPIED": 0.25, "SUMMED": 0.5})
    encoder = torch.zeros(h, D, N, dtype=torch.float64)
    encoder.view(h * D, N)[::D, : int(share * N)] = 1
    encoder_v = decode.neurons_first(torch.zeros(h, D, N, dtype=torch.float64))
    encoder_v[:, 0] = torch.rand(h, N)
    weights = decode.Weights(encoder, encoder_v, torch.randn(h * N, D, dtype=torch.float64))
    x = torch.tensor([[3.0, -1, -1, -1]], dtype=torch.float64)
    turns = torch.ones(N // 2, dtype=torch.complex128)
    actual = decode.gated(x, x, weights, turns, lambda rotated, v, active: v.expand(h, 1, D))
    y = (decode.layer_norm(x) @ encoder_v).relu()[:, 0] * (x @ encoder).relu()[:, 0]  # h N
    torch.testing.assert_close(actual, y.view(1, h * N) @ weights.decoder)
    assert (choose.calls["_columns"], choose.calls["_decoded"]) == (columns, sums)


def small(form: str, choose: Chooser, dtype: torch.dtype = torch.float64) -> BDH:
    """A model that is decoded in this form."""
    choose(FORMS[form][0])
    torch.manual_seed(0)
    model = BDH(CONFIG).to(dtype).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(12)
    return model.laid_out_for_decoding()


def plainly(model: BDH) -> BDH:
    """The same weights, decoded by the plain kernel."""
    other = BDH(CONFIG, kernel="plain").to(model.encoder.dtype).eval()
    other.load_state_dict(model.state_dict())
    return other


def same(actual: Tensor, expected: Tensor) -> None:
    """Equal to rounding in float64."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=FLOAT64 * expected.abs().max().item())


TOKENS = torch.arange(2 * 9).view(2, 9).remainder(11)


@torch.no_grad()
def test_a_short_text_is_kept_as_rows_and_turns_into_a_state_by_itself(choose: Chooser) -> None:
    model = small("rows", choose)
    state = model.init_state(2)
    for t, token in enumerate(TOKENS.split(1, dim=1), 1):
        _, state = model.advance(state, token, donate=True)
        assert isinstance(state.layers, decode.Memories)
        assert {isinstance(memory.held, decode.Rows) for memory in state.layers.each} == {t <= KEPT}


@pytest.mark.parametrize("lengths", [(3, 2, 1, 3), (KEPT, 4), (KEPT - 1, 2, 3), (KEPT + 1, 3)], ids=str)
@pytest.mark.parametrize("donate", [False, True])
@torch.no_grad()
def test_r13_rows_are_read_on_by_pieces_of_any_length(choose: Chooser, lengths: tuple[int, ...], donate: bool) -> None:
    model = small("rows", choose)
    state, logits = model.init_state(2), []
    for piece in TOKENS.split(lengths, dim=1):
        part, state = model.advance(state, piece, donate=donate)
        logits.append(part)
    same(torch.cat(logits, dim=1), plainly(model)(TOKENS)[0])


@pytest.mark.parametrize("form", ["rows", "copied", "blocks"])
@torch.no_grad()
def test_r13_two_texts_go_on_from_one_kept_state(choose: Chooser, form: str) -> None:
    model = small(form, choose)
    _, start = model.advance(model.init_state(2), TOKENS[:, :2])
    texts = [TOKENS, torch.cat((TOKENS[:, :2], TOKENS[:, 2:].flip(1)), dim=1)]
    states, logits = [start, start], [list[Tensor](), list[Tensor]()]
    for t in range(2, 9):
        for i, text in enumerate(texts):  # in turns, the first step of each from the state that is kept
            part, states[i] = model.advance(states[i], text[:, t : t + 1], donate=t > 2)
            logits[i].append(part)
    for text, found in zip(texts, logits, strict=True):
        same(torch.cat(found, dim=1), plainly(model)(text)[0][:, 2:])


@torch.no_grad()
def test_r13_who_looks_at_a_state_of_rows_may_change_it(choose: Chooser) -> None:
    model = small("rows", choose)
    _, state = model.advance(model.init_state(2), TOKENS[:, :3])
    other = copy.deepcopy(state)
    for memory in state.layers:
        memory.mul_(-2)
    assert not any(isinstance(memory.held, decode.Rows) for memory in state.layers.each)
    expected = plainly(model)
    _, doubled = expected.advance(expected.init_state(2), TOKENS[:, :3])
    for moved, untouched, memory in zip(state.layers, other.layers, doubled.layers, strict=True):
        same(moved, -2 * memory)
        same(untouched, memory)
        memory.mul_(-2)
    same(model.advance(state, TOKENS[:, 3:4])[0], expected.advance(doubled, TOKENS[:, 3:4])[0])


@pytest.mark.parametrize("form", ["rows", "whole"])
@torch.no_grad()
def test_r4_a_text_may_go_on_anywhere(choose: Chooser, form: str) -> None:
    model = small(form, choose)
    expected, logits = plainly(model), list[list[Tensor]]()
    for each in (model, expected):
        _, state = each.advance(each.init_state(2), TOKENS[:, :2])
        state = replace(state, position=2**40 + 3)  # far from where the first two are
        logits.append([])
        for token in TOKENS[:, 2:].split(1, dim=1):
            part, state = each.advance(state, token, donate=True)
            logits[-1].append(part)
    same(*(torch.cat(parts, dim=1) for parts in logits))


@pytest.mark.parametrize("form", ["rows", "copied", "whole", "blocks"])
@torch.no_grad()
def test_r13_a_donated_state_stays_where_it_is_and_nothing_grows(choose: Chooser, form: str) -> None:
    model = small(form, choose, torch.float32)
    _, state = model.advance(model.init_state(2), TOKENS[:, :2])

    def places(state: Any) -> list[int]:
        held = [memory.held for memory in state.layers.each] if isinstance(state.layers, decode.Memories) else state.layers
        return [(each.keys if isinstance(each, decode.Rows) else each).data_ptr() for each in held]

    before = places(state)
    for token in TOKENS[:, 2:KEPT].split(1, dim=1):
        _, state = model.advance(state, token, donate=True)
        assert places(state) == before


def edit(model: BDH, how: str) -> None:
    """Change encoder_v, and the other weights, in one of the ways in which weights change."""
    other = {name: 2 * value for name, value in model.state_dict().items() if name != "attn.freqs"}
    match how:
        case "optimizer":
            for weight in model.parameters():
                weight.grad = torch.ones_like(weight)
            torch.optim.AdamW(model.parameters(), lr=0.1).step()
        case "load":
            model.load_state_dict(other, strict=False)
        case "assign":
            model.load_state_dict(other, strict=False, assign=True)
        case "in place":
            with torch.no_grad():
                model.encoder_v[1].mul_(-1)
        case "data":
            model.encoder_v.data.mul_(-1)
        case "memory":
            model.encoder_v.detach().numpy()[0] *= -3


@pytest.mark.parametrize("how", ["optimizer", "load", "assign", "in place", "data", "memory"])
@pytest.mark.parametrize("form", ["copied", "rows_copied"])
def test_no_weight_is_read_as_it_was_before_it_changed(choose: Chooser, form: str, how: str) -> None:
    model = small(form, choose)
    with torch.no_grad():
        _, state = model.advance(model.init_state(2), TOKENS[:, :1])
        _, state = model.advance(state, TOKENS[:, 1:2])
    edit(model, how)
    expected = plainly(model)
    with torch.no_grad():
        _, wanted = plainly(small(form, choose)).advance(model.init_state(2), TOKENS[:, :2])
        same(model.advance(state, TOKENS[:, 2:3])[0], expected.advance(wanted, TOKENS[:, 2:3])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_order_of_memory_changes_no_weight_and_training_goes_on(dtype: torch.dtype) -> None:
    usual = BDH(CONFIG).to(dtype)
    laid = copy.deepcopy(usual).laid_out_for_decoding()
    assert decode.is_neurons_first(laid.encoder_v)
    assert laid.encoder.is_contiguous()
    for weight, other in zip(usual.parameters(), laid.parameters(), strict=True):
        assert torch.equal(weight, other)
    held = list(laid.parameters())
    for model in (usual, laid):
        torch.manual_seed(1)
        model(TOKENS, TOKENS)[1].backward()
    for weight, other in zip(usual.parameters(), held, strict=True):
        torch.testing.assert_close(weight.grad, other.grad)
    laid.load_state_dict(usual.state_dict())
    assert decode.is_neurons_first(laid.encoder_v)
    assert all(weight.flags.c_contiguous for weight in TorchBackend().load(Case(CONFIG).params, CONFIG, device="cpu").params())


@pytest.mark.parametrize("least", [0, 2**60])
def test_the_port_lays_out_weights_of_which_it_would_choose_columns(choose: Chooser, least: int) -> None:
    choose({"COUNTED": least})
    port = TorchBackend().load(Case(CONFIG).params, CONFIG, device="cpu")
    assert isinstance(port, TorchModel)
    assert decode.is_neurons_first(port.module.encoder_v) == (least == 0)


@torch.no_grad()
def test_padding_is_remembered_by_nobody(choose: Chooser) -> None:
    model = small("copied", choose)
    state = torch.randn(4, CONFIG.n_neurons, CONFIG.n_embd, dtype=torch.float64)
    x, before = decode.layer_norm(model.embed(TOKENS[:, 0])), state.clone()
    turns = torch.ones(CONFIG.n_neurons // 2, dtype=torch.complex128)
    memory = decode.Memory(state)
    kept = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    decode.gated(x, x * kept, model.weights, turns, memory.through)
    changed = (state != before).view(2, 2, -1).any(-1)
    assert changed.tolist() == [[True, False]] * 2


def test_what_decodes_and_what_does_not(choose: Chooser) -> None:
    model, token = small("whole", choose), TOKENS[:, :1]

    def decodes(model: BDH, **options: Any) -> bool:
        choose.calls.clear()
        with torch.no_grad():
            model.advance(model.init_state(2), token, **options)
        return choose.calls["gated"] > 0

    assert decodes(model)
    assert decodes(model, donate=True)
    assert not decodes(plainly(model))
    assert not decodes(BDH(CONFIG, attention="recurrent").eval())
    assert not decodes(BDH(Case(CONFIG, freqs="trained").config).eval())
    assert not decodes(copy.deepcopy(model).train())
    with torch.autocast("cpu", torch.bfloat16):
        assert not decodes(copy.deepcopy(model).float())
    watched = copy.deepcopy(model)
    watched.drop.register_forward_hook(lambda *_: None)
    assert not decodes(watched)
    choose.calls.clear()
    logits, state = model.advance(model.init_state(2), token)  # gradients are recorded
    assert not choose.calls["gated"]
    (slope,) = torch.autograd.grad(model.advance(state, token)[0].sum(), [model.encoder])
    assert slope.any()
    assert logits.requires_grad


@pytest.mark.parametrize("batch", [1, 8])
@torch.no_grad()
def test_a_large_model_is_decoded_by_the_thresholds_as_they_are(choose: Chooser, batch: int) -> None:
    """At densities on both sides of each, beside the plain kernel; only the rows are fewer than they would be."""
    choose({"KEPT_SHARE": 3 / 64})
    config = BDHConfig(n_layer=1, n_embd=64, mlp_internal_dim_multiplier=256, vocab_size=16)  # N = 4096
    torch.manual_seed(2)
    usual = BDH(config, kernel="plain").double().eval()
    usual.encoder.mul_(20)
    seen = []
    for share in (1.0, 0.5, 0.05):
        usual.encoder.mul_(torch.rand(4, 1, config.n_neurons) < share)
        model = BDH(config).double().eval()
        model.load_state_dict(usual.state_dict())
        model.laid_out_for_decoding()
        state, wanted = model.init_state(batch), usual.init_state(batch)
        choose.calls.clear()
        for t in range(6):
            token = torch.arange(t, t + batch)[:, None] % 16
            actual, state = model.advance(state, token, donate=True)
            expected, wanted = usual.advance(wanted, token, donate=True)
            same(actual, expected)
        seen.append(set(choose.calls) - {"gated", "_weighted"})
        assert choose.calls["_weighted"] == 3
    # Half of all neurons, a quarter, and an eightieth; of the first token xy_sparse has none. Eight texts need columns of
    # encoder_v of their own each.
    dense, columns = {"_through_blocks", "_decoded"}, {"_columns"}
    assert seen == [dense, dense | (columns if batch == 1 else set()), {"_through_pairs", "_decoded"} | columns]


def test_a_module_of_other_weights_than_parameters_is_decoded_by_the_plain_kernel(choose: Chooser) -> None:
    model = small("whole", choose)
    nn.utils.parametrizations.weight_norm(model.embed)
    with torch.no_grad():
        logits, _ = model.advance(model.init_state(2), TOKENS[:, :1])
    assert logits.isfinite().all()


# Widths and neurons on both sides of a vector, of a piece of a sum and of what threads share; and silent pairs.
@pytest.mark.parametrize(("texts", "N", "D"), [(1, 2, 3), (2, 70, 17), (1, 2050, 64), (3, 512, 64)])
def test_what_is_read_in_c_is_exact_where_sums_are(texts: int, N: int, D: int) -> None:
    draw = torch.Generator().manual_seed(N)
    compiled = native.token(torch.float32)
    assert compiled

    def whole(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=draw).float()

    state, v, rotated = whole(2 * texts, N, D), whole(texts, 1, D), whole(2 * texts, 1, N)
    rotated[..., 2:6] = 0
    attention, after = read(state, rotated), write(state, rotated, v.repeat(2, 1, 1))
    assert torch.equal(compiled.through(state, rotated, v), attention)
    assert torch.equal(state, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("R", "K"), [(1, 1), (5, 1030), (1024, 64), (1500, 65)])
def test_sums_of_rows_in_c_are_exact_where_they_can_be(dtype: torch.dtype, R: int, K: int) -> None:
    draw = torch.Generator().manual_seed(R)
    compiled = native.token(dtype)
    assert compiled
    weights, factors = (torch.randint(-3, 4, shape, generator=draw).to(dtype) for shape in ((R, K), (R,)))
    assert torch.equal(compiled.weighted_sum(weights, factors), factors.float() @ weights.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_model_is_decoded_in_c(monkeypatch: pytest.MonkeyPatch, choose: Chooser, dtype: torch.dtype) -> None:
    choose.in_c(wanted=True)
    model, used = small("neither", choose, dtype), list[str]()
    token = native.Token
    for name in ("through", "weighted_sum"):
        called = getattr(token, name)
        monkeypatch.setattr(token, name, lambda *given, name=name, called=called: used.append(name) or called(*given))
    with torch.no_grad():
        model.advance(model.init_state(1), TOKENS[:1, :1])
    assert set(used) == {"through", "weighted_sum"}


@pytest.mark.thorough
@pytest.mark.parametrize("form", ["copied", "rows_copied", "pieces"])
def test_the_suite_finds_nothing(choose: Chooser, form: str) -> None:
    """The cases of the smoke tier in float32, all of whose models are too small for these forms otherwise."""
    choose(FORMS[form][0])
    run = Run(TorchBackend(), explains=False)
    checks = plan(TIERS["smoke"], run.backend.capabilities, dtypes=("float32",))
    results = [run.run(check) for check in checks if not check.reason]
    assert results
    assert [result.worst.message for result in results if result.status in BAD and result.worst] == []
    assert choose.calls["_through_pairs"]
