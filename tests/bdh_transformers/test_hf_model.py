"""The model under the interface of transformers: equal to the specification in both forms, whatever the way in."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Cache, DynamicCache, QuantizedCache, StaticCache

from bdh_conformance.yardstick.agreement import assert_agrees
from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_conformance.yardstick.tolerances import FLOAT64, expect
from bdh_spec import CapabilityError
from bdh_spec.config import BDHConfig as Sizes
from bdh_spec.model import advance, forward, init_state, trace
from bdh_torch import forms
from bdh_torch.forms import Kernel
from bdh_transformers import BDHCache, BDHConfig, BDHForCausalLM, BDHModel
from bdh_transformers.cache_bdh import BDHStateLayer

Load = Callable[..., BDHForCausalLM]

CASES = {name: Case(config, time=11, seed=1, scale=10) for name, config in CONFIGS.items()}
CASE = CASES["three_heads"]
TOKENS = torch.from_numpy(CASE.tokens)  # 2 11
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_split = pytest.mark.parametrize("split", [(11,), (1,) * 11, (1, 10), (10, 1), (2, 1, 5, 3), (6, 5)], ids=str)


def same(actual: Tensor, expected: Tensor | np.ndarray) -> None:
    """Equal to rounding in float64."""
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=FLOAT64, atol=FLOAT64)


def logits_of(case: Case) -> np.ndarray:
    return forward(case.tokens, case.params, case.config)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@each_case
@torch.no_grad()
def test_logits_are_those_of_the_specification(load: Load, case: Case, form: str, dtype: str) -> None:
    expected = expect(lambda p: {"logits": forward(case.tokens, p, case.config)}, case.params, dtype)
    actual = load(case, form, getattr(torch, dtype))(torch.from_numpy(case.tokens)).logits
    assert_agrees(f"transformers {form}", {"logits": actual.numpy()}, expected, str(case))


@pytest.mark.usefixtures("short_chunks")
@each_case
@torch.no_grad()
def test_r13_a_long_text_is_read_in_chunks(load: Load, case: Case, form: str) -> None:
    model, tokens = load(case, form), torch.from_numpy(case.tokens)
    for use_cache in (False, True):
        same(model(tokens, use_cache=use_cache).logits, logits_of(case))


@pytest.mark.parametrize("lengths", ["usual", "short"])
@each_split
@each_case
@torch.no_grad()
def test_r13_any_split_of_a_text_computes_the_same(
    load: Load, request: pytest.FixtureRequest, case: Case, form: str, split: tuple[int, ...], lengths: str
) -> None:
    if lengths == "short":
        request.getfixturevalue("short_chunks")
    model, cache, parts = load(case, form), None, []
    for part in torch.from_numpy(case.tokens).split(split, dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    same(torch.cat(parts, dim=1), logits_of(case))
    assert cache.get_seq_length() == 11


@each_case
@torch.no_grad()
def test_r13_the_state_is_that_of_the_specification(load: Load, case: Case) -> None:
    _, expected = advance(init_state(2, case.config, np.float64), case.tokens, case.params, case.config)
    cache = load(case, "bdh_recurrent")(torch.from_numpy(case.tokens)).past_key_values
    for layer, memory in zip(cache.layers, expected.layers, strict=True):
        same(layer.state.view(case.config.n_head, 2, *memory.shape[2:]).transpose(0, 1), memory)


@torch.no_grad()
def test_gradients_are_recorded_through_a_cache(load: Load, form: str) -> None:
    model = load(CASE, form)
    with torch.enable_grad():
        first = model(TOKENS[:, :4])
        second = model(TOKENS[:, 4:], past_key_values=first.past_key_values)
        slopes = torch.autograd.grad(second.logits.square().sum(), list(model.parameters()))
        whole = torch.autograd.grad(model(TOKENS).logits[:, 4:].square().sum(), list(model.parameters()))
    for slope, expected in zip(slopes, whole, strict=True):
        torch.testing.assert_close(slope, expected, rtol=0, atol=FLOAT64 * expected.abs().max().item())


def padded(side: str, pads: tuple[int, ...], filler: int = 3) -> tuple[Tensor, Tensor]:
    """The tokens with some of them overwritten on one side by an id that means nothing there, and their mask."""
    tokens, mask = TOKENS.clone(), torch.ones_like(TOKENS)
    for b, n in enumerate(pads):
        hidden = slice(0, n) if side == "left" else slice(11 - n, 11)
        tokens[b, hidden], mask[b, hidden] = filler, 0
    return tokens, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pads", [(3, 0), (10, 4)], ids=str)
@pytest.mark.parametrize("lengths", ["usual", "short"])
@torch.no_grad()
def test_padding_on_either_side_changes_no_logit_of_the_text(
    load: Load, request: pytest.FixtureRequest, form: str, side: str, pads: tuple[int, ...], lengths: str
) -> None:
    if lengths == "short":
        request.getfixturevalue("short_chunks")
    model, (tokens, mask) = load(CASE, form), padded(side, pads)
    for use_cache in (True, False):
        logits = model(tokens, attention_mask=mask, use_cache=use_cache).logits
        for b, kept in enumerate(mask.bool()):
            same(logits[b, kept], model(tokens[b, kept][None]).logits[0])


@pytest.mark.parametrize("split", [(5, 6), (1, 1, 1, 8), (8, 1, 1, 1)], ids=str)
@torch.no_grad()
def test_padding_may_span_chunks_that_a_cache_joins(load: Load, form: str, split: tuple[int, ...]) -> None:
    model, (tokens, mask) = load(CASE, form), padded("left", (6, 2))
    cache, parts, stop = BDHCache(model.config), [], 0
    for part in tokens.split(split, dim=1):
        stop += part.shape[1]
        parts.append(model(part, attention_mask=mask[:, :stop], past_key_values=cache).logits)
    logits = torch.cat(parts, dim=1)
    for b, kept in enumerate(mask.bool()):
        same(logits[b, kept], model(tokens[b, kept][None]).logits[0])


@torch.no_grad()
def test_a_text_that_is_all_padding_disturbs_nobody(load: Load, form: str) -> None:
    model, (tokens, mask) = load(CASE, form), padded("left", (11, 0))
    logits = model(tokens, attention_mask=mask).logits
    assert logits.isfinite().all()
    same(logits[1], model(TOKENS[1:]).logits[0])


@torch.no_grad()
def test_a_mask_may_be_of_truth_values(load: Load, form: str) -> None:
    model, (tokens, mask) = load(CASE, form), padded("left", (3, 1))
    same(model(tokens, attention_mask=mask.bool()).logits, model(tokens, attention_mask=mask).logits)


@torch.no_grad()
def test_what_a_mask_keeps_counts_fully_whatever_number_says_so(load: Load, form: str) -> None:
    model, (tokens, mask) = load(CASE, form), padded("left", (3, 1))
    same(model(tokens, attention_mask=2.5 * mask).logits, model(tokens, attention_mask=mask).logits)


@torch.no_grad()
def test_padding_may_be_an_id_outside_the_vocabulary(load: Load, form: str) -> None:
    model, (tokens, mask) = load(CASE, form, pad_token_id=300), padded("left", (3, 0), filler=300)
    same(model(tokens, attention_mask=mask).logits[0, 3:], model(TOKENS[:1, 3:]).logits[0])


@pytest.mark.parametrize("start", [0, 1, 10**6, 2**24 + 1, 2**40, 2**62])
@torch.no_grad()
def test_r4_a_shift_of_all_positions_changes_nothing(load: Load, form: str, start: int) -> None:
    model, positions = load(CASE, form), start + torch.arange(11)[None]
    expected = logits_of(CASE)
    same(model(TOKENS, position_ids=positions).logits, expected)
    same(model(TOKENS, position_ids=positions.expand(2, -1)).logits, expected)
    cache, steps = BDHCache(model.config), []
    for t in range(11):
        steps.append(model(TOKENS[:, t : t + 1], position_ids=positions[:, t : t + 1], past_key_values=cache).logits)
    same(torch.cat(steps, dim=1), expected)


@torch.no_grad()
def test_r4_position_ids_are_not_ignored(load: Load, form: str) -> None:
    model = load(CASE, form)
    stretched = model(TOKENS, position_ids=2 * torch.arange(11)[None]).logits
    assert (stretched - model(TOKENS).logits).abs().max() > 1e-3


@torch.no_grad()
def test_r4_texts_of_a_batch_may_differ_in_their_positions(load: Load, form: str) -> None:
    model = load(CASE, form)
    positions = torch.stack((torch.arange(11), 3 * torch.arange(11)))
    logits = model(TOKENS, position_ids=positions).logits
    for b in range(2):
        same(logits[b], model(TOKENS[b : b + 1], position_ids=positions[b : b + 1]).logits[0])


@torch.no_grad()
def test_embeddings_may_be_given_in_place_of_tokens(load: Load, form: str) -> None:
    model = load(CASE, form)
    same(model(inputs_embeds=model.get_input_embeddings()(TOKENS)).logits, logits_of(CASE))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(TOKENS, inputs_embeds=model.get_input_embeddings()(TOKENS))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


def cast(dtype: torch.dtype) -> dict[str, Callable[[BDHForCausalLM], BDHForCausalLM]]:
    """Every way in which users change the dtype of a model."""
    shorthand = {torch.bfloat16: "bfloat16", torch.float16: "half", torch.float64: "double"}[dtype]
    return {"to": lambda model: model.to(dtype), shorthand: lambda model: getattr(model, shorthand)()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_r4_a_cast_of_the_model_changes_no_phase(load: Load, dtype: torch.dtype) -> None:
    positions = 10**6 + torch.arange(4)
    for change in cast(dtype).values():
        model = load(CASE, "bdh_recurrent", torch.float32)
        before = model.backbone.rotary(positions, torch.float32)
        assert torch.equal(change(model).backbone.rotary(positions, torch.float32), before)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 0.1), (torch.float16, 0.01)])
@torch.no_grad()
def test_a_narrow_model_computes_nearly_the_same_far_into_a_text(
    load: Load, form: str, dtype: torch.dtype, allowed: float
) -> None:
    case = Case(CONFIGS["three_heads"], time=11, seed=1)
    model, expected = load(case, form, dtype), torch.from_numpy(logits_of(case))
    output = model(TOKENS, position_ids=10**6 + torch.arange(11)[None], use_cache=True)
    assert output.logits.dtype == dtype
    assert (output.logits - expected).norm() < allowed * expected.norm()
    step = model(TOKENS[:, :1], past_key_values=output.past_key_values)
    assert step.logits.dtype == dtype
    if form == "bdh_recurrent":
        assert {layer.state.dtype for layer in output.past_key_values.layers} == {torch.float32}


@each_case
@torch.no_grad()
def test_hidden_states_are_those_of_every_layer_and_of_the_beginning(load: Load, case: Case, form: str) -> None:
    stages = trace(case.tokens, case.params, case.config)
    output = load(case, form).backbone(torch.from_numpy(case.tokens), output_hidden_states=True)
    expected = [stages["embed"], *(stages[f"layers.{i}.x"] for i in range(case.config.n_layer))]
    assert len(output.hidden_states) == case.config.n_layer + 1
    for state, reference in zip(output.hidden_states, expected, strict=True):
        same(state, reference)
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


@each_case
@torch.no_grad()
def test_r5_attentions_are_the_scores_of_every_layer(load: Load, case: Case) -> None:
    stages = trace(case.tokens, case.params, case.config)
    output = load(case, "bdh_parallel")(torch.from_numpy(case.tokens), output_attentions=True)
    assert len(output.attentions) == case.config.n_layer
    for i, matrix in enumerate(output.attentions):
        same(matrix, stages[f"layers.{i}.scores"])


@torch.no_grad()
def test_r5_attentions_of_a_step_are_the_last_row_of_the_scores(load: Load) -> None:
    model, stages = load(CASE, "bdh_parallel"), trace(CASE.tokens, CASE.params, CASE.config)
    cache = model(TOKENS[:, :8]).past_key_values
    output = model(TOKENS[:, 8:], past_key_values=cache, output_attentions=True)
    for i, matrix in enumerate(output.attentions):
        same(matrix, stages[f"layers.{i}.scores"][:, :, 8:])


@pytest.mark.usefixtures("short_chunks")
@torch.no_grad()
def test_r5_attentions_of_a_long_text_are_whole(load: Load) -> None:
    model, stages = load(CASE, "bdh_parallel"), trace(CASE.tokens, CASE.params, CASE.config)
    for use_cache in (True, False):
        output = model(TOKENS, output_attentions=True, use_cache=use_cache)
        same(output.attentions[0], stages["layers.0.scores"])


def test_attentions_of_the_recurrent_form_are_refused_with_the_remedy(load: Load) -> None:
    model = load(CASE, "bdh_recurrent")
    with pytest.raises(ValueError, match=r"no attention matrix.*set_attn_implementation\('bdh_parallel'\)$"):
        model(TOKENS, output_attentions=True)
    with pytest.raises(ValueError, match=r"no attention matrix.*set_attn_implementation\('bdh_parallel'\)$"):
        model.config.output_attentions = True


@torch.no_grad()
def test_logits_to_keep_are_the_last_or_the_chosen(load: Load, form: str) -> None:
    model, whole = load(CASE, form), logits_of(CASE)
    same(model(TOKENS, logits_to_keep=3).logits, whole[:, -3:])
    same(model(TOKENS, logits_to_keep=torch.tensor([0, 7])).logits, whole[:, [0, 7]])


@torch.no_grad()
def test_a_tuple_is_returned_on_request(load: Load, form: str) -> None:
    logits, cache = load(CASE, form)(TOKENS, return_dict=False)
    same(logits, logits_of(CASE))
    assert isinstance(cache, BDHCache)


@torch.no_grad()
def test_the_form_can_be_changed_and_with_it_what_is_cached(load: Load) -> None:
    model = load(CASE, "bdh_parallel")
    rows = model(TOKENS, use_cache=True)
    model.set_attn_implementation("bdh_recurrent")
    state = model(TOKENS, use_cache=True)
    same(rows.logits, state.logits)
    assert all(layer.keys.shape[-2] == 11 for layer in rows.past_key_values.layers)
    assert all(isinstance(layer, BDHStateLayer) for layer in state.past_key_values.layers)


@torch.no_grad()
def test_the_form_can_be_chosen_at_construction_and_the_default_is_recurrent(load: Load) -> None:
    config = load(CASE, "bdh_recurrent").config
    assert AutoModelForCausalLM.from_config(config).config._attn_implementation == "bdh_recurrent"
    chosen = AutoModelForCausalLM.from_config(config, attn_implementation="bdh_parallel")
    assert chosen.config._attn_implementation == "bdh_parallel"
    assert (
        BDHForCausalLM(BDHConfig(hidden_size=8, mlp_internal_dim_multiplier=4)).config._attn_implementation == "bdh_recurrent"
    )


@pytest.mark.parametrize("wanted", ["sdpa", "flash_attention_2", "flex_attention"])
def test_a_form_that_bdh_cannot_have_is_refused(load: Load, wanted: str) -> None:
    model = load(CASE, "bdh_recurrent")
    with pytest.raises(ValueError, match=rf"{wanted}.*choose from bdh_recurrent, bdh_parallel"):
        model.set_attn_implementation(wanted)
    with pytest.raises(ValueError, match=rf"{wanted}.*choose from bdh_recurrent, bdh_parallel"):
        AutoModelForCausalLM.from_config(deepcopy(model.config), attn_implementation=wanted)
    same(model(TOKENS).logits, logits_of(CASE))  # and nothing has changed


def test_a_text_without_tokens_is_refused(load: Load, form: str) -> None:
    with pytest.raises(ValueError, match="no tokens to read"):
        load(CASE, form)(TOKENS[:, :0])


@pytest.mark.parametrize("shape", [(2, 1, 11, 11), (2, 10), (11,)], ids=str)
def test_masks_that_are_no_padding_masks_are_refused(load: Load, form: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"attention_mask has shape .*give \(B, S\)"):
        load(CASE, form)(TOKENS, attention_mask=torch.ones(shape))


@torch.no_grad()
def test_a_dynamic_cache_serves_the_parallel_form(load: Load) -> None:
    model = load(CASE, "bdh_parallel")
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        parts = [model(part, past_key_values=cache).logits for part in TOKENS.split((3, 1, 7), dim=1)]
        same(torch.cat(parts, dim=1), logits_of(CASE))


def test_a_dynamic_cache_is_refused_by_the_recurrent_form(load: Load) -> None:
    model = load(CASE, "bdh_recurrent")
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        with pytest.raises(ValueError, match=r"bdh_recurrent cannot use a DynamicCache.*pass BDHCache\(model\.config\)"):
            model(TOKENS, past_key_values=cache)


def test_a_static_cache_is_refused(load: Load, form: str) -> None:
    model = load(CASE, form)
    with pytest.raises(ValueError, match=rf"{form} cannot use a StaticCache.*BDHCache\(model\.config\)"):
        model(TOKENS, past_key_values=StaticCache(model.config, max_cache_len=32))


def test_a_quantized_cache_is_refused(load: Load, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(CASE, form)
    cache = Cache.__new__(QuantizedCache)  # its constructor asks for a library that we do not install
    monkeypatch.setattr(cache, "layers", [QuantizedLayer()], raising=False)
    with pytest.raises(ValueError, match=rf"{form} cannot use a QuantizedCache of QuantizedLayer.*BDHCache"):
        model(TOKENS, past_key_values=cache)


def test_an_offloaded_cache_is_refused(load: Load, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(CASE, form)
    cache = BDHCache(model.config)
    monkeypatch.setattr(cache, "offloading", True)  # its constructor asks for a device to offload from
    with pytest.raises(ValueError, match=f"{form} cannot use a cache that is offloaded"):
        model(TOKENS, past_key_values=cache)


class QuantizedLayer:
    """Stands for a layer of transformers that keeps rows in few bits."""


@torch.no_grad()
def test_a_cache_written_in_the_other_form_is_refused(load: Load) -> None:
    model = load(CASE, "bdh_recurrent")
    state = model(TOKENS).past_key_values
    model.set_attn_implementation("bdh_parallel")
    with pytest.raises(ValueError, match=r"bdh_parallel cannot use a BDHCache of BDHStateLayer.*form was changed"):
        model(TOKENS, past_key_values=state)
    rows = model(TOKENS).past_key_values
    model.set_attn_implementation("bdh_recurrent")
    with pytest.raises(ValueError, match="bdh_recurrent cannot use a BDHCache of BDHRowsLayer"):
        model(TOKENS, past_key_values=rows)


@torch.no_grad()
def test_a_cache_of_another_kind_leaves_the_cache_as_it_was(load: Load) -> None:
    model, cache = load(CASE, "bdh_recurrent"), DynamicCache()
    with pytest.raises(ValueError, match="cannot use"):
        model(TOKENS, past_key_values=cache)
    assert cache.get_seq_length() == 0


@torch.no_grad()
def test_a_state_never_grows_and_rows_do(load: Load, form: str) -> None:
    model = load(CASE, form)
    sizes = []
    cache = BDHCache(model.config)
    for part in TOKENS.split((4, 1, 6), dim=1):
        model(part, past_key_values=cache)
        kept = [getattr(layer, name) for layer in cache.layers for name in ("state", "keys", "values") if hasattr(layer, name)]
        sizes.append(sum(tensor.numel() for tensor in kept if tensor is not None))
    assert (len(set(sizes)) == 1) == (form == "bdh_recurrent")


@torch.no_grad()
def test_texts_that_a_cache_remembers_can_be_chosen_and_repeated(load: Load, form: str) -> None:
    model, expected = load(CASE, form), logits_of(CASE)
    changes = {
        (1, 0, 1): lambda cache: cache.batch_select_indices(torch.tensor([1, 0, 1])),
        (1, 1): lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        (0, 0, 0, 1, 1, 1): lambda cache: cache.batch_repeat_interleave(3),
    }
    for order, change in changes.items():
        cache = model(TOKENS[:, :6]).past_key_values
        change(cache)
        same(model(TOKENS[list(order), 6:], past_key_values=cache).logits, expected[list(order), 6:])


@torch.no_grad()
def test_a_state_that_was_reset_remembers_nothing(load: Load) -> None:
    model = load(CASE, "bdh_recurrent")
    cache = model(TOKENS).past_key_values
    cache.reset()
    assert cache.get_seq_length() == 0
    same(model(TOKENS[:1], past_key_values=cache).logits, logits_of(CASE)[:1])


@torch.no_grad()
def test_rows_can_be_taken_back_and_a_state_refuses(load: Load) -> None:
    model, expected = load(CASE, "bdh_parallel"), logits_of(CASE)
    cache = model(TOKENS[:, :9]).past_key_values
    cache.crop(-4)
    same(model(TOKENS[:, 5:], past_key_values=cache).logits, expected[:, 5:])
    model.set_attn_implementation("bdh_recurrent")
    cache = model(TOKENS[:, :9]).past_key_values
    with pytest.raises(ValueError, match=r"cannot be cropped.*set_attn_implementation\('bdh_parallel'\)"):
        cache.crop(-4)
    cache.crop(0)
    same(model(TOKENS[:, 9:], past_key_values=cache).logits, expected[:, 9:])


class Allocations(TorchDispatchMode):
    """The largest tensor that any operation makes, in values."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return result


