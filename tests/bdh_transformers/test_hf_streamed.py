"""The model for transformers by the streamed kernel, which is its default where neurons are many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_conformance.yardstick.tolerances import FLOAT64
from bdh_torch import forms
from bdh_transformers import BDHForCausalLM, modeling_bdh

Load = Callable[..., BDHForCausalLM]

CASE = Case(CONFIGS["three_heads"], batch=3, time=11, seed=1, scale=10)
TOKENS = torch.from_numpy(CASE.tokens)
LEFT, RIGHT = (torch.ones_like(TOKENS) for _ in range(2))
LEFT[1, :4] = RIGHT[1, 7:] = 0


class Both:
    """A model by each kernel, and how many layers were streamed."""

    def __init__(self, streamed: BDHForCausalLM, plain: BDHForCausalLM) -> None:
        self.streamed, self.plain, self.count = streamed, plain, 0
        plain.backbone.kernel = "plain"

    def agree(self, run: Callable[[BDHForCausalLM], Tensor]) -> None:
        """Demand that both compute the same, and that one of them was streamed and the other not."""
        before = self.count
        actual = run(self.streamed)
        assert self.count > before
        after = self.count
        expected = run(self.plain)
        assert self.count == after
        torch.testing.assert_close(actual, expected, rtol=0, atol=FLOAT64 * expected.abs().max().item())


@pytest.fixture(params=["whole", "in_chunks"])
def both(load: Load, form: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Both:
    """The default kernel, where everything is many, and the plain one."""
    if request.param == "in_chunks":
        request.getfixturevalue("short_chunks")
    monkeypatch.setattr(forms, "STREAMED", 0)
    monkeypatch.setattr(forms, "STREAMED_WITH_GRADIENTS", 0)
    made, gated = Both(load(CASE, form), load(CASE, form)), modeling_bdh.gated

    def counted(*args: Any, **options: Any) -> Tensor:
        made.count += 1
        return gated(*args, **options)

    monkeypatch.setattr(modeling_bdh, "gated", counted)
    return made


@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["none", "left", "right"])
def test_logits_and_gradients_beside_padding(both: Both, mask: Tensor | None) -> None:
    labels = TOKENS if mask is None else TOKENS.masked_fill(mask == 0, -100)

    def slopes(model: BDHForCausalLM) -> Tensor:
        logits = model(TOKENS, attention_mask=mask, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return torch.cat([slope.flatten() for slope in torch.autograd.grad(loss, list(model.parameters()))])

    def seen(model: BDHForCausalLM) -> Tensor:
        logits = model(TOKENS, attention_mask=mask, use_cache=False).logits
        return logits if mask is None else logits[mask != 0]

    both.agree(slopes)
    with torch.no_grad():
        both.agree(seen)


@torch.no_grad()
def test_a_text_is_read_on_in_pieces_from_a_cache(load: Load, both: Both, form: str) -> None:
    def run(model: BDHForCausalLM) -> Tensor:
        cache, logits = None, []
        for piece in TOKENS.split([5, 1, 3, 2], dim=1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache, logits = out.past_key_values, [*logits, out.logits]
        assert cache.get_seq_length() == TOKENS.shape[1]
        return torch.cat(logits, dim=1)

    if form == "bdh_recurrent":
        both.agree(run)
    else:  # rows are kept, which the streamed kernel never has
        torch.testing.assert_close(run(both.streamed), run(both.plain))
        assert both.count == 0


@torch.no_grad()
def test_positions_that_are_left_out_are_read_plainly(both: Both) -> None:
    gaps = torch.stack((torch.arange(11), 3 * torch.arange(11), torch.arange(11)))
    found = [model(TOKENS, position_ids=gaps, use_cache=False).logits for model in (both.streamed, both.plain)]
    assert both.count == 0
    torch.testing.assert_close(*found)


@torch.no_grad()
def test_texts_may_stand_anywhere(both: Both, form: str) -> None:
    own = (LEFT.cumsum(1) - 1).clamp(min=0)
    for use_cache in (False, form == "bdh_recurrent"):
        given = {"attention_mask": LEFT, "position_ids": own, "use_cache": use_cache}
        both.agree(lambda model, given=given: model(TOKENS, **given).logits[LEFT != 0])
    far = 10**6 + torch.arange(11)
    both.agree(lambda model: model(TOKENS, position_ids=far[None].expand(3, -1), use_cache=False).logits)


@torch.no_grad()
def test_generate_writes_the_same_text(both: Both) -> None:
    texts = [model.generate(TOKENS, max_new_tokens=6, do_sample=False, pad_token_id=0) for model in (both.streamed, both.plain)]
    assert torch.equal(*texts)


def test_r8_checkpointed_activations_drop_the_same(both: Both) -> None:
    model = both.streamed.train()

    def slopes(again: bool) -> Tensor:
        if again:
            model.activation_checkpointing_enable()
        torch.manual_seed(3)
        loss = model(TOKENS, labels=TOKENS).loss
        return torch.cat([slope.flatten() for slope in torch.autograd.grad(loss, list(model.parameters()))])

    for layer in model.backbone.layers:
        layer.drop.p = 0.4
    once, again = slopes(False), slopes(True)
    torch.testing.assert_close(again, once, rtol=0, atol=1e-6 * once.abs().max().item())  # the loss is in float32
    assert both.count == 3 * len(model.backbone.layers)
    torch.manual_seed(4)
    assert not torch.equal(model(TOKENS, labels=TOKENS).loss, model(TOKENS, labels=TOKENS).loss)


def test_r8_a_dropout_that_is_replaced_is_called(both: Both) -> None:
    for layer in both.streamed.backbone.layers:
        layer.drop = nn.Identity()
    both.streamed(TOKENS, use_cache=False)
    assert both.count == 0
