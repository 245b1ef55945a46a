"""Weights in 8 bits: what is stored is that narrow, is read as it stands and comes back, and adapters learn on it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torchao.quantization import (
    Float8WeightOnlyConfig,
    FqnToConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    PerGroup,
    quantize_,
)
from torchao.utils import TorchAOBaseTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, EetqConfig, GPTQConfig, QuantoConfig, TorchAoConfig

from bdh_conformance.yardstick.agreement import assert_agrees
from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_conformance.yardstick.tolerances import FLOAT64, expect
from bdh_spec import Params
from bdh_spec.model import forward
from bdh_transformers import BDHForCausalLM, BDHModel

Load = Callable[..., BDHForCausalLM]

ROOT = Path(__file__).parents[2]
CASE = Case(CONFIGS["three_heads"], time=11, seed=1, scale=10)
TOKENS = torch.from_numpy(CASE.tokens)  # 2 11
NAMES = ("encoder", "encoder_v", "decoder")
OF_A_HEAD = r"(encoder|encoder_v|decoder)\.\d"
WAYS: dict[str, Callable[[], Any]] = {
    "torchao weights": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "torchao activations": lambda: TorchAoConfig(Int8DynamicActivationInt8WeightConfig()),
    "torchao float8": lambda: TorchAoConfig(Float8WeightOnlyConfig()),
    "bitsandbytes": lambda: BitsAndBytesConfig(load_in_8bit=True),
}
by_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is asked for on Linux only")
MARKS: dict[str, Any] = {"bitsandbytes": by_bitsandbytes}
each_way = pytest.mark.parametrize("way", [pytest.param(way, id=name, marks=MARKS.get(name, ())) for name, way in WAYS.items()])
each_name = pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in WAYS])

pytestmark = [
    # peft asks transformers under a name that is on its way out, and looks for a hub to learn the size of a vocabulary.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture
def folder(load: Load, tmp_path: Path) -> Path:
    """A model in float32, as it is saved."""
    load(CASE, "bdh_recurrent", torch.float32).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def heads(model: BDHForCausalLM, name: str) -> list[Any]:
    """The weights (out, in) of each head's module."""
    return [head.weight for head in getattr(model.backbone, name)]


def bits_of(model: BDHForCausalLM) -> list[Tensor]:
    """The plain tensors that the weights of all heads are stored in."""
    stored = [
        tensor.detach() for key, tensor in model.state_dict().items() if re.search(OF_A_HEAD, key) and ".lora_" not in key
    ]
    plain = [
        [getattr(t, part) for part in t.__tensor_flatten__()[0]] if isinstance(t, TorchAOBaseTensor) else [t] for t in stored
    ]
    return [tensor for tensors in plain for tensor in tensors if tensor.ndim]


def same(actual: Tensor, expected: Tensor) -> None:
    """Equal to rounding in float64."""
    torch.testing.assert_close(actual, expected, rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.parametrize("lengths", ["short", "long"])
def test_modules_compute_and_learn_what_raw_weights_do(
    load: Load, form: str, lengths: str, request: pytest.FixtureRequest
) -> None:
    if lengths == "long":
        request.getfixturevalue("short_chunks")
    raw, linear = load(CASE, form), load(CASE, form).to_linear()
    assert linear.is_linear
    assert {type(head) for name in NAMES for head in getattr(linear.backbone, name)} == {torch.nn.Linear}
    for options in ({}, {"attention_mask": torch.tensor([[0] * 3 + [1] * 8, [1] * 11])}, {"position_ids": packed_positions()}):
        found = [model(TOKENS, labels=TOKENS, **options) for model in (raw, linear)]
        same(found[1].logits, found[0].logits)
        for model, output in zip((raw, linear), found, strict=True):
            model.zero_grad()
            output.loss.backward()
        for name in NAMES:
            slopes = torch.stack([weight.grad.mT for weight in heads(linear, name)])
            same(slopes.view(getattr(raw.backbone, name).shape), getattr(raw.backbone, name).grad)


def packed_positions() -> Tensor:
    return torch.cat((torch.arange(5), torch.arange(6)))[None].expand(2, -1)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 3}], ids=str)
