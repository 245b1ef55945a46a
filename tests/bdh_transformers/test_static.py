"""Caches that stay where they are, and generation by compiled programs; rows that are not copied at each token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache, StaticCache

from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.tolerances import FLOAT64
from bdh_spec.config import BDHConfig as Sizes
from bdh_transformers import BDHCache, BDHForCausalLM, BDHStaticCache

Load = Callable[..., BDHForCausalLM]

CASE = Case(Sizes(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=67), time=11, seed=3, scale=15)
TOKENS = torch.from_numpy(CASE.tokens)  # 2 11
LEFT = torch.ones_like(TOKENS).index_put((torch.tensor(0), torch.arange(3)), torch.tensor(0))
WITHIN = torch.ones_like(TOKENS).index_put((torch.tensor(1), torch.arange(4, 7)), torch.tensor(0))
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}

each_length = pytest.mark.parametrize("lengths", ["usual", "short"])
each_split = pytest.mark.parametrize("split", [(11,), (1,) * 11, (6, 5), (2, 1, 5, 3)], ids=str)


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal to rounding in float64."""
    torch.testing.assert_close(actual, expected, rtol=FLOAT64, atol=FLOAT64)


def places(cache: BDHCache | BDHStaticCache) -> list[int]:
    """Where a cache keeps what it remembers."""
    kept = [getattr(layer, name, None) for layer in cache.layers for name in ("state", "keys", "values")]
    return [tensor.data_ptr() for tensor in kept if tensor is not None]


@each_length
@each_split
@torch.no_grad()
def test_r13_a_static_cache_reads_any_split_of_a_text_and_stays_where_it_is(
    load: Load, request: pytest.FixtureRequest, form: str, split: tuple[int, ...], lengths: str
) -> None:
    if lengths == "short":
        request.getfixturevalue("short_chunks")
    model = load(CASE, form)
    cache, expected = BDHStaticCache(model.config, max_cache_len=16), model(TOKENS, use_cache=False).logits
    for kernel in ("plain", "streamed"):
        model.backbone.kernel = kernel
        logits = [model(part, past_key_values=cache).logits for part in TOKENS.split(split, dim=1)]
        close(torch.cat(logits, dim=1), expected)
        assert int(cache.get_seq_length()) == 11
        before = places(cache)
        cache.reset()  # and reads another text in the same place
        assert int(cache.get_seq_length()) == 0
        assert form == "bdh_parallel" or all(layer.is_blank() for layer in cache.layers)
        assert before == places(cache)


@each_length
@torch.no_grad()
def test_packed_rows_are_read_into_a_static_cache(load: Load, request: pytest.FixtureRequest, form: str, lengths: str) -> None:
    if lengths == "short":
        request.getfixturevalue("short_chunks")
    model = load(CASE, form)
    positions, found = torch.tensor([[3, 4, 5, 0, 1, 2, 3, 4]]), []
    for cache in (BDHCache(model.config), BDHStaticCache(model.config, max_cache_len=16)):
        model(TOKENS[:, :3], past_key_values=cache)
        logits = model(TOKENS[:, :8], position_ids=positions, past_key_values=cache).logits
        found.append(torch.cat((logits, model(TOKENS[:, 8:], past_key_values=cache).logits), dim=1))
    close(*found)


@torch.no_grad()
def test_texts_of_a_static_cache_change_places_where_they_are(load: Load, form: str) -> None:
    model, expected = load(CASE, form), load(CASE, form)(TOKENS.flip(0)).logits
    cache = BDHStaticCache(model.config, max_cache_len=16)
    model(TOKENS[:, :6], past_key_values=cache)
    before = places(cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert form == "bdh_parallel" or before == places(cache)
    close(model(TOKENS.flip(0)[:, 6:], past_key_values=cache).logits, expected[:, 6:])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}, {"num_return_sequences": 1}], ids=str)
@pytest.mark.parametrize("mask", [None, LEFT, WITHIN], ids=["whole", "left", "within"])
def test_generate_with_a_static_cache_writes_the_same_text(
    load: Load, form: str, mask: Tensor | None, options: dict[str, Any]
) -> None:
    model, given = load(CASE, form), {**GREEDY, **options, "attention_mask": mask}
    expected = model.generate(TOKENS, **given)
    output = model.generate(TOKENS, cache_implementation="static", return_dict_in_generate=True, **given)
    assert torch.equal(output.sequences, expected)
    assert isinstance(output.past_key_values, StaticCache)
    assert output.past_key_values.is_compileable
    if "prefill_chunk_size" not in options:  # which transformers asks of tokens
        embeddings = model.get_input_embeddings()(TOKENS)
        written = model.generate(inputs_embeds=embeddings, cache_implementation="static", **given)
        assert torch.equal(written, expected[:, 11:])


