"""generate() of transformers on both forms of attention: every mode that transformers has, and the text of the port."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.tolerances import FLOAT64
from bdh_spec.config import BDHConfig as Sizes
from bdh_torch import BDH
from bdh_torch.backend import TorchBackend
from bdh_transformers import BDHCache, BDHForCausalLM

Load = Callable[..., BDHForCausalLM]

CASE = Case(Sizes(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=67), time=9, seed=3, scale=15)
PROMPT = torch.from_numpy(CASE.tokens)  # 2 9
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 30}


@pytest.fixture
def model(load: Load, form: str) -> BDHForCausalLM:
    """A model in float64, so that rounding cannot part texts, in the form under test."""
    return load(CASE, form)


@pytest.fixture(scope="module")
def port() -> BDH:
    """The same model as a plain module of the PyTorch port."""
    return TorchBackend().load(CASE.params, CASE.config, device="cpu", dtype="float64").module


@pytest.fixture(scope="module")
def greedy(port: BDH) -> Tensor:
    """What the port writes after the prompts when it always takes the most likely token."""
    text = port.generate(PROMPT, 30, temperature=0)
    assert all(len(set(row.tolist())) > 8 for row in text[:, 9:])  # no text that any mistake would write too
    return text


def padded(pads: tuple[int, ...]) -> dict[str, Tensor]:
    """The prompts, of which the first tokens are padding."""
    tokens, mask = PROMPT.clone(), torch.ones_like(PROMPT)
    for b, n in enumerate(pads):
        tokens[b, :n], mask[b, :n] = 5, 0
    return {"inputs": tokens, "attention_mask": mask}


@pytest.mark.thorough  # 2,000 tokens in each form
def test_greedy_text_of_two_thousand_tokens_is_that_of_the_port(model: BDHForCausalLM, port: BDH) -> None:
    expected = port.generate(PROMPT, 2000, temperature=0)
    assert torch.equal(model.generate(PROMPT, do_sample=False, max_new_tokens=2000, prefill_chunk_size=4), expected)
    with torch.no_grad():
        read = model(expected[:, :-1], use_cache=False).logits.argmax(-1)
    assert torch.equal(read[:, 8:], expected[:, 9:])


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_text_is_the_same_with_a_cache_and_without(model: BDHForCausalLM, greedy: Tensor, use_cache: bool) -> None:
    assert torch.equal(model.generate(PROMPT, use_cache=use_cache, **GREEDY), greedy)


@pytest.mark.parametrize("size", [1, 4, 9, 50])
@pytest.mark.parametrize("pads", [(0, 0), (6, 2)], ids=str)
def test_a_prompt_may_be_read_in_chunks(model: BDHForCausalLM, size: int, pads: tuple[int, ...]) -> None:
    expected = model.generate(**padded(pads), **GREEDY)
    assert torch.equal(model.generate(**padded(pads), prefill_chunk_size=size, **GREEDY), expected)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_texts_with_padding_on_the_left_are_continued_as_if_alone(
    model: BDHForCausalLM, use_cache: bool, num_beams: int
) -> None:
    options = {"use_cache": use_cache, "num_beams": num_beams, "do_sample": False, "max_new_tokens": 12}
    together = model.generate(**padded((6, 2)), **options)
    for b, pad in enumerate((6, 2)):
        alone = model.generate(PROMPT[b : b + 1, pad:], **options)
        assert torch.equal(together[b, pad:], alone[0])


def test_padding_that_generate_finds_by_its_id_counts_for_nothing(model: BDHForCausalLM) -> None:
    tokens = torch.cat((torch.full((1, 4), 66), PROMPT[1:, :5]), dim=1)
    assert torch.equal(model.generate(tokens, pad_token_id=66, **GREEDY)[0, 4:], model.generate(PROMPT[1:, :5], **GREEDY)[0])


SAMPLED = {"do_sample": True, "max_new_tokens": 25, "temperature": 1.3, "top_k": 20, "top_p": 0.95}


def test_a_seed_gives_the_same_sample_again_with_and_without_a_cache(model: BDHForCausalLM) -> None:
    texts = []
    for seed, use_cache in ((1, True), (1, True), (1, False), (2, True)):
        torch.manual_seed(seed)
        texts.append(model.generate(PROMPT, use_cache=use_cache, **SAMPLED).tolist())
    assert texts[0] == texts[1] == texts[2] != texts[3]


def test_several_samples_of_a_prompt_are_samples_of_its_repetition(model: BDHForCausalLM) -> None:
    torch.manual_seed(5)
    several = model.generate(PROMPT, num_return_sequences=3, **SAMPLED)
    torch.manual_seed(5)
    assert torch.equal(several, model.generate(PROMPT.repeat_interleave(3, dim=0), **SAMPLED))
    assert len({tuple(row) for row in several.tolist()}) == 6


def best(model: BDHForCausalLM, prompt: list[int], beams: int, steps: int) -> list[tuple[list[int], float]]:
    """Beam search that reads every text anew: the best texts and the sums of their log-probabilities."""
    kept = [(prompt, 0.0)]
    for _ in range(steps):
        grown = []
        for text, score in kept:
            logits = model(torch.tensor([text]), use_cache=False).logits[0, -1]
            grown += [([*text, token], score + gain) for token, gain in enumerate(logits.log_softmax(-1).tolist())]
        kept = sorted(grown, key=lambda pair: -pair[1])[:beams]
    return kept


@torch.no_grad()
def test_beam_search_finds_what_reading_every_text_anew_finds(model: BDHForCausalLM) -> None:
    beams, steps = 4, 7
    found = model.generate(
        PROMPT,
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=steps,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    expected = [pair for prompt in PROMPT.tolist() for pair in best(model, prompt, beams, steps)]
    assert found.sequences.tolist() == [text for text, _ in expected]
    assert found.sequences_scores.tolist() == pytest.approx([score / steps for _, score in expected], rel=1e-5)
    assert len(set(found.beam_indices[:beams, 1:-1].flatten().tolist())) > 1  # beams did change places


def test_beam_search_is_the_same_without_a_cache(model: BDHForCausalLM) -> None:
    options = {"num_beams": 3, "max_new_tokens": 15, "do_sample": False}
    assert torch.equal(model.generate(PROMPT, **options), model.generate(PROMPT, use_cache=False, **options))


class Letters:
    """Stands for a tokenizer: each id is a letter."""

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(chr(48 + int(i)) for i in ids)


def test_a_streamer_gets_the_text_as_it_is_written(model: BDHForCausalLM, greedy: Tensor) -> None:
    streamer = TextIteratorStreamer(Letters(), skip_prompt=True)
    writer = threading.Thread(target=model.generate, args=(PROMPT[:1],), kwargs={"streamer": streamer, **GREEDY})
    writer.start()
    written = "".join(streamer)
    writer.join()
    assert written == Letters().decode(greedy[0, 9:])


def test_a_streamer_may_print(model: BDHForCausalLM, greedy: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    model.generate(PROMPT[:1], streamer=TextStreamer(Letters()), **GREEDY)
    assert capsys.readouterr().out == Letters().decode(greedy[0]) + "\n"


class After(StoppingCriteria):
    """Stop once a text has this many tokens."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_a_stopping_criterion_ends_the_text(model: BDHForCausalLM, greedy: Tensor) -> None:
    stopped = model.generate(PROMPT, stopping_criteria=StoppingCriteriaList([After(17)]), **GREEDY)
    assert torch.equal(stopped, greedy[:, :17])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("pad", [0, 300], ids=["in_the_vocabulary", "outside_the_vocabulary"])