LONG = Sizes(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=8, vocab_size=32)  # nh*N = 128


@pytest.mark.parametrize("records", [False, True])
def test_r13_a_long_text_makes_no_tensor_of_all_its_neurons_or_pairs(load: Load, form: str, records: bool) -> None:
    model, T = load(Case(LONG), form, torch.float32), 8192
    with torch.set_grad_enabled(records), Allocations() as made:
        model(torch.zeros(1, T, dtype=torch.long), use_cache=False)
    chunk = forms.CHUNK * LONG.n_head * max(forms.CHUNK, LONG.n_neurons)
    assert made.largest <= max(T * LONG.vocab_size, chunk) < T * LONG.n_head * LONG.n_neurons / 2


@pytest.mark.parametrize("kernel", ["plain", "streamed"])
@torch.no_grad()
def test_r13_time_grows_with_the_length_of_a_long_text_and_not_with_its_square(load: Load, form: str, kernel: Kernel) -> None:
    model = load(Case(LONG), form, torch.float32)
    model.backbone.kernel = kernel

    def operations(T: int) -> int:
        with FlopCounterMode(display=False) as counted:
            model(torch.zeros(1, T, dtype=torch.long), use_cache=False)
        return counted.get_total_flops()

    assert operations(8192) == pytest.approx(2 * operations(4096), rel=0.01)


