"""Texts that are written together, joining and leaving at any step: each is the one that it would be alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TopPLogitsWarper

from bdh_conformance.yardstick.agreement import assert_agrees
from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.tolerances import expect
from bdh_spec import SamplingError, TokensError
from bdh_spec.config import BDHConfig as Sizes
from bdh_spec.model import forward
from bdh_spec.numpy_backend import NumpyBackend
from bdh_spec.params import Array, Params
from bdh_spec.sampling import Sampling, probabilities
from bdh_torch import forms
from bdh_transformers import BDHForCausalLM, ContinuousBatch, batching
from bdh_transformers.batching import Text, nucleus, state_bytes

Load = Callable[..., BDHForCausalLM]

CASE = Case(Sizes(n_layer=3, n_embd=8, n_head=2, mlp_internal_dim_multiplier=24, vocab_size=61), time=40, seed=3, scale=12)
TOKENS = CASE.tokens[0].tolist()
# Prompts of 1 to 40 tokens, longer and shorter than a step reads, and the step at which each joins and leaves.
PROMPTS = [TOKENS[:n] for n in (3, 40, 1, 17, 8, 5)]
JOINS, LEAVES = (0, 0, 2, 5, 5, 11), (40, 40, 9, 40, 20, 40)
HOW = [
    Sampling(1.0, None, 0),
    Sampling(0.7, 5, 2**64 - 1),
    Sampling(2.0, 0, 7),
    Sampling(0.0, None, 7),
    Sampling(1.0, None, 7),
    Sampling(1.5, 20, 8),
]


@pytest.fixture(params=["state", "rows", "active neurons", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a model remembers and reads: by states, by rows at first, by active neurons alone, by the plain kernel."""
    if request.param in ("rows", "active neurons"):
        monkeypatch.setattr(forms, "KEPT", 0)
        monkeypatch.setattr(forms, "KEPT_SHARE", 6 / CASE.config.n_embd)
    if request.param == "active neurons":
        for name, value in {"COUNTED": 0, "COPIED": 9, "SUMMED": 9}.items():
            monkeypatch.setattr(forms, name, value)
    return request.param


@pytest.fixture
def made(load: Load, way: str) -> Callable[..., BDHForCausalLM]:
    """A model that remembers and reads so."""

    def make(dtype: torch.dtype = torch.float64) -> BDHForCausalLM:
        model = load(CASE, "bdh_recurrent", dtype)
        model.backbone.kernel = "plain" if way == "plain" else None
        return model

    return make


def written(model: BDHForCausalLM, chunk: int = 7) -> list[list[int]]:
    """What the texts write while they join and leave."""
    batch, texts, new = ContinuousBatch(model, chunk=chunk), dict[int, Text](), [list[int]() for _ in PROMPTS]
    for step in range(max(LEAVES)):
        for i in range(len(PROMPTS)):
            if JOINS[i] == step:
                texts[i] = batch.join(PROMPTS[i], HOW[i])
            if LEAVES[i] == step:
                batch.leave(texts[i])
        numbers = {text: i for i, text in texts.items()}
        for text, token in batch.step():
            assert isinstance(token, int)
            new[numbers[text]].append(token)
    return new


def alone(i: int, length: int) -> list[int]:
    """What the specification writes after one of the prompts."""
    model = NumpyBackend().load(CASE.params, CASE.config, dtype="float64")
    text = model.generate(np.array([PROMPTS[i]]), length, HOW[i].temperature, HOW[i].top_k, HOW[i].seed)
    return text[0, len(PROMPTS[i]) :].tolist()


def test_r14_each_text_is_that_of_its_seed_whoever_joins_and_leaves(made: Callable[..., BDHForCausalLM]) -> None:
    new = written(made())
    assert all(len(text) >= 5 for text in new)
    assert new == [alone(i, len(text)) for i, text in enumerate(new)]
    assert len({tuple(text[:5]) for text in new}) == len(new)  # none that would pass for another


