"""Training as users of transformers do it: Trainer, accumulated and checkpointed gradients, PEFT, several processes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import bdh_spec.model as spec
from bdh_conformance.yardstick.agreement import assert_agrees
from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_conformance.yardstick.tolerances import FLOAT64, Expectation, expect
from bdh_spec import Params
from bdh_spec.config import BDHConfig as Sizes
from bdh_spec.gradients import gradients as spec_gradients
from bdh_transformers import BDHForCausalLM

Load = Callable[..., BDHForCausalLM]
Gradients = Callable[[BDHForCausalLM], dict[str, Tensor]]

CASES = {name: Case(config, time=11, seed=1, scale=10) for name, config in CONFIGS.items()}
CASE = CASES["three_heads"]
TOKENS, TARGETS = torch.from_numpy(CASE.tokens), torch.from_numpy(CASE.targets)  # 2 11, one target is -100
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_length = pytest.mark.parametrize("lengths", ["usual", "short"])
FLOAT32 = 1e-6  # of a loss: transformers takes it in float32, whatever the model is in

BYTES = Sizes(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=8, vocab_size=256)


@pytest.fixture
def _chunks(request: pytest.FixtureRequest, lengths: str) -> None:
    """With ``lengths`` short, the same text is a long one."""
    if lengths == "short":
        request.getfixturevalue("short_chunks")


def close(actual: Tensor, expected: Tensor, allowed: float = FLOAT64) -> None:
    """Equal up to a fraction of the largest value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=allowed * expected.abs().max().item())


