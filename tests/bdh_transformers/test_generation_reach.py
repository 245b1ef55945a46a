"""What transformers' own tests of generation reach for and test_generate.py does not: they are not in its source distribution.

Their subjects, one by one: what generate returns in each mode with a cache and without, the shapes of a cache, texts that begin
with nothing or with embeddings, runs that go on from a cache, assisted sampling, and full graphs with every output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, GenerationMixin

from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.tolerances import FLOAT64
from bdh_spec.config import BDHConfig as Sizes
from bdh_transformers import BDHForCausalLM

Load = Callable[..., BDHForCausalLM]

CASE = Case(Sizes(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=67), time=9, seed=3, scale=15)
PROMPT = torch.from_numpy(CASE.tokens)  # 2 9
LEFT = torch.ones_like(PROMPT).index_put((torch.tensor(0), torch.arange(4)), torch.tensor(0))
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True, "top_k": 10, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 2, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 2, "top_k": 10},
}
ALL = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "output_hidden_states": True}
FLOAT32 = {"rtol": 1e-6, "atol": 1e-6}  # transformers rounds logits to float32 before it looks at them


@pytest.fixture
def model(load: Load, form: str) -> BDHForCausalLM:
    """A model in float64, so that rounding cannot part texts, in the form under test."""
    return load(CASE, form)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_each_mode_returns_the_same_with_a_cache_of_either_kind_and_without(
    model: BDHForCausalLM, mode: dict[str, Any]
) -> None:
    found = []
    for options in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
        torch.manual_seed(7)
        found.append(model.generate(PROMPT, attention_mask=LEFT, max_new_tokens=5, **mode, **options, **ALL))
    for output in found[1:]:
        assert torch.equal(output.sequences, found[0].sequences)
        for name in ("scores", "logits"):
            for step, expected in zip(output[name], found[0][name], strict=True):
                torch.testing.assert_close(step, expected, **FLOAT32)
        if "num_beams" in mode:
            torch.testing.assert_close(output.sequences_scores, found[0].sequences_scores, **FLOAT32)
            assert torch.equal(output.beam_indices, found[0].beam_indices)
        for t, (step, whole) in enumerate(zip(output.hidden_states, found[0].hidden_states, strict=True)):
            assert len(step) == len(whole) == CASE.config.n_layer + 1
            for state, expected in zip(step, whole, strict=True):
                assert state.shape[1] == (9 if t == 0 else 1)
                kept = slice(4, None) if t == 0 else slice(None)  # padding says nothing
                torch.testing.assert_close(state[:, kept], expected[:, -state.shape[1] :][:, kept], rtol=FLOAT64, atol=FLOAT64)


def test_a_cache_holds_what_its_form_says(model: BDHForCausalLM, form: str) -> None:
    c = CASE.config
    for options, room in (({}, 13), ({"cache_implementation": "static"}, 13)):
        output = model.generate(PROMPT, do_sample=False, max_new_tokens=5, return_dict_in_generate=True, **options)
        for layer in output.past_key_values.layers:
            assert int(layer.get_seq_length()) == 13  # the last token was not read
            if form == "bdh_recurrent":
                assert layer.state.shape == (c.n_head * 2, c.n_neurons, c.n_embd)
            else:
                assert layer.keys.shape == (2, c.n_head, room, c.n_neurons)
                assert layer.values.shape == (2, 1, room, c.n_embd)


def test_a_text_may_begin_with_nothing_but_bos(load: Load, form: str) -> None:
    model = load(CASE, form, bos_token_id=5)
    options = {"do_sample": False, "max_new_tokens": 6}
    assert torch.equal(model.generate(**options), model.generate(torch.tensor([[5]]), **options))


@pytest.mark.parametrize("static", [False, True])
def test_a_run_goes_on_from_embeddings_and_a_cache(model: BDHForCausalLM, static: bool) -> None:
    embed, given = model.get_input_embeddings(), {"do_sample": False, "return_dict_in_generate": True}
    whole = model.generate(inputs_embeds=embed(PROMPT), max_new_tokens=8, **given)
    kind = {"cache_implementation": "static", "max_cache_len": 20} if static else {}
    first = model.generate(inputs_embeds=embed(PROMPT), max_new_tokens=3, **kind, **given)
    text = torch.cat((embed(PROMPT), embed(first.sequences)), dim=1)
    rest = model.generate(inputs_embeds=text, past_key_values=first.past_key_values, max_new_tokens=5, **given)
    assert torch.equal(torch.cat((first.sequences, rest.sequences), dim=1), whole.sequences)


def test_other_embeddings_write_another_text(model: BDHForCausalLM) -> None:
    embeddings, given = model.get_input_embeddings()(PROMPT), {"do_sample": False, "max_new_tokens": 8}
    assert not torch.equal(
        model.generate(inputs_embeds=embeddings, **given), model.generate(inputs_embeds=embeddings.flip(1), **given)
    )


def test_how_many_logits_are_kept_changes_no_text(model: BDHForCausalLM) -> None:
    given = {"do_sample": False, "max_new_tokens": 8}
    assert torch.equal(model.generate(PROMPT, logits_to_keep=0, **given), model.generate(PROMPT, **given))


@pytest.mark.parametrize("mode", ["assistant_model", "prompt_lookup_num_tokens"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_guesses_are_written_to_the_length_that_was_asked_for(load: Load, mode: str, do_sample: bool) -> None:
    model = load(CASE, "bdh_parallel")
    torch.manual_seed(1)
    given = {mode: model if mode == "assistant_model" else 3, "do_sample": do_sample, "logits_to_keep": 0}
    output = model.generate(PROMPT[:1], max_new_tokens=7, **given, **ALL)
    assert output.sequences.shape == (1, 16)
    assert len(output.scores) == len(output.logits) == 7
    with torch.no_grad():
        whole = model(output.sequences[:, :-1]).logits[:, 8:]
    torch.testing.assert_close(torch.stack(output.logits, dim=1).double(), whole, **FLOAT32)


def test_an_assistant_guesses_no_token_too_many(load: Load) -> None:
    model = load(CASE, "bdh_parallel")
    for length in (1, 2, 5):
        assert model.generate(PROMPT[:1], assistant_model=model, do_sample=False, max_new_tokens=length).shape == (
            1,
            9 + length,
        )


def test_options_of_ones_own_are_handed_on_to_the_model(model: BDHForCausalLM) -> None:
    assert GenerationMixin in BDHForCausalLM.__bases__
    handed = model.prepare_inputs_for_generation(PROMPT, is_first_iteration=True, mine=3, labels=PROMPT)
    assert handed["mine"] == 3
    assert "labels" not in handed


@pytest.fixture
def compiled() -> Iterator[list[torch.fx.GraphModule]]:
    """Graphs that were compiled, none before."""
    torch.compiler.reset()
    yield []
    torch.compiler.reset()


@pytest.mark.thorough  # the compiler takes some seconds
@pytest.mark.parametrize("mask", [None, LEFT], ids=["whole", "left"])
def test_a_full_graph_of_fixed_sizes_gives_every_output(
    model: BDHForCausalLM, form: str, mask: Tensor | None, compiled: list[torch.fx.GraphModule]
) -> None:
    def as_it_is(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        compiled.append(graph)
        return graph.forward

    config = CompileConfig(fullgraph=True, dynamic=False, backend=as_it_is, mode=None)
    config._compile_all_devices = True
    options = {"do_sample": False, "max_new_tokens": 6, "output_attentions": form == "bdh_parallel", **ALL}
    for tokens in (PROMPT, PROMPT.flip(1)):
        expected = model.generate(tokens, attention_mask=mask, **options)
        output = model.generate(tokens, attention_mask=mask, cache_implementation="static", compile_config=config, **options)
        assert torch.equal(output.sequences, expected.sequences)
        for step, wanted in zip(output.logits, expected.logits, strict=True):
            torch.testing.assert_close(step, wanted, **FLOAT32)
        for step, wanted in zip(output.hidden_states[1:], expected.hidden_states[1:], strict=True):
            torch.testing.assert_close(step, wanted, rtol=FLOAT64, atol=FLOAT64)
        for step, wanted in zip(output.attentions or (), expected.attentions or (), strict=True):
            for matrix, of_all in zip(step, wanted, strict=True):
                torch.testing.assert_close(matrix[..., : of_all.shape[-1]], of_all, rtol=FLOAT64, atol=FLOAT64)
    assert len(compiled) == 1
