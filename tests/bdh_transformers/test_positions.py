"""Where tokens stand if nobody says: padding counts for nothing, wherever it lies, and a cache knows how far its texts are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_conformance.yardstick.tolerances import FLOAT64
from bdh_torch.forms import Kernel
from bdh_transformers import BDHForCausalLM, BDHStaticCache, modeling_bdh

Load = Callable[..., BDHForCausalLM]

CASE = Case(CONFIGS["three_heads"], time=11, seed=1, scale=10)
TOKENS = torch.from_numpy(CASE.tokens)  # 2 11
# Of each prompt, the first six tokens: which are none of padding.
PROMPTS = {
    "left": torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]),
    "right": torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]),
    "both": torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]]),
    "within": torch.tensor([[1, 0, 0, 1, 1, 1], [1, 1, 1, 0, 1, 0]]),
}
each_prompt = pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
each_kernel = pytest.mark.parametrize("kernel", ["plain", "streamed"])


def whole(prompt: Tensor) -> Tensor:
    """The mask of a prompt and of what is written after it."""
    return torch.cat((prompt, prompt.new_ones(2, 5)), dim=1)


def demand_logits_of_texts_alone(model: BDHForCausalLM, logits: Tensor, mask: Tensor) -> None:
    """Demand of logits (2, 11, V) those that each text has without padding."""
    for row, kept in enumerate(mask.bool()):
        expected = model(TOKENS[row, kept][None], use_cache=False).logits[0]
        torch.testing.assert_close(logits[row, kept], expected, rtol=FLOAT64, atol=FLOAT64)


@each_kernel
@each_prompt
@torch.no_grad()
def test_r4_padding_counts_for_no_position(load: Load, form: str, prompt: Tensor, kernel: Kernel) -> None:
    model, mask = load(CASE, form), whole(prompt)
    model.backbone.kernel = kernel
    for use_cache in (False, True):
        demand_logits_of_texts_alone(model, model(TOKENS, attention_mask=mask, use_cache=use_cache).logits, mask)


@torch.no_grad()
def test_padding_around_texts_is_streamed_and_padding_within_them_is_not(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model, gated, count = load(CASE, "bdh_recurrent"), modeling_bdh.gated, [0]

    def counted(*args: Any, **options: Any) -> Tensor:
        count[0] += 1
        return gated(*args, **options)

    monkeypatch.setattr(modeling_bdh, "gated", counted)
    model.backbone.kernel = "streamed"
    calls = {}
    for side, prompt in PROMPTS.items():
        count[0] = 0
        model(TOKENS[:, :6], attention_mask=prompt, use_cache=False)
        calls[side] = count[0] // len(model.backbone.layers)
    assert calls == {"left": 1, "right": 1, "both": 1, "within": 0}


@pytest.mark.parametrize("pieces", [(6, 1, 1, 1, 1, 1), (6, 5), (2, 4, 2, 3)], ids=str)
@each_kernel
@each_prompt
@torch.no_grad()
def test_r4_a_loop_by_hand_that_hands_on_the_mask_alone_reads_as_if_there_were_no_padding(
    load: Load, form: str, prompt: Tensor, kernel: Kernel, pieces: tuple[int, ...]
) -> None:
    model, mask, cache, stop = load(CASE, form), whole(prompt), None, 0
    model.backbone.kernel = kernel
    logits = []
    for piece in TOKENS.split(pieces, dim=1):
        stop += piece.shape[1]
        output = model(piece, attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    demand_logits_of_texts_alone(model, torch.cat(logits, dim=1), mask)


# What a step says of itself: its positions as everybody counts them, the mask of all tokens, that of its own, or nothing.
STEPS: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
    "position_ids": lambda mask: {"position_ids": mask.sum(1, keepdim=True) - 1},
    "position_ids and mask": lambda mask: {"position_ids": mask.sum(1, keepdim=True) - 1, "attention_mask": mask},
    "own mask": lambda mask: {"attention_mask": mask[:, -1:]},
    "nothing": lambda mask: {},
}


@pytest.mark.parametrize("static", [False, True], ids=["usual", "static"])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@each_prompt
@torch.no_grad()
def test_r4_steps_may_say_less_or_more_than_the_prompt_did(
    load: Load, form: str, prompt: Tensor, step: Callable[[Tensor], dict[str, Tensor]], static: bool
) -> None:
    model, mask = load(CASE, form), whole(prompt)
    cache = BDHStaticCache(model.config, max_cache_len=11) if static else None
    output = model(TOKENS[:, :6], attention_mask=prompt, past_key_values=cache, use_cache=True)
    logits = [output.logits]
    for stop in range(7, 12):
        given = step(mask[:, :stop])
        logits.append(model(TOKENS[:, stop - 1 : stop], past_key_values=output.past_key_values, **given).logits)
    demand_logits_of_texts_alone(model, torch.cat(logits, dim=1), mask)


@torch.no_grad()
def test_r4_a_cache_whose_texts_change_places_knows_where_each_stands(load: Load, form: str) -> None:
    model, prompt = load(CASE, form), PROMPTS["left"]
    changes: dict[tuple[int, ...], Callable[..., None]] = {
        (1, 0, 1): lambda cache: cache.batch_select_indices(torch.tensor([1, 0, 1])),
        (1, 1): lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        (0, 0, 1, 1): lambda cache: cache.batch_repeat_interleave(2),
    }
    expected = model(TOKENS, attention_mask=whole(prompt), use_cache=False).logits[:, 6:]
    for order, change in changes.items():
        cache = model(TOKENS[:, :6], attention_mask=prompt).past_key_values
        change(cache)
        logits = model(TOKENS[list(order), 6:], past_key_values=cache).logits
        torch.testing.assert_close(logits, expected[list(order)], rtol=FLOAT64, atol=FLOAT64)


@torch.no_grad()
def test_r4_tokens_that_are_taken_back_give_their_positions_back(load: Load) -> None:
    model, prompt = load(CASE, "bdh_parallel"), PROMPTS["left"]
    cache = model(TOKENS[:, :6], attention_mask=prompt).past_key_values
    cache.crop(-2)
    logits = model(TOKENS[:, 4:], past_key_values=cache).logits
    expected = model(TOKENS, attention_mask=whole(prompt), use_cache=False).logits[:, 4:]
    torch.testing.assert_close(logits, expected, rtol=FLOAT64, atol=FLOAT64)


@torch.no_grad()
def test_r4_a_cache_counts_on_from_positions_of_ones_own(load: Load, form: str) -> None:
    model, start = load(CASE, form), 10**6
    cache = model(TOKENS[:, :6], position_ids=start + torch.arange(6)[None]).past_key_values
    cache.reorder_cache(torch.tensor([1, 0]))
    logits = model(TOKENS[:, 6:].flip(0), past_key_values=cache).logits
    expected = model(TOKENS, use_cache=False).logits[:, 6:].flip(0)
    torch.testing.assert_close(logits, expected, rtol=FLOAT64, atol=FLOAT64)
    cache.reset()
    assert cache.next_position() == 0