def test_modules_write_what_raw_weights_do(load: Load, form: str, options: dict[str, Any]) -> None:
    wanted = {"max_new_tokens": 12, "do_sample": False, "disable_compile": True} | options
    assert torch.equal(load(CASE, form).to_linear().generate(TOKENS, **wanted), load(CASE, form).generate(TOKENS, **wanted))


def test_files_keep_their_names_and_their_bits_whatever_holds_the_weights(load: Load, tmp_path: Path) -> None:
    load(CASE, "bdh_recurrent").save_pretrained(tmp_path / "raw")
    load(CASE, "bdh_recurrent").to_linear().save_pretrained(tmp_path / "linear")
    for file in (tmp_path / "raw").iterdir():
        assert (tmp_path / "linear" / file.name).read_bytes() == file.read_bytes(), file.name
    assert not BDHForCausalLM.from_pretrained(tmp_path / "linear").is_linear


@each_name
def test_what_is_stored_is_one_byte_for_a_weight_and_a_scale_for_a_row(folder: Path, name: str, tmp_path: Path) -> None:
    kind = torch.float8_e4m3fn if name == "torchao float8" else torch.int8
    of_a_row = 5 if name in ("torchao weights", "torchao activations") else 4  # these store where zero is, one byte more
    nh, D, N = CASE.config.n_head, CASE.config.n_embd, CASE.config.n_neurons
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=WAYS[name]())
    model.save_pretrained(tmp_path)
    saved = [tensor for key, tensor in load_file(tmp_path / "model.safetensors").items() if re.search(OF_A_HEAD, key)]
    for tensors in (bits_of(model), [tensor for tensor in saved if tensor.ndim]):
        assert [tensor.dtype for tensor in tensors if tensor.numel() == N * D] == [kind] * (3 * nh)
        assert sum(tensor.nbytes for tensor in tensors) == nh * (3 * N * D + of_a_row * (N + N + D))


@torch.no_grad()
def test_what_is_stored_is_half_a_step_away_at_most(load: Load, folder: Path) -> None:
    model = BDHForCausalLM.from_pretrained(folder, quantization_config=WAYS["torchao weights"]())
    given = load(CASE, "bdh_recurrent", torch.float32).to_linear()
    for name in NAMES:
        for narrow, weight in zip(heads(model, name), heads(given, name), strict=True):
            rounding = torch.finfo(torch.float32).eps * weight.abs()  # of the division by a step and of the product with it
            assert ((narrow.dequantize() - weight).abs() <= narrow.scale / 2 + 2 * rounding).all()
            assert (narrow.scale * 127 - weight.abs().amax(1, keepdim=True)).abs().max() < narrow.scale.max()