class Copies(TorchDispatchMode):
    """How many values are copied to be joined with others."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.cat.default:
            self.count += result.numel()
        return result


@torch.no_grad()
def test_r13_rows_of_a_long_text_are_copied_a_few_times_and_not_at_every_chunk(load: Load) -> None:
    model = load(Case(LONG), "bdh_parallel", torch.float32)

    def copied(T: int) -> int:
        with Copies() as copies:
            model(torch.zeros(1, T, dtype=torch.long), use_cache=True)
        return copies.count

    assert copied(8192) == pytest.approx(2 * copied(4096), rel=0.01)


def test_only_the_five_weights_are_trainable(load: Load) -> None:
    names = {name for name, weight in load(CASE, "bdh_recurrent").named_parameters() if weight.requires_grad}
    backbone = {f"backbone.{name}" for name in ("embed.weight", "encoder", "encoder_v", "decoder")}
    assert names == backbone | {"lm_head.weight"}


def test_the_model_without_its_head_gives_hidden_states(load: Load, form: str) -> None:
    model = load(CASE, form)
    body = BDHModel._from_config(model.config, attn_implementation=form).double()
    body.load_state_dict(model.backbone.state_dict())
    stages = trace(CASE.tokens, CASE.params, CASE.config)
    same(body.eval()(TOKENS).last_hidden_state.detach(), stages[f"layers.{CASE.config.n_layer - 1}.x"])


def test_a_model_of_its_own_frequencies_is_refused_since_no_folder_stores_them() -> None:
    own = Case(CONFIGS["plain"], freqs="trained").config
    with pytest.raises(CapabilityError, match=r"brings its own frequencies, which no folder of transformers stores"):
        BDHConfig.from_sizes(own)