@pytest.mark.parametrize("chunk", [1, 40, 1000])
def test_how_much_a_step_reads_changes_no_text(load: Load, chunk: int) -> None:
    new = written(load(CASE, "bdh_recurrent"), chunk)
    assert new == [alone(i, len(text)) for i, text in enumerate(new)]


def mixed_up(values: Any, B: int) -> Any:
    """The parts of texts in another order."""
    return values.unflatten(0, (-1, B)).transpose(0, 1).flip(0).contiguous().unbind()


def head_by_head(each: Any) -> Any:
    """Heads and texts in the wrong order."""
    return torch.stack(tuple(each), dim=0).flatten(0, 1)


@pytest.mark.parametrize("bug", [("by_text", mixed_up), ("in_heads", head_by_head)], ids=lambda bug: bug[0])
def test_texts_that_are_mixed_up_are_found(
    made: Callable[..., BDHForCausalLM], monkeypatch: pytest.MonkeyPatch, bug: tuple[str, Any]
) -> None:
    monkeypatch.setattr(batching, *bug)
    new = written(made())
    assert new != [alone(i, len(text)) for i, text in enumerate(new)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_r13_logits_of_texts_together_are_the_specification(
    made: Callable[..., BDHForCausalLM], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    seen, usual = list[tuple[Text, Array]](), batching.draw

    def note(text: Text, logits: Array) -> Any:
        seen.append((text, logits))
        return usual(text, logits)

    monkeypatch.setattr(batching, "draw", note)
    batch = ContinuousBatch(made(getattr(torch, dtype)), chunk=7)
    texts = [batch.join(prompt, how) for prompt, how in zip(PROMPTS, HOW, strict=True)]
    read = {text: list(prompt) for text, prompt in zip(texts, PROMPTS, strict=True)}
    for _ in range(20):
        for text, token in batch.step():
            read[text].append(token)

    def specified(params: Params) -> dict[str, Array]:
        whole = [forward(np.array([read[text][:-1]]), params, CASE.config)[0] for text in texts]
        return {f"{i}": logits[len(PROMPTS[i]) - 1 :] for i, logits in enumerate(whole)}

    actual = {f"{i}": np.stack([logits for which, logits in seen if which is text]) for i, text in enumerate(texts)}
    assert_agrees("together", actual, expect(specified, CASE.params, dtype), dtype)


def test_a_long_prompt_keeps_nobody_waiting(load: Load) -> None:
    batch = ContinuousBatch(load(CASE, "bdh_recurrent"), chunk=4)
    first = batch.join(TOKENS[:4], HOW[0])
    assert [text for text, _ in batch.step()] == [first]
    long = batch.join(TOKENS, HOW[1])
    for _ in range(3):
        assert [text for text, _ in batch.step()] == [first]
    short = batch.join(TOKENS[:4], HOW[2])
    firsts = {}
    for step in range(9):
        for text, _ in batch.step():
            firsts.setdefault(text, step)
    assert firsts == {first: 0, short: 1, long: 7}  # 40 tokens in ten turns, of which three were before and one was another's
    assert long.length == len(TOKENS) + 1


def test_a_row_is_that_of_a_batch(load: Load) -> None:
    model = NumpyBackend().load(CASE.params, CASE.config, dtype="float64")
    expected = model.generate(np.array([PROMPTS[0]] * 3), 9, 1.0, None, 5)[:, 3:].tolist()
    batch = ContinuousBatch(load(CASE, "bdh_recurrent"))
    texts = {batch.join(PROMPTS[0], Sampling(seed=5), row=row): row for row in range(3)}
    new = [list[int]() for _ in range(3)]
    for _ in range(9):
        for text, token in batch.step():
            new[texts[text]].append(token)
    assert new == expected


@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 1.0])
def test_top_p_keeps_what_transformers_keeps(top_p: float) -> None:
    for seed in range(20):
        logits, how = np.random.default_rng(seed).normal(0, 2, 61), Sampling(0.8, 30, 0)
        chances = probabilities(logits, how)
        kept = np.sort(chances)[::-1][: nucleus(chances, top_p)]
        scores = torch.from_numpy(np.where(chances > 0, logits / how.temperature, -np.inf))[None]
        assert len(kept) == int(torch.isfinite(TopPLogitsWarper(top_p)(None, scores)).sum())