@pytest.mark.parametrize("way", [WAYS["torchao weights"], WAYS["torchao float8"]], ids=["int8", "float8"])
@torch.no_grad()
def test_what_is_stored_is_read_as_the_specification_reads_it(
    load: Load, folder: Path, form: str, way: Callable[[], Any]
) -> None:
    model = BDHForCausalLM.from_pretrained(folder, quantization_config=way(), attn_implementation=form)
    given = load(CASE, form, torch.float32)
    stored = {name: torch.stack([weight.dequantize().mT for weight in heads(model, name)]) for name in NAMES}
    stored = {name: weight.view(getattr(given.backbone, name).shape) for name, weight in stored.items()}
    params = Params(*(stored[key].numpy() if key in stored else value for key, value in CASE.params._asdict().items()))
    expected = expect(lambda p: {"logits": forward(CASE.tokens, p, CASE.config)}, params, "float32")
    assert_agrees(f"int8 {form}", {"logits": model(TOKENS).logits.numpy()}, expected, str(CASE))
    steps, cache = [], None
    for t in range(TOKENS.shape[1]):
        output = model(TOKENS[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache, steps = output.past_key_values, [*steps, output.logits]
    assert_agrees(f"int8 {form} by steps", {"logits": torch.cat(steps, 1).numpy()}, expected, str(CASE))


@each_way
@torch.no_grad()
def test_a_folder_gives_back_every_bit(folder: Path, form: str, way: Callable[[], Any], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=way(), attn_implementation=form)
    model.save_pretrained(tmp_path / "narrow", max_shard_size="2KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow", attn_implementation=form)
    assert len(list((tmp_path / "narrow").glob("model-*.safetensors"))) == 2
    again.save_pretrained(tmp_path / "twice")
    twice = AutoModelForCausalLM.from_pretrained(tmp_path / "twice", attn_implementation=form)
    for other in (again, twice):
        for found, expected in zip(bits_of(other), bits_of(model), strict=True):
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    wanted = {"max_new_tokens": 9, "do_sample": False}
    assert torch.equal(again.generate(TOKENS, **wanted), model.generate(TOKENS, **wanted))
    for path, options in ((tmp_path / "narrow", {}), (folder, {"quantization_config": way()})):
        with pytest.raises(ValueError, match="load it as AutoModelForCausalLM, and take its backbone"):
            BDHModel.from_pretrained(path, **options)


@torch.no_grad()
def test_quantize_finds_the_modules_and_says_so_where_there_are_none(load: Load, tmp_path: Path) -> None:
    model = load(CASE, "bdh_recurrent", torch.float32).to_linear()
    expected = model(TOKENS).logits
    quantize_(model, Int8WeightOnlyConfig())
    assert {type(weight.data) for name in NAMES for weight in heads(model, name)} == {Int8Tensor}
    assert 0 < (model(TOKENS).logits - expected).norm() < 0.1 * expected.norm()
    with pytest.raises(ValueError, match="quantize_ has not told transformers what it did"):
        model.save_pretrained(tmp_path)

    passed_by = load(CASE, "bdh_recurrent", torch.float32)
    quantize_(passed_by, Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=re.escape("has found lm_head alone")):
        passed_by(TOKENS)
    raw = load(CASE, "bdh_recurrent", torch.float32)
    quantize_(raw, FqnToConfig({"re:.*encoder": Int8WeightOnlyConfig()}), filter_fn=None)
    with pytest.raises(ValueError, match=re.escape("call model.to_linear() before quantize_")):
        raw(TOKENS)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "int4": (lambda: TorchAoConfig(Int4WeightOnlyConfig(group_size=2)), "torchao's Int4WeightOnlyConfig does not work"),
    "groups": (lambda: TorchAoConfig(Int4WeightOnlyConfig(group_size=32)), "Int4WeightOnlyConfig has left backbone.encoder.0"),
    "a group": (lambda: TorchAoConfig(Int8WeightOnlyConfig(granularity=PerGroup(5))), "does not work on this machine's cpu"),
    "part": (
        lambda: TorchAoConfig(FqnToConfig({r"re:backbone\.encoder.*": Int8WeightOnlyConfig()})),
        "has left backbone.decoder.0.weight",
    ),
    "nf4": (lambda: BitsAndBytesConfig(load_in_4bit=True), "saves what cannot be loaded: take load_in_8bit"),
    "gptq": (lambda: GPTQConfig(4), "BDH was never run with weights stored by gptq"),
    "quanto": (QuantoConfig, "BDH was never run with weights stored by quanto"),
    "eetq": (lambda: EetqConfig("int8"), "BDH was never run with weights stored by eetq"),
}


@pytest.mark.parametrize(("way", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_had_is_refused_by_name(folder: Path, way: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=way())


def test_a_folder_that_is_quantised_is_not_quantised_again(folder: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=WAYS["torchao weights"]()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is quantised already"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=WAYS["torchao weights"]())


LORA = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": "all-linear"}


@pytest.mark.parametrize("name", ["torchao weights", pytest.param("bitsandbytes", marks=by_bitsandbytes)])
def test_adapters_learn_on_weights_that_stay_as_they_are(folder: Path, form: str, name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=WAYS[name](), attn_implementation=form)
    before = [part.clone() for part in bits_of(base)]
    adapted = get_peft_model(base, LoraConfig(**LORA)).train()
    learning = {key: weight for key, weight in adapted.named_parameters() if weight.requires_grad}
    assert len(learning) == 2 * len(NAMES) * CASE.config.n_head
    losses, optimizer = [], torch.optim.AdamW(learning.values(), lr=0.05)
    for _ in range(12):
        loss = adapted(input_ids=TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(weight.grad is not None for weight in learning.values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(map(torch.equal, bits_of(adapted.get_base_model()), before))
    adapted.eval().save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=WAYS[name](), attn_implementation=form)
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(TOKENS).logits, adapted(TOKENS).logits)


def test_gradients_of_adapters_are_those_on_the_weights_that_are_stored(load: Load, folder: Path, form: str) -> None:
    options = {"attn_implementation": form}
    narrow = AutoModelForCausalLM.from_pretrained(folder, quantization_config=WAYS["torchao weights"](), **options).double()
    wide, slopes = load(CASE, form).to_linear(), []
    wide.backbone.embed.weight.data.copy_(narrow.backbone.embed.weight)
    wide.lm_head.weight.data.copy_(narrow.lm_head.weight)
    for name in NAMES:
        for weight, stored in zip(heads(wide, name), heads(narrow, name), strict=True):
            weight.data.copy_(stored.qdata.double() * stored.scale.double())
    for model in (narrow, wide):
        torch.manual_seed(1)
        adapted = get_peft_model(model, LoraConfig(**LORA, init_lora_weights=False)).double()
        adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()
        slopes.append({key: weight.grad for key, weight in adapted.named_parameters() if weight.requires_grad})
    for key, slope in slopes[1].items():
        assert slope.abs().max() > 0
        same(slopes[0][key], slope)


def test_learning_on_weights_that_pass_no_gradient_on_is_refused(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=WAYS["torchao activations"]())
    adapted = get_peft_model(model, LoraConfig(**LORA))
    assert adapted.eval()(TOKENS).logits.shape == (*TOKENS.shape, CASE.config.vocab_size)
    with pytest.raises(ValueError, match="pass no gradient on: learn on those of Int8WeightOnlyConfig"):
        adapted.train()(input_ids=TOKENS, labels=TOKENS)


def test_adapters_of_raw_weights_are_asked_to_take_modules_where_these_hold_them(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=WAYS["torchao weights"]())
    with pytest.raises(ValueError, match="no `target_parameters` found"):
        get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_parameters=list(NAMES)))


def test_the_embedded_model_loses_little_in_eight_bits_and_the_example_measures_it(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes((ROOT / "README.md").read_bytes())
    example = [sys.executable, ROOT / "examples" / "quantised.py", "--text", tmp_path / "text"]
    done = subprocess.run(
        [*example, "--bytes", "1500", "--tokens", "3"],
        env=os.environ | {"COLUMNS": "200", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in done.stdout.splitlines() if line.startswith("│")]
    bits, size = ({row[0]: float(row[column]) for row in rows} for column in (1, 2))
    cost = {name: found - bits["float32"] for name, found in bits.items()}
    in_bytes = [name for name in bits if name not in ("float32", "torchao 4 bits by 32, in bytes")]
    assert len(in_bytes) == 3 + (find_spec("bitsandbytes") is not None)
    assert 0 < bits["float32"] < 8
    assert all(0 < abs(cost[name]) < cost["torchao 4 bits by 32, in bytes"] for name in in_bytes)
    assert all(size[name] < size["float32"] / 3 for name in in_bytes)
