"""Single tokens through the cache of bdh_recurrent: decoded as bdh_torch does, before and after rows turn into a state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bdh_conformance.yardstick.agreement import assert_agrees
from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.reference import Stepwise
from bdh_conformance.yardstick.tolerances import FLOAT64, expect
from bdh_spec.config import BDHConfig as Sizes
from bdh_spec.model import forward
from bdh_spec.params import Params
from bdh_torch import forms
from bdh_torch.backend import to_numpy
from bdh_torch.decode import Rows, gated
from bdh_transformers import BDHCache, BDHForCausalLM, BDHStaticCache, modeling_bdh

Load = Callable[..., BDHForCausalLM]

SIZES = Sizes(n_layer=3, n_embd=8, n_head=2, mlp_internal_dim_multiplier=24, vocab_size=11)
TIME, KEPT = 9, 5  # tokens of a text, and those that rows remember
CASES = {batch: Case(SIZES, batch, TIME, seed=3, scale=12) for batch in (1, 3)}
TOKENS = torch.from_numpy(CASES[3].tokens)

each_batch = pytest.mark.parametrize("batch", CASES)
each_split = pytest.mark.parametrize("first", [1, 3, KEPT, KEPT + 1])


@pytest.fixture(params=["all neurons", "active neurons"])
def decoded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Short texts are kept as rows even by a small model, whose neurons are counted or not; counts layers that decode."""
    monkeypatch.setattr(forms, "KEPT", 0)
    monkeypatch.setattr(forms, "KEPT_SHARE", KEPT / SIZES.n_embd)
    if request.param == "active neurons":
        for name, value in {"COUNTED": 0, "COPIED": 9, "SUMMED": 9}.items():
            monkeypatch.setattr(forms, name, value)
    calls, usual = Counter[str](), modeling_bdh.gated_token

    def counted(*args: Any) -> Tensor:
        calls["layers"] += 1
        return usual(*args)

    monkeypatch.setattr(modeling_bdh, "gated_token", counted)
    return calls


def are_rows(cache: BDHCache) -> bool:
    """Whether all layers hold rows; none or all of them do."""
    (found,) = {isinstance(layer.memory.held, Rows) for layer in cache.layers}
    return found


def same(actual: Tensor, expected: Tensor | np.ndarray) -> None:
    """Equal to rounding in float64."""
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=FLOAT64, atol=FLOAT64)


def states(cache: BDHCache) -> list[np.ndarray]:
    """The states (B, h, N, D) of all layers, read from a copy, for who looks at a state turns rows into it."""
    shape = (SIZES.n_head, -1, SIZES.n_neurons, SIZES.n_embd)
    return [layer.state.view(shape).transpose(0, 1).numpy() for layer in deepcopy(cache).layers]


def written(model: BDHForCausalLM, case: Case, first: int) -> dict[str, np.ndarray]:
    """Logits of a text of which so many tokens are read at once, the others one by one; and the state after each of these."""
    cache, logits, found = BDHCache(model.config), list[Tensor](), dict[str, np.ndarray]()
    for part in torch.from_numpy(case.tokens).split([first] + [1] * (TIME - first), dim=1):
        logits.append(model(part, past_key_values=cache).logits)
        T = cache.get_seq_length()
        assert are_rows(cache) is (T <= KEPT)
        assert {layer.batch_size for layer in cache.layers} == {case.batch}
        found |= {f"{T}.{i}": memory for i, memory in enumerate(states(cache))}
    return found | {"logits": to_numpy(torch.cat(logits, dim=1))}


def specified(case: Case, first: int) -> Callable[[Params], dict[str, np.ndarray]]:
    """The same by the specification."""

    def run(params: Params) -> dict[str, np.ndarray]:
        model = Stepwise(params, SIZES)
        state, logits, found = model.init_state(case.batch), list[np.ndarray](), dict[str, np.ndarray]()
        for part in np.split(case.tokens, range(first, TIME), axis=1):
            read, state = model.advance(state, part)
            logits.append(read)
            found |= {f"{state.position}.{i}": memory for i, memory in enumerate(model.export_state(state).layers)}
        return found | {"logits": np.concatenate(logits, axis=1)}

    return run


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@each_split
@each_batch
@torch.no_grad()
def test_r13_decoding_is_the_specification(load: Load, decoded: Counter[str], batch: int, first: int, dtype: str) -> None:
    case = CASES[batch]
    actual = written(load(case, "bdh_recurrent", getattr(torch, dtype)), case, first)
    assert_agrees("transformers", actual, expect(specified(case, first), case.params, dtype), f"{case} {first}")
    assert decoded["layers"] == SIZES.n_layer * (TIME - first + (first == 1))