def test_caches_are_those_that_libraries_ask_for(load: Load, form: str) -> None:
    config = load(CASE, form).config
    dynamic, static = BDHCache(config), BDHStaticCache(config, max_cache_len=4)
    assert (isinstance(dynamic, DynamicCache), isinstance(static, DynamicCache)) == (True, False)
    assert (isinstance(dynamic, StaticCache), isinstance(static, StaticCache)) == (False, True)
    assert (dynamic.is_compileable, static.is_compileable) == (False, True)


@torch.no_grad()
def test_rows_of_a_fixed_length_that_are_full_say_so(load: Load) -> None:
    model = load(CASE, "bdh_parallel")
    cache = BDHStaticCache(model.config, max_cache_len=8)
    model(TOKENS[:, :7], past_key_values=cache)
    with pytest.raises(ValueError, match=r"room for 8 tokens, and 7 and 4 more do not fit in: give it a larger max_cache_len"):
        model(TOKENS[:, 7:], past_key_values=cache)


@pytest.fixture
def graphs() -> Iterator[list[torch.fx.GraphModule]]:
    """No program was compiled before."""
    torch.compiler.reset()
    yield []
    torch.compiler.reset()


@pytest.mark.parametrize("form", ["bdh_recurrent", pytest.param("bdh_parallel", marks=pytest.mark.thorough)])
def test_generate_compiles_one_program_for_texts_of_all_lengths(
    load: Load, form: str, graphs: list[torch.fx.GraphModule]
) -> None:
    def as_it_is(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    case = Case(Sizes(n_layer=1, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=67), time=11, seed=3, scale=15)
    model, config = load(case, form), CompileConfig(fullgraph=True, backend=as_it_is, mode=None)
    config._compile_all_devices = True
    for T, more in ((11, 12), (5, 4), (7, 3)):
        given = {"do_sample": False, "max_new_tokens": more}
        expected = model.generate(TOKENS[:, :T], **given)
        given |= {"cache_implementation": "static", "compile_config": config}
        assert torch.equal(model.generate(TOKENS[:, :T], **given), expected)
        embeddings = model.get_input_embeddings()(TOKENS[:, :T])
        assert torch.equal(model.generate(inputs_embeds=embeddings, **given), expected[:, T:])
        assert len(graphs) == 1


class Copies(TorchDispatchMode):
    """How many values are written to somewhere else as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.cat, torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy):
            self.count += result.numel()
        return result


@torch.no_grad()
def test_r5_a_token_copies_no_rows_of_earlier_ones(load: Load) -> None:
    model, tokens = load(CASE, "bdh_parallel"), TOKENS.repeat(1, 8)
    cache, expected, steps, logits = BDHCache(model.config), model(tokens, use_cache=False).logits, [], []
    for token in tokens.split(1, dim=1):
        with Copies() as copies:
            logits.append(model(token, past_key_values=cache).logits)
        steps.append(copies.count)
    close(torch.cat(logits, dim=1), expected)
    rows = sum(layer.keys.numel() for layer in cache.layers)
    assert sorted(steps)[-8] < rows / 8  # but for a few steps, at which room is made for more
    assert sum(steps) < 9 * rows


@torch.no_grad()
def test_rows_in_larger_room_are_taken_back_copied_and_added_to(load: Load) -> None:
    model, expected = load(CASE, "bdh_parallel"), load(CASE, "bdh_parallel")(TOKENS).logits
    cache = model(TOKENS[:, :5]).past_key_values
    model(TOKENS[:, 5:8], past_key_values=cache)  # from here on in room that is larger
    branch = deepcopy(cache)
    cache.crop(-2)
    close(model(TOKENS[:, 6:], past_key_values=cache).logits, expected[:, 6:])
    close(model(TOKENS[:, 8:], past_key_values=branch).logits, expected[:, 8:])
    swapped = model(TOKENS[:, :5]).past_key_values
    model(TOKENS[:, 5:8], past_key_values=swapped)
    swapped.reorder_cache(torch.tensor([1, 0]))
    close(model(TOKENS.flip(0)[:, 8:], past_key_values=swapped).logits, expected.flip(0)[:, 8:])
    with torch.enable_grad():
        more = model(TOKENS[:, 8:], past_key_values=model(TOKENS[:, :8]).past_key_values).logits
    close(more.detach(), expected[:, 8:])