def slopes(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients at hand, which are then forgotten."""
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


def shifted(labels: np.ndarray) -> np.ndarray:
    """Targets of the specification for labels of transformers: what comes next, and nothing after the last token."""
    return np.concatenate((labels[:, 1:], np.full((len(labels), 1), -100)), axis=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_case
def test_r12_the_loss_is_that_of_the_shifted_labels(load: Load, case: Case, form: str, dtype: torch.dtype) -> None:
    tokens, labels = torch.from_numpy(case.tokens), torch.from_numpy(case.targets)
    logits = spec.forward(case.tokens, case.params, case.config)
    output = load(case, form, dtype)(tokens, labels=labels)
    assert output.loss.item() == pytest.approx(spec.loss(logits, shifted(case.targets)), rel=FLOAT32)
    direct = load(case, form, dtype)(tokens, labels=labels, shift_labels=labels)
    assert direct.loss.item() == pytest.approx(spec.loss(logits, case.targets), rel=FLOAT32)


def test_r12_the_loss_of_a_narrow_model_is_float32(load: Load, form: str) -> None:
    assert load(CASE, form, torch.bfloat16)(TOKENS, labels=TARGETS).loss.dtype == torch.float32


@pytest.mark.usefixtures("_chunks")
@each_length
@each_case
def test_r15_every_gradient_in_float64(load: Load, gradients: Gradients, case: Case, form: str, lengths: str) -> None:
    model = load(case, form)
    logits = model(torch.from_numpy(case.tokens), use_cache=False).logits
    F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(case.targets).flatten()).backward()
    _, expected = spec_gradients(case.tokens, case.targets, case.params, case.config)
    actual = {name: slope.numpy() for name, slope in gradients(model).items()}
    agrees = {name: Expectation(slope, FLOAT64, FLOAT64) for name, slope in expected._asdict().items()}
    assert_agrees(f"transformers {form}", actual, agrees, str(case))


@each_case
def test_r15_every_gradient_of_the_loss_in_float32(load: Load, gradients: Gradients, case: Case, form: str) -> None:
    model = load(case, form, torch.float32)
    model(torch.from_numpy(case.tokens), labels=torch.from_numpy(case.targets)).loss.backward()

    def run(params: Params) -> dict[str, np.ndarray]:
        return spec_gradients(case.tokens, shifted(case.targets), params, case.config)[1]._asdict()

    actual = {name: slope.numpy() for name, slope in gradients(model).items()}
    assert_agrees(f"transformers {form}", actual, expect(run, case.params, "float32"), str(case))


@pytest.mark.usefixtures("_chunks")
@each_length
def test_padding_changes_no_gradient(load: Load, form: str, lengths: str) -> None:
    model = load(CASE, form)
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0
    labels = TARGETS.masked_fill(mask == 0, -100)
    found = []
    for filler in (1, 5):
        logits = model(TOKENS.masked_fill(mask == 0, filler), attention_mask=mask).logits
        F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        found.append(slopes(model))
    for name, slope in found[0].items():
        close(slope, found[1][name])


@pytest.mark.parametrize("cut", [1, 2])
def test_micro_batches_with_unlike_numbers_of_labels_add_up_to_one_batch(load: Load, form: str, cut: int) -> None:
    case = Case(CONFIGS["three_heads"], batch=3, time=11, seed=1, scale=10)
    model, tokens = load(case, form), torch.from_numpy(case.tokens)
    labels = tokens.masked_fill(torch.arange(11) >= torch.tensor([[3], [11], [7]]), -100)
    model(tokens, labels=labels).loss.backward()
    whole, counted = slopes(model), (labels[:, 1:] != -100).sum()
    for rows in (slice(0, cut), slice(cut, 3)):
        model(tokens[rows], labels=labels[rows], num_items_in_batch=counted).loss.backward()
    for name, slope in slopes(model).items():
        close(slope, whole[name], FLOAT32)


class Masked(nn.Module):
    """Dropout whose draw is known."""

    def __init__(self, keep: np.ndarray) -> None:
        super().__init__()
        self.keep = torch.from_numpy(keep).transpose(0, 1).flatten(1, 2)  # h B*T N

    def forward(self, xy: Tensor) -> Tensor:
        return xy * self.keep


@each_case
@torch.no_grad()
def test_r8_what_drops_are_the_gated_neurons_of_each_layer_and_nothing_else(load: Load, case: Case, form: str) -> None:
    keep = spec.dropout(case.config, case.tokens.shape, np.dtype(np.float64), np.random.default_rng(5))
    model = load(case, form)
    for layer, mask in zip(model.backbone.layers, keep, strict=True):
        assert layer.drop.p == case.config.dropout
        layer.drop = Masked(mask)
    x, _ = spec.run(case.tokens, case.params, case.config, keep=keep)
    logits = model.train()(torch.from_numpy(case.tokens)).logits
    close(logits, torch.from_numpy(spec.readout(x, case.params)))
    assert sum(isinstance(module, nn.Dropout) for module in model.modules()) == 0  # there is no other


@torch.no_grad()
def test_r8_dropout_acts_in_training_only(load: Load, form: str) -> None:
    model = load(CASE, form)
    assert torch.equal(model(TOKENS).logits, model(TOKENS).logits)
    model.train()
    assert not torch.equal(model(TOKENS).logits, model(TOKENS).logits)


def test_no_cache_is_built_in_training_nor_for_a_loss_unless_asked_for(load: Load, form: str) -> None:
    model = load(CASE, form)
    assert model(TOKENS).past_key_values is not None
    assert model(TOKENS, labels=TOKENS).past_key_values is None
    assert model(TOKENS, labels=TOKENS, use_cache=True).past_key_values is not None
    model.train()
    assert model(TOKENS).past_key_values is None
    assert model(TOKENS, labels=TOKENS).past_key_values is None


@pytest.mark.usefixtures("_chunks")
@each_length
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_gradients_are_the_same_to_the_last_bit_with_the_same_neurons_dropped(
    load: Load, form: str, use_reentrant: bool, lengths: str
) -> None:
    model, found, runs = load(CASE, form).train(), [], []
    model.backbone.layers[0].drop.register_forward_hook(lambda *_: runs.append(1))
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
        torch.manual_seed(3)
        model(TOKENS, labels=TARGETS).loss.backward()
        found.append(slopes(model))
    assert len(runs) == 3 * (3 if lengths == "short" else 1)  # once without, twice with, for each chunk
    assert found[0].keys() == found[1].keys()
    for name, slope in found[1].items():
        assert torch.equal(slope, found[0][name]) or use_reentrant
        close(slope, found[0][name])  # autograd adds the layers' slopes in another order


def learnable(count: int, length: int) -> list[dict[str, Tensor]]:
    """Windows of a text that repeats itself, as bytes, of whose labels different numbers count."""
    text = torch.frombuffer(bytearray(b"the dragon hatches, and " * 40), dtype=torch.uint8).long()
    rows = [text[3 * i : 3 * i + length] for i in range(count)]
    return [{"input_ids": row, "labels": row.masked_fill(torch.arange(length) < i % 5, -100)} for i, row in enumerate(rows)]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """What all runs of Trainer here have in common."""
    usual = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "learning_rate": 2e-2}
    return TrainingArguments(output_dir=str(folder), **{**usual, **options})


def test_trainer_learns_and_evaluates(load: Load, form: str, tmp_path: Path) -> None:
    model = load(Case(BYTES), form, torch.float32)
    options = arguments(tmp_path, max_steps=60, per_device_train_batch_size=8, eval_strategy="steps", eval_steps=30)
    trainer = Trainer(model, options, train_dataset=learnable(64, 32), eval_dataset=learnable(80, 32)[64:])
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[1] < losses[0] < 5.5
    assert losses[1] < 1.5
    predicted = trainer.predict(learnable(5, 32))
    assert predicted.predictions.shape == (5, 32, 256)
    assert predicted.metrics["test_loss"] == pytest.approx(trainer.evaluate(learnable(5, 32))["eval_loss"])


def test_a_prediction_without_labels_is_logits_alone(load: Load, form: str, tmp_path: Path) -> None:
    model = load(Case(BYTES), form, torch.float32)
    texts = [{"input_ids": text["input_ids"]} for text in learnable(3, 16)]
    predicted = Trainer(model, arguments(tmp_path)).predict(texts).predictions
    np.testing.assert_array_equal(predicted, model(torch.stack([t["input_ids"] for t in texts])).logits.detach().numpy())


def test_trainer_shifts_the_labels_that_it_smooths(load: Load, form: str, tmp_path: Path) -> None:
    model, text = load(Case(BYTES), form, torch.float32), learnable(1, 32)[0]["input_ids"][None]
    trainer = Trainer(model, arguments(tmp_path, label_smoothing_factor=0.1))
    said = model(text).logits[:, :-1].log_softmax(-1)
    wanted = F.cross_entropy(said.flatten(0, 1), text[:, 1:].flatten(), label_smoothing=0.1)
    found = trainer.compute_loss(model, {"input_ids": text, "labels": text.clone()})
    assert found.item() == pytest.approx(wanted.item(), rel=FLOAT32)


def trained(load: Load, folder: Path, **options: Any) -> dict[str, Tensor]:
    """The weights after a few steps that nothing drops in."""
    model = load(Case(Sizes(**{**BYTES.as_dict(), "dropout": 0})), "bdh_recurrent", torch.float32)
    given = arguments(folder, max_steps=4, optim="sgd", learning_rate=0.5, **options)
    Trainer(model, given, train_dataset=learnable(16, 20)).train()
    return model.state_dict()


def test_trainer_accumulates_gradients_to_those_of_one_large_batch(load: Load, tmp_path: Path) -> None:
    whole = trained(load, tmp_path, per_device_train_batch_size=4)
    parts = trained(load, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    for name, weight in whole.items():
        close(parts[name], weight, FLOAT32)


@pytest.mark.parametrize("options", [{"bf16": True}, {"activation_checkpointing": True}], ids=str)
def test_trainer_learns_also_with(load: Load, form: str, tmp_path: Path, options: dict[str, Any]) -> None:
    model = load(Case(BYTES), form, torch.float32)
    given = arguments(tmp_path, max_steps=40, per_device_train_batch_size=8, **options)
    trainer = Trainer(model, given, train_dataset=learnable(64, 32), eval_dataset=learnable(80, 32)[64:])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before / 2
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


@pytest.mark.parametrize("autocast", [True, False])
def test_gradients_in_bfloat16_point_where_those_in_float32_do(load: Load, form: str, autocast: bool) -> None:
    case = Case(CONFIGS["three_heads"], batch=4, time=16, seed=1)
    tokens, found = torch.from_numpy(case.tokens), []
    for dtype in (torch.float32, torch.bfloat16):
        model = load(case, form, torch.float32 if autocast else dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.bfloat16):
            model(tokens, labels=tokens).loss.backward()
        found.append(slopes(model))
    for name, expected in found[0].items():
        assert torch.cosine_similarity(found[1][name].float().flatten(), expected.flatten(), dim=0) > 0.98, name


@pytest.fixture(scope="module")
def on_many() -> ModuleType:
    """The script that trains on one process or on two."""
    found = importlib.util.spec_from_file_location("train_on_many", Path(__file__).with_name("train_on_many.py"))
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


UNASKED = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    # --cpu would ask for MPI; --multi_gpu means PyTorch's own launcher, and the script asks for CPUs.
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", *UNASKED],
}


@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS)
def test_two_processes_train_the_weights_that_one_trains(on_many: ModuleType, launcher: list[str], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    on_many.by_trainer(str(one), 1)
    on_many.by_hand(str(one), 1)
    command = [sys.executable, "-m", *launcher, on_many.__file__, str(two)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    start = on_many.model().state_dict()
    for way in ("trainer", "hand"):
        alone, together = (load_file(folder / f"{way}.safetensors") for folder in (one, two))
        for name, weight in alone.items():
            assert (weight - start[name]).abs().max() > 0.01 * weight.abs().max()
            close(together[name], weight, FLOAT32)