def test_a_text_that_has_ended_is_padded_while_others_go_on(
    model: BDHForCausalLM, greedy: Tensor, pad: int, use_cache: bool
) -> None:
    end = next(t for t in greedy[0, 12:].tolist() if t not in greedy[1].tolist())
    stop = greedy[0, 9:].tolist().index(end) + 10
    given = {"attention_mask": torch.ones_like(PROMPT), "eos_token_id": end, "pad_token_id": pad, "use_cache": use_cache}
    written = model.generate(PROMPT, **given, **GREEDY)
    assert torch.equal(written[0, :stop], greedy[0, :stop])
    assert (written[0, stop:] == pad).all()
    assert torch.equal(written[1], greedy[1])


class Only(LogitsProcessor):
    """Allow the ids of one parity at even lengths of the text and of the other at odd ones."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        parity = torch.arange(scores.shape[-1]) % 2
        return scores.masked_fill(parity != input_ids.shape[1] % 2, -torch.inf)


def test_a_logits_processor_decides_what_may_come(model: BDHForCausalLM) -> None:
    written = model.generate(PROMPT, logits_processor=LogitsProcessorList([Only()]), **GREEDY)
    assert (written[:, 9:] % 2 == torch.arange(9, 39) % 2).all()
    with torch.no_grad():
        logits = model(written[:, :-1]).logits[:, 8:]
    allowed = torch.stack([Only()(written[:, :n], logits[:, n - 9]) for n in range(9, 39)], dim=1)
    assert torch.equal(allowed.argmax(-1), written[:, 9:])


def test_bad_words_and_repetitions_never_come(model: BDHForCausalLM, greedy: Tensor) -> None:
    bad = greedy[0, 9:12].tolist()
    written = model.generate(PROMPT, bad_words_ids=[[token] for token in bad], no_repeat_ngram_size=2, **GREEDY)
    assert not set(bad) & set(written[:, 9:].flatten().tolist())
    for row in written.tolist():
        pairs = list(itertools.pairwise(row))
        assert len(set(pairs[8:])) == len(pairs[8:])


def test_a_function_may_say_which_tokens_are_allowed(model: BDHForCausalLM) -> None:
    def multiples(batch: int, text: Tensor) -> list[int]:
        return [t for t in range(67) if t % (batch + 2) == 0]

    written = model.generate(PROMPT, prefix_allowed_tokens_fn=multiples, **GREEDY)[:, 9:]
    assert (written % torch.tensor([[2], [3]]) == 0).all()
    assert len(set(written.flatten().tolist())) > 3


def test_guidance_reads_the_negative_prompt_beside_the_text(model: BDHForCausalLM) -> None:
    negative, scale = PROMPT.flip(1), 1.7
    written = model.generate(PROMPT, negative_prompt_ids=negative, guidance_scale=scale, **{**GREEDY, "max_new_tokens": 8})
    with torch.no_grad():
        for t in range(9, 17):
            towards = model(written[:, :t]).logits[:, -1].log_softmax(-1)
            away = model(torch.cat((negative, written[:, 9:t]), dim=1)).logits[:, -1].log_softmax(-1)
            assert torch.equal((away + scale * (towards - away)).argmax(-1), written[:, t])


def test_a_prompt_may_be_of_embeddings_alone(model: BDHForCausalLM, greedy: Tensor) -> None:
    embeddings = model.get_input_embeddings()(PROMPT)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **GREEDY), greedy[:, 9:])
    both = model.generate(PROMPT, inputs_embeds=embeddings, **GREEDY)
    assert torch.equal(both, greedy)


def test_scores_logits_and_hidden_states_of_every_step_are_those_of_the_whole_text(model: BDHForCausalLM) -> None:
    out = model.generate(
        PROMPT, return_dict_in_generate=True, output_scores=True, output_logits=True, output_hidden_states=True, **GREEDY
    )
    with torch.no_grad():
        whole = model(out.sequences[:, :-1], output_hidden_states=True)
    float32 = {"rtol": 1e-6, "atol": 1e-6}  # transformers rounds logits to float32 before it looks at them
    for kept in (out.scores, out.logits):
        torch.testing.assert_close(torch.stack(kept, dim=1).double(), whole.logits[:, 8:], **float32)
    assert len(out.hidden_states) == 30
    for i, expected in enumerate(whole.hidden_states):
        joined = torch.cat([step[i] for step in out.hidden_states], dim=1)
        torch.testing.assert_close(joined, expected, rtol=FLOAT64, atol=FLOAT64)


def test_attentions_of_every_step_are_those_of_the_whole_text(load: Load) -> None:
    model = load(CASE, "bdh_parallel")
    out = model.generate(PROMPT, return_dict_in_generate=True, output_attentions=True, **GREEDY)
    with torch.no_grad():
        whole = model(out.sequences[:, :-1], output_attentions=True).attentions
    for i, expected in enumerate(whole):
        for t, step in enumerate(out.attentions):
            rows = slice(0, 9) if t == 0 else slice(8 + t, 9 + t)
            torch.testing.assert_close(step[i], expected[:, :, rows, : 9 + t], rtol=FLOAT64, atol=FLOAT64)


def test_attentions_of_the_recurrent_form_are_refused(load: Load) -> None:
    with pytest.raises(ValueError, match=r"no attention matrix.*bdh_parallel"):
        load(CASE, "bdh_recurrent").generate(PROMPT, return_dict_in_generate=True, output_attentions=True, **GREEDY)


@pytest.mark.parametrize("pads", [(0, 0), (5, 0)], ids=str)
def test_a_returned_cache_goes_on_as_one_run_would(model: BDHForCausalLM, pads: tuple[int, ...]) -> None:
    given = padded(pads)
    mask = given["attention_mask"]
    whole = model.generate(**given, **GREEDY)
    first = model.generate(**given, return_dict_in_generate=True, do_sample=False, max_new_tokens=11)
    seen = torch.cat((mask, mask.new_ones(2, 11)), dim=1)
    rest = model.generate(
        first.sequences, attention_mask=seen, past_key_values=first.past_key_values, do_sample=False, max_new_tokens=19
    )
    assert torch.equal(rest, whole)


def test_new_tokens_alone_may_follow_a_returned_cache(model: BDHForCausalLM) -> None:
    first = model.generate(PROMPT, return_dict_in_generate=True, do_sample=False, max_new_tokens=11)
    question = PROMPT.flip(1)
    text = torch.cat((first.sequences, question), dim=1)
    whole = model.generate(text, **GREEDY)
    # The last written token is not in the cache yet; the mask is of the whole text, as transformers asks.
    rest = model.generate(text[:, 19:], attention_mask=torch.ones_like(text), past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(rest, whole[:, 19:])


def test_new_tokens_after_a_cache_without_the_mask_of_all_tokens_are_refused_with_the_remedy(model: BDHForCausalLM) -> None:
    first = model.generate(PROMPT, return_dict_in_generate=True, do_sample=False, max_new_tokens=11)
    with pytest.raises(ValueError, match=r"no tokens to read.*attention_mask of all tokens"):
        model.generate(PROMPT[:, :3], past_key_values=first.past_key_values, **GREEDY)


def test_a_cache_may_be_given(model: BDHForCausalLM, greedy: Tensor) -> None:
    cache = BDHCache(model.config)
    assert torch.equal(model.generate(PROMPT, past_key_values=cache, **GREEDY), greedy)
    assert cache.get_seq_length() == 38


def test_a_dynamic_cache_serves_the_parallel_form_and_is_refused_by_the_other(load: Load, greedy: Tensor) -> None:
    model = load(CASE, "bdh_parallel")
    assert torch.equal(model.generate(PROMPT, past_key_values=DynamicCache(), **GREEDY), greedy)
    model.set_attn_implementation("bdh_recurrent")
    with pytest.raises(ValueError, match=r"bdh_recurrent cannot use a DynamicCache.*BDHCache\(model\.config\)"):
        model.generate(PROMPT, past_key_values=DynamicCache(), **GREEDY)


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static", "quantized"])
def test_caches_that_bdh_cannot_have_are_refused(model: BDHForCausalLM, kind: str) -> None:
    with pytest.raises(ValueError, match=f"BDH has no cache_implementation '{kind}': leave it out"):
        model.generate(PROMPT, cache_implementation=kind, **GREEDY)


def test_the_usual_cache_may_be_asked_for_by_name(model: BDHForCausalLM, greedy: Tensor) -> None:
    assert torch.equal(model.generate(PROMPT, cache_implementation="dynamic", **GREEDY), greedy)


def size(cache: BDHCache) -> int:
    """Values that a cache holds."""
    kept = [getattr(layer, name, None) for layer in cache.layers for name in ("state", "keys", "values")]
    return sum(tensor.numel() for tensor in kept if tensor is not None)


def test_r13_what_is_remembered_of_a_text_does_not_grow_in_the_recurrent_form(model: BDHForCausalLM, form: str) -> None:
    short, long = (
        size(model.generate(PROMPT, return_dict_in_generate=True, do_sample=False, max_new_tokens=n).past_key_values)
        for n in (5, 50)
    )
    c = CASE.config
    state = 2 * c.n_layer * c.n_head * c.n_neurons * c.n_embd
    assert (short, long) == (state, state) if form == "bdh_recurrent" else short < long


def assistant(load: Load, form: str) -> BDHForCausalLM:
    """Another model of the same vocabulary, which is right now and then: the same with one layer."""
    sizes = Sizes(n_layer=1, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=67)
    other = load(Case(sizes, time=9, seed=3, scale=15), form)
    other.generation_config.num_assistant_tokens = 4
    other.generation_config.assistant_confidence_threshold = 0
    return other


def test_assisted_generation_writes_the_same_text(load: Load, greedy: Tensor) -> None:
    model, steps = load(CASE, "bdh_parallel"), []
    model.register_forward_hook(lambda *_: steps.append(1))
    written = model.generate(PROMPT[:1], assistant_model=assistant(load, "bdh_parallel"), **GREEDY)
    assert torch.equal(written, greedy[:1])
    assert len(steps) < 30  # some guesses were right


@pytest.mark.parametrize("layers", [1, 2])
def test_the_first_layers_of_a_model_may_assist_it(load: Load, greedy: Tensor, layers: int) -> None:
    model = load(CASE, "bdh_parallel")
    assert torch.equal(model.generate(PROMPT[:1], assistant_early_exit=layers, **GREEDY), greedy[:1])
    assert model.config.num_hidden_layers == 2


def test_an_assistant_that_cannot_take_tokens_back_is_refused(load: Load) -> None:
    model = load(CASE, "bdh_parallel")
    with pytest.raises(
        ValueError, match=r"state of bdh_recurrent cannot be cropped.*set_attn_implementation\('bdh_parallel'\)"
    ):
        model.generate(PROMPT[:1], assistant_model=assistant(load, "bdh_recurrent"), **GREEDY)


def test_guesses_looked_up_in_the_prompt_write_the_same_text(load: Load, port: BDH) -> None:
    model, prompt, steps = load(CASE, "bdh_parallel"), port.generate(PROMPT[:1], 80, temperature=0), []
    model.register_forward_hook(lambda *_: steps.append(1))
    written = model.generate(prompt, prompt_lookup_num_tokens=5, **GREEDY)
    assert torch.equal(written, port.generate(prompt, 30, temperature=0))
    assert len(steps) < 30


@pytest.mark.parametrize("mode", ["assistant_model", "prompt_lookup_num_tokens"])
def test_assisted_generation_by_the_recurrent_form_is_refused_with_the_remedy(load: Load, mode: str) -> None:
    given = {mode: assistant(load, "bdh_parallel") if mode == "assistant_model" else 5}
    with pytest.raises(ValueError, match=r"takes tokens back.*set_attn_implementation\('bdh_parallel'\)"):
        load(CASE, "bdh_recurrent").generate(PROMPT[:1], **given, **GREEDY)


def test_a_decoding_function_of_ones_own_is_served(model: BDHForCausalLM, greedy: Tensor) -> None:
    def least_likely(model: Any, input_ids: Tensor, generation_config: Any, **kwargs: Any) -> Tensor:
        cache = kwargs["past_key_values"]
        for _ in range(3):
            logits = model(input_ids[:, cache.get_seq_length() :], past_key_values=cache, use_cache=True).logits
            input_ids = torch.cat((input_ids, logits[:, -1:].argmin(-1)), dim=1)
        return input_ids

    written = model.generate(PROMPT, custom_generate=least_likely, **GREEDY)
    with torch.no_grad():
        assert torch.equal(model(written[:, :-1]).logits[:, 8:].argmin(-1), written[:, 9:])


def test_r8_generate_never_drops_and_leaves_every_mode_as_it_was(model: BDHForCausalLM, greedy: Tensor) -> None:
    model.train()
    model.backbone.layers[1].eval()
    before = [module.training for module in model.modules()]
    assert torch.equal(model.generate(PROMPT, **GREEDY), greedy)
    assert [module.training for module in model.modules()] == before


def test_generate_leaves_training_on_after_an_error(model: BDHForCausalLM) -> None:
    model.train()
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(PROMPT, cache_implementation="quantized", **GREEDY)
    assert all(module.training for module in model.modules())


def test_r8_generate_with_gradient_checkpointing_in_training_writes_the_same_text(
    model: BDHForCausalLM, greedy: Tensor
) -> None:
    model.activation_checkpointing_enable()
    assert torch.equal(model.train().generate(PROMPT, **GREEDY), greedy)


def test_a_narrow_model_writes(load: Load, form: str) -> None:
    model = load(CASE, form, torch.bfloat16)
    written = model.generate(PROMPT, **GREEDY)
    assert written.shape == (2, 39)
    assert torch.equal(written, model.generate(PROMPT, **GREEDY))