def padded(model: BDHForCausalLM, case: Case, first: int) -> tuple[Tensor, Tensor]:
    """Logits of texts with padding, before the first one and within the last one, and their mask."""
    cache, tokens, logits = BDHCache(model.config), torch.from_numpy(case.tokens), list[Tensor]()
    mask = torch.ones_like(tokens)
    mask[0, :2], mask[-1, 4:7] = 0, 0
    for part in tokens.split([first] + [1] * (TIME - first), dim=1):
        stop = cache.get_seq_length() + part.shape[1]
        logits.append(model(part, attention_mask=mask[:, :stop], past_key_values=cache).logits)
        assert are_rows(cache) is (stop <= KEPT)
    return torch.cat(logits, dim=1), mask.bool()


def check_padded(model: BDHForCausalLM, case: Case, first: int) -> None:
    """Each text is that of the specification which has no padding."""
    logits, mask = padded(model, case, first)
    for row, tokens, kept in zip(logits, case.tokens, mask, strict=True):
        same(row[kept], forward(tokens[None, kept.numpy()], case.params, SIZES)[0])


@each_split
@each_batch
@torch.no_grad()
def test_r13_decoding_beside_padding_is_the_specification(load: Load, decoded: Counter[str], batch: int, first: int) -> None:
    check_padded(load(CASES[batch], "bdh_recurrent"), CASES[batch], first)
    assert decoded["layers"] == SIZES.n_layer * (TIME - first + (first == 1))


def seen_all(x: Tensor, v: Tensor, *rest: Any) -> Tensor:
    """A token whose padding is seen."""
    return gated(x, x, *rest)


def turned_on(x: Tensor, v: Tensor, weights: Any, rotations: Tensor, remember: Any) -> Tensor:
    """A token that stands one further on than it does, by the turns of the first after none."""
    return gated(x, v, weights, rotations * rotations, remember)


def never_written(x: Tensor, v: Tensor, weights: Any, rotations: Tensor, remember: Any) -> Tensor:
    """A token that is not remembered."""
    return gated(x, 0 * v, weights, rotations, remember)


@pytest.mark.usefixtures("decoded")
@pytest.mark.parametrize("bug", [seen_all, turned_on, never_written], ids=lambda bug: bug.__name__)
@each_batch
@torch.no_grad()
def test_a_planted_mistake_is_found(load: Load, monkeypatch: pytest.MonkeyPatch, batch: int, bug: Any) -> None:
    monkeypatch.setattr(modeling_bdh, "gated_token", bug)
    with pytest.raises(AssertionError):
        check_padded(load(CASES[batch], "bdh_recurrent"), CASES[batch], 3)


@pytest.mark.usefixtures("decoded")
@each_batch
@torch.no_grad()
def test_a_state_that_lost_a_row_is_found(load: Load, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    usual = Rows.matrix

    def matrix(self: Rows) -> Tensor:
        return usual(Rows(self.keys, self.values, self.length - 1))

    case = CASES[batch]
    monkeypatch.setattr(Rows, "matrix", matrix)
    with pytest.raises(AssertionError):
        same(
            torch.from_numpy(written(load(case, "bdh_recurrent"), case, 3)["logits"]), forward(case.tokens, case.params, SIZES)
        )


@pytest.mark.usefixtures("decoded")
@pytest.mark.parametrize("T", [KEPT - 2, KEPT + 1])
@torch.no_grad()
def test_texts_of_a_cache_change_places_whatever_it_holds(load: Load, T: int) -> None:
    model = load(CASES[3], "bdh_recurrent")
    start = model(TOKENS[:, :T]).past_key_values
    changes: dict[str, Tensor] = {
        "reorder_cache": torch.tensor([2, 0, 0]),
        "batch_select_indices": torch.tensor([2, 1]),
        "batch_repeat_interleave": torch.arange(3).repeat_interleave(2),
    }
    for name, order in changes.items():
        cache, tokens, logits = deepcopy(start), TOKENS[order], list[Tensor]()
        getattr(cache, name)(2 if name == "batch_repeat_interleave" else order)
        for token in tokens[:, T:].split(1, dim=1):
            logits.append(model(token, past_key_values=cache).logits)
        same(torch.cat(logits, dim=1), model(tokens, use_cache=False).logits[:, T:])
    assert are_rows(start) is (T <= KEPT)


@pytest.mark.usefixtures("decoded")
@torch.no_grad()
def test_the_streamed_kernel_reads_on_from_rows(load: Load) -> None:
    model = load(CASES[3], "bdh_recurrent")
    cache = model(TOKENS[:, :3]).past_key_values
    assert are_rows(cache)
    model.backbone.kernel = "streamed"
    same(model(TOKENS[:, 3:], past_key_values=cache).logits, model(TOKENS, use_cache=False).logits[:, 3:])


@pytest.mark.usefixtures("decoded")
@torch.no_grad()
def test_a_state_may_be_looked_at_and_changed_and_forgotten(load: Load) -> None:
    model = load(CASES[3], "bdh_recurrent")
    cache = model(TOKENS[:, :3]).past_key_values
    other = deepcopy(cache)
    for layer in other.layers:
        layer.state.zero_()
    assert (are_rows(cache), are_rows(other)) == (True, False)
    model(TOKENS[:, 3:4], past_key_values=other)
    same(model(TOKENS[:, 3:], past_key_values=cache).logits, model(TOKENS, use_cache=False).logits[:, 3:])
    cache.reset()
    assert [(layer.state, layer.batch_size, layer.is_initialized) for layer in cache.layers] == [(None, -1, False)] * 3
    same(model(TOKENS[:1], past_key_values=cache).logits, model(TOKENS[:1], use_cache=False).logits)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}, {"prefill_chunk_size": 2}], ids=str)
