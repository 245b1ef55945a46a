"""PEFT adapts the raw weights of the model and its head: adapters learn, are saved, merged, and write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_conformance.yardstick.tolerances import FLOAT64
from bdh_transformers import BDHForCausalLM

Load = Callable[..., BDHForCausalLM]

CASE = Case(CONFIGS["three_heads"], time=11, seed=1, scale=10)
TOKENS = torch.from_numpy(CASE.tokens)  # 2 11
LORA = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"], target_parameters=["encoder", "encoder_v", "decoder"])

pytestmark = [
    # peft asks transformers under a name that is on its way out, and says that it also keeps the head that it adapts.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]


@pytest.fixture
def adapted(load: Load, form: str) -> PeftModel:
    """A model with adapters, which alone will learn."""
    torch.manual_seed(0)
    return get_peft_model(load(CASE, form), LORA)


@pytest.fixture
def learned(adapted: PeftModel) -> PeftModel:
    """The same after a few steps."""
    learn(adapted)
    return adapted.eval()


def learn(model: PeftModel) -> list[float]:
    """Take a few steps; the loss before each."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.05), []
    for _ in range(12):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def same(actual: Tensor, expected: Tensor) -> None:
    """Equal to rounding in float64."""
    torch.testing.assert_close(actual, expected, rtol=FLOAT64, atol=FLOAT64)


def test_only_adapters_learn(adapted: PeftModel) -> None:
    before = {name: weight.clone() for name, weight in adapted.named_parameters()}
    losses = learn(adapted)
    moved = {name for name, weight in adapted.named_parameters() if not torch.equal(weight, before[name])}
    assert losses[-1] < 0.8 * losses[0]
    assert moved == {name for name in before if ".lora_" in name}
    assert len(moved) == 8  # two factors for each of encoder, encoder_v, decoder and lm_head


@torch.no_grad()
def test_merged_adapters_compute_and_write_the_same(load: Load, form: str, learned: PeftModel) -> None:
    expected, text = learned(TOKENS).logits, learned.generate(input_ids=TOKENS, do_sample=False, max_new_tokens=20)
    merged = learned.merge_and_unload()
    assert type(merged) is BDHForCausalLM
    same(merged(TOKENS).logits, expected)
    assert torch.equal(merged.generate(TOKENS, do_sample=False, max_new_tokens=20), text)
    assert (expected - load(CASE, form)(TOKENS).logits).abs().max() > 0.1


@torch.no_grad()
def test_saved_adapters_come_back(load: Load, form: str, learned: PeftModel, tmp_path: Path) -> None:
    learned.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(CASE, form), tmp_path)
    same(again(TOKENS).logits, learned(TOKENS).logits)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_gradients_of_adapters_are_the_same(adapted: PeftModel, use_reentrant: bool) -> None:
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            options = {"use_reentrant": use_reentrant}
            adapted.get_base_model().activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        torch.manual_seed(2)
        adapted.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
        found.append({name: weight.grad.clone() for name, weight in adapted.named_parameters() if weight.grad is not None})
        adapted.zero_grad()
    assert len(found[0]) == 8
    for name, slope in found[0].items():
        same(found[1][name], slope)


def test_the_embedding_is_found_under_the_wrappers(adapted: PeftModel) -> None:
    embedding = adapted.get_base_model().get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    assert embedding.weight.shape == (CASE.config.vocab_size, CASE.config.n_embd)


def test_all_linear_finds_modules_once_they_hold_the_weights(load: Load, form: str) -> None:
    wanted = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": "all-linear"}
    with pytest.raises(ValueError, match="No `target_modules` passed but also no `target_parameters` found"):
        get_peft_model(load(CASE, form), LoraConfig(**wanted))
    torch.manual_seed(0)
    adapted = get_peft_model(load(CASE, form).to_linear(), LoraConfig(**wanted))
    losses = learn(adapted)
    assert losses[-1] < 0.8 * losses[0]
    assert sum(weight.requires_grad for weight in adapted.parameters()) == 2 * 3 * CASE.config.n_head
    expected = adapted.eval()(TOKENS).logits
    same(adapted.merge_and_unload()(TOKENS).logits, expected)


def test_what_was_adapted_as_modules_is_saved_by_the_names_that_files_have(load: Load, form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    wanted = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
    merged = get_peft_model(load(CASE, form).to_linear(), wanted).merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = BDHForCausalLM.from_pretrained(tmp_path, attn_implementation=form)
    assert not again.is_linear
    same(again(TOKENS).logits, merged(TOKENS).logits)
    assert (again(TOKENS).logits - load(CASE, form)(TOKENS).logits).abs().max() > 0.1