def test_a_text_of_top_p_takes_nothing_else(load: Load) -> None:
    model = load(CASE, "bdh_recurrent")
    texts = []
    for top_p in (1.0, 0.999999999, 0.5, 0.0):
        batch = ContinuousBatch(model)
        batch.join(PROMPTS[1], Sampling(2.0, seed=1), top_p=top_p)
        texts.append([token for _ in range(30) for _, token in batch.step()])
    batch.join(PROMPTS[1], Sampling(0.0))
    assert texts[0] == texts[1]
    assert len({tuple(text) for text in texts}) == 3
    reference = NumpyBackend().load(CASE.params, CASE.config, dtype="float64")
    assert [*PROMPTS[1], *texts[3]] == reference.generate(np.array([PROMPTS[1]]), 30, 0.0)[0].tolist()
    for t, token in enumerate(texts[2]):
        chances = probabilities(reference.forward(np.array([PROMPTS[1] + texts[2][:t]]))[0, -1], Sampling(2.0))
        assert chances[chances > chances[token]].sum() < 0.5


def test_a_text_that_diverges_leaves_and_the_others_go_on(load: Load) -> None:
    model = load(CASE, "bdh_recurrent")
    bad = next(token for token in range(61) if token not in PROMPTS[0])
    model.backbone.embed.weight.data[bad] = torch.nan
    batch = ContinuousBatch(model)
    good, other = batch.join(PROMPTS[0], HOW[3]), batch.join([*PROMPTS[0], bad], HOW[0])
    (first, token), (second, reason) = batch.step()
    assert (first, second) == (good, other)
    assert isinstance(token, int)
    assert isinstance(reason, SamplingError)
    assert "diverged" in str(reason)
    assert len(batch) == 1
    batch.leave(other)  # which has left
    assert [text for text, _ in batch.step()] == [good]
    batch.leave(good)
    assert batch.step() == []


def test_a_batch_says_what_is_wrong_before_anything_is_read(load: Load) -> None:
    model = load(CASE, "bdh_recurrent")
    batch = ContinuousBatch(model)
    for prompt in ([], [61], [-1], [1.5], ["a"], b""):
        with pytest.raises(TokensError):
            batch.join(prompt, Sampling())
    with pytest.raises(SamplingError, match=r"top_p is 1\.5"):
        batch.join([1], Sampling(), top_p=1.5)
    assert len(batch) == 0
    with pytest.raises(ValueError, match="chunk is 0"):
        ContinuousBatch(model, chunk=0)
    with pytest.raises(ValueError, match=r"training mode.*model\.eval"):
        ContinuousBatch(load(CASE, "bdh_recurrent").train())
    with pytest.raises(ValueError, match=r"bdh_parallel keeps rows.*set_attn_implementation"):
        ContinuousBatch(load(CASE, "bdh_parallel"))
    model.backbone.kernel = "streamed"
    batch.join([1], HOW[0])
    batch.join([2], HOW[0])
    batch.step()
    with pytest.raises(NotImplementedError, match="kernel to None"):
        batch.step()


def test_a_text_takes_what_its_state_takes(load: Load) -> None:
    model = load(CASE, "bdh_recurrent", torch.float32)
    batch = ContinuousBatch(model)
    text = batch.join(TOKENS, HOW[0])
    for length in (40, 41):
        batch.step()
        assert text.length == length
        held = [layer.state for layer in text.cache.layers]
        assert sum(state.nbytes for state in held if state is not None) == state_bytes(model.config)