def test_generate_writes_what_the_other_form_writes(load: Load, decoded: Counter[str], options: dict[str, Any]) -> None:
    texts = []
    for form in ("bdh_recurrent", "bdh_parallel"):
        torch.manual_seed(0)
        asked = {"do_sample": False, "max_new_tokens": 9, "pad_token_id": 0} | options
        texts.append(load(CASES[3], form).generate(TOKENS[:, :3], attention_mask=torch.ones(3, 3).long(), **asked))
    assert torch.equal(*texts)
    assert decoded["layers"]


@torch.no_grad()
def test_packed_texts_are_read_after_rows_and_decoded_after_them(load: Load, decoded: Counter[str]) -> None:
    model = load(CASES[3], "bdh_recurrent")
    cache = model(TOKENS[:, :2]).past_key_values
    assert are_rows(cache)
    model(TOKENS[:, 2:6], position_ids=torch.tensor([[2, 0, 1, 2]]), past_key_values=cache)
    assert not are_rows(cache)
    logits = [model(token, past_key_values=cache).logits for token in TOKENS[:, 6:].split(1, dim=1)]
    same(torch.cat(logits, dim=1), model(TOKENS[:, 3:], use_cache=False).logits[:, 3:])
    assert decoded["layers"] == SIZES.n_layer * 3


def test_what_decodes_and_what_does_not(load: Load, decoded: Counter[str]) -> None:
    model = load(CASES[3], "bdh_recurrent")
    expected = model(TOKENS, use_cache=False).logits.detach()[:, 3:]

    def decodes(model: BDHForCausalLM, cache: Any = None, *, gradients: bool = False) -> bool:
        """Whether single tokens after three decode, and are the same whether they do or not."""
        decoded.clear()
        cache = cache or BDHCache(model.config)
        with torch.no_grad():
            model(TOKENS[:, :3], past_key_values=cache)
        with torch.set_grad_enabled(gradients):
            logits = [model(token, past_key_values=cache).logits for token in TOKENS[:, 3:].split(1, dim=1)]
        same(torch.cat(logits, dim=1).detach(), expected)
        return decoded["layers"] > 0

    assert decodes(model)
    assert not decodes(model, BDHStaticCache(model.config, max_cache_len=TIME))
    assert not decodes(model, gradients=True)
    assert not decodes(load(CASES[3], "bdh_parallel"))
    training = deepcopy(model).train()
    for layer in training.backbone.layers:
        layer.drop.p = 0.0
    assert not decodes(training)
    for kernel in ("plain", "streamed"):
        other = deepcopy(model)
        other.backbone.kernel = kernel
        assert not decodes(other)
    watched = deepcopy(model)
    watched.backbone.layers[1].drop.register_forward_hook(lambda *_: None)
    assert not decodes(watched)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        decoded.clear()
        narrow = deepcopy(model).float()
        cache = narrow(TOKENS[:, :3]).past_key_values
        narrow(TOKENS[:, 3:4], past_key_values=cache)
    assert not decoded["layers"]


@torch.no_grad()
def test_hidden_states_are_shown_of_tokens_that_decode(load: Load, decoded: Counter[str]) -> None:
    model = load(CASES[3], "bdh_recurrent")
    shown = model(TOKENS[:, 8:], past_key_values=model(TOKENS[:, :8]).past_key_values, output_hidden_states=True)
    assert decoded["layers"] == SIZES.n_layer
    whole = model(TOKENS, use_cache=False, output_hidden_states=True).hidden_states
    for actual, expected in zip(shown.hidden_states, whole, strict=True):
        same(actual, expected[:, 8:])
