"""The libraries around transformers run on small models for real: TRL, the evaluation harness, streams of datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset, load_dataset
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig
from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig
from transformers import DataCollatorForLanguageModeling, TorchAoConfig, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from bdh_conformance.yardstick.tolerances import FLOAT64
from bdh_transformers import BDHConfig, BDHForCausalLM, BDHTokenizer

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_internal_dim_multiplier": 4, "dropout": 0}
TOKENIZER = BDHTokenizer(eos_token="<eos>")
TRAIN = {"use_cpu": True, "report_to": [], "max_steps": 12, "learning_rate": 0.02, "logging_steps": 1, "save_strategy": "no"}
TEXTS = [{"text": text} for text in ("the dragon hatches", "a dragon flies", "the small dragon sleeps in the sun")] * 4
TALKS = [
    {"messages": [{"role": "user", "content": "who?"}, {"role": "assistant", "content": answer}]}
    for answer in ("the dragon", "a small dragon", "nobody")
] * 4

# TRL asks for checkpoints of activations by names that are on their way out.
pytestmark = pytest.mark.filterwarnings(r"ignore:`\w*gradient_checkpointing\w*` is deprecated:FutureWarning")


def small(**options: Any) -> BDHForCausalLM:
    """A model of bytes and an end, with weights large enough to learn at once."""
    torch.manual_seed(0)
    model = BDHForCausalLM(BDHConfig(**SIZES, **options))
    model.resize_token_embeddings(len(TOKENIZER))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(10)
    return model


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def learned(trainer: Trainer) -> None:
    """Train, and ask for a loss that falls."""
    trainer.train()
    assert len(losses(trainer)) == TRAIN["max_steps"]
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]


@pytest.mark.parametrize("packing", [False, True], ids=["one text a row", "packed"])
def test_trl_teaches_texts(form: str, packing: bool, tmp_path: Path) -> None:
    arguments = SFTConfig(tmp_path, packing=packing, max_length=64, per_device_train_batch_size=4, bf16=False, **TRAIN)
    model = small(attn_implementation=form)
    trainer = SFTTrainer(model, arguments, train_dataset=Dataset.from_list(TEXTS), processing_class=TOKENIZER)
    batch = next(iter(trainer.get_train_dataloader()))
    assert ("position_ids" in batch) is packing  # they tell where a text begins
    assert not packing or (batch["position_ids"].diff() < 0).any()
    learned(trainer)


def test_trl_teaches_what_the_assistant_says_and_its_end(tmp_path: Path) -> None:
    options = {"assistant_only_loss": True, "max_length": 64, "per_device_train_batch_size": 4, "bf16": False}
    arguments = SFTConfig(tmp_path, **options, **TRAIN)
    trainer = SFTTrainer(small(), arguments, train_dataset=Dataset.from_list(TALKS), processing_class=TOKENIZER)
    for row in next(iter(trainer.get_train_dataloader()))["labels"]:
        said = TOKENIZER.decode(row[row != -100])
        assert said.removesuffix("<eos>") in {talk["messages"][1]["content"] for talk in TALKS}
        assert said.endswith("<eos>")
    learned(trainer)


def test_trl_teaches_what_is_preferred(form: str, tmp_path: Path) -> None:
    small().save_pretrained(tmp_path / "model")  # from where the model to compare with is loaded once more
    model = BDHForCausalLM.from_pretrained(tmp_path / "model", attn_implementation=form)
    pairs = [{"prompt": f"{kind} ", "chosen": "dragon", "rejected": "mouse"} for kind in ("the", "a small", "no", "any")] * 4
    arguments = DPOConfig(tmp_path, per_device_train_batch_size=4, bf16=False, **TRAIN)
    trainer = DPOTrainer(model, args=arguments, train_dataset=Dataset.from_list(pairs), processing_class=TOKENIZER)
    learned(trainer)
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[0] == 0
    assert margins[-1] > 0


def test_trl_teaches_adapters_on_weights_of_eight_bits(form: str, tmp_path: Path) -> None:
    small().save_pretrained(tmp_path / "model")
    way = TorchAoConfig(Int8WeightOnlyConfig())
    model = BDHForCausalLM.from_pretrained(tmp_path / "model", quantization_config=way, attn_implementation=form)
    options = {"max_length": 64, "per_device_train_batch_size": 4, "bf16": False}
    arguments = SFTConfig(tmp_path, **options, **TRAIN | {"learning_rate": 0.1})
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    data = Dataset.from_list(TEXTS)
    trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=TOKENIZER, peft_config=lora)
    learned(trainer)
    assert {name.split(".lora_")[1][0] for name, w in trainer.model.named_parameters() if w.requires_grad} == {"A", "B"}
    assert {type(head.weight.data) for head in trainer.model.get_base_model().backbone.decoder} == {Int8Tensor}


@pytest.fixture
def harness(form: str) -> HFLM:
    """A model behind the evaluation harness."""
    return HFLM(pretrained=small(attn_implementation=form).double().eval(), tokenizer=TOKENIZER, batch_size=2)


def asked(kind: str, *arguments: Any) -> list[Instance]:
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


@torch.no_grad()
def directly(harness: HFLM, context: list[int], continuation: bytes) -> tuple[float, bool]:
    """The log-likelihood of a continuation, read in one go, and whether it is the likeliest at each byte."""
    ids = torch.tensor([[*context, *continuation]])
    said = harness.model(ids).logits[0, len(context) - 1 : -1].log_softmax(-1)
    here = ids[0, len(context) :]
    return said.gather(1, here[:, None]).sum().item(), torch.equal(said.argmax(-1), here)


def test_the_harness_finds_the_likelihoods_that_the_model_says(harness: HFLM) -> None:
    pairs = [("the dragon", " hatches"), ("a", "bc"), ("é", " and \n more"), ("", "whole")]
    greedy = harness.model.generate(torch.tensor([list(b"so")]), max_new_tokens=1, do_sample=False)[0, -1:].tolist()
    if greedy[0] < 128:  # as text it is a byte again
        pairs.append(("so", chr(greedy[0])))
    end = TOKENIZER.eos_token_id  # stands before a text that has nothing before it
    found = harness.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (likelihood, is_greedy) in zip(pairs, found, strict=True):
        expected = directly(harness, list(context.encode()) or [end], continuation.encode())
        assert (likelihood, is_greedy) == (pytest.approx(expected[0], rel=FLOAT64), expected[1])
    text = "the dragon hatches, and flies"
    (whole,) = harness.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)), disable_tqdm=True)
    assert whole == pytest.approx(directly(harness, [end], text.encode())[0], rel=FLOAT64)


def test_the_harness_writes_what_the_model_writes_until_it_is_told_to_stop(harness: HFLM) -> None:
    ids = torch.tensor([list(b"the dragon")])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": TOKENIZER.pad_token_id}
    expected = TOKENIZER.decode(harness.model.generate(ids, **options)[0, ids.shape[1] :])
    wanted = {"until": ["never said"], "max_gen_toks": 6, "do_sample": False}
    assert harness.generate_until(asked("generate_until", ("the dragon", wanted)), disable_tqdm=True) == [expected]


def test_a_stream_of_a_dataset_is_learned_from(form: str, tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jsonl").write_text("".join(json.dumps(text) + "\n" for text in TEXTS), encoding="utf-8")
    stream = load_dataset("json", data_files=str(tmp_path / "*.jsonl"), split="train", streaming=True, cache_dir=str(tmp_path))
    rows = stream.map(lambda row: TOKENIZER(row["text"] + "<eos>"), remove_columns=["text"]).shuffle(seed=0, buffer_size=8)
    assert isinstance(rows, IterableDataset)
    arguments = TrainingArguments(tmp_path / "out", per_device_train_batch_size=4, **TRAIN)
    collator = DataCollatorForLanguageModeling(TOKENIZER, mlm=False)
    learned(Trainer(small(attn_implementation=form), arguments, train_dataset=rows, data_collator=collator))


@pytest.mark.parametrize(
    ("mode", "named"),
    [
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "group-beam-search"),
        ({"num_beams": 3, "force_words_ids": [[5]]}, "constrained-beam-search"),
    ],
    ids=["groups", "constraints"],
)
def test_searches_that_transformers_has_moved_to_the_hub_are_refused_by_it(mode: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"requires `trust_remote_code=True` .*transformers-community/{named}"):
        small().generate(torch.tensor([list(b"the")]), max_new_tokens=3, **mode)
