"""What was saved is what is loaded: in shards, in bfloat16, tied or not, by transformers 4 or 5, and through bdh-convert."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import bdh_spec
from bdh_conformance import assert_agrees, expect
from bdh_convert.checkpoint import open_checkpoint, read
from bdh_convert.convert import Settings, convert
from bdh_spec import Params
from bdh_spec.model import forward
from bdh_torch.rope import fixed_point
from bdh_transformers import BDHConfig, BDHForCausalLM, BDHModel, BDHTokenizer

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_internal_dim_multiplier": 4}
TOKENS = torch.arange(24)[None] * 9
HEAD = "lm_head.weight"
Weights = Callable[[BDHForCausalLM], Params]

each_tie = pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def model(tied: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> BDHForCausalLM:
    """A small model of bytes, with weights large enough for every one of them to be heard."""
    torch.manual_seed(1)
    made = BDHForCausalLM(BDHConfig(**SIZES, tie_word_embeddings=tied, **options)).eval()
    for weight in made.parameters():
        weight.data.mul_(20)
    return made.to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


@torch.no_grad()
def same(a: BDHForCausalLM, b: BDHForCausalLM) -> bool:
    """Equal weights, bit for bit, an equal table of rotations, and therefore equal logits."""
    states = a.state_dict(), b.state_dict()
    weights = states[0].keys() == states[1].keys() and all(same_bits(states[0][name], states[1][name]) for name in states[0])
    rotations = same_bits(a.backbone.rotary.fixed, b.backbone.rotary.fixed)
    return weights and rotations and same_bits(a(TOKENS).logits, b(TOKENS).logits)


def is_tied(made: BDHForCausalLM) -> bool:
    return made.lm_head.weight is made.backbone.embed.weight


def described(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def describe(folder: Path, **changes: Any) -> None:
    """Change config.json; None takes a key out."""
    config = {key: value for key, value in (described(folder) | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


@each_tie
@each_dtype
def test_a_model_comes_back_bit_for_bit(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    made = model(tied, dtype)
    made.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(again, made)
    assert is_tied(again) is tied
    assert described(tmp_path)["tie_word_embeddings"] is tied
    assert (HEAD in load_file(tmp_path / "model.safetensors")) is not tied


@each_tie
def test_a_model_in_shards_comes_back(tied: bool, tmp_path: Path) -> None:
    made = model(tied)
    made.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert same(BDHForCausalLM.from_pretrained(tmp_path), made)


@each_tie
def test_a_model_is_placed_by_device_map(tied: bool, tmp_path: Path) -> None:
    made = model(tied)
    made.save_pretrained(tmp_path)
    again = BDHForCausalLM.from_pretrained(tmp_path, device_map="auto")
    assert same(again.cpu(), made)
    assert is_tied(again) is tied


def test_a_model_that_trainer_saves_has_the_cache_that_it_was_made_with(tmp_path: Path) -> None:
    for use_cache in (True, False):
        made = model(use_cache=use_cache)
        trainer = Trainer(
            made, TrainingArguments(tmp_path / "run", report_to=[], use_cpu=True), processing_class=BDHTokenizer()
        )
        trainer.save_model(tmp_path / "m")
        assert made.config.use_cache is False  # which Trainer wants while it trains
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        assert (again(TOKENS).past_key_values is not None) is use_cache
        assert described(tmp_path / "m").get("use_cache", True) is use_cache
        assert not [name for name in described(tmp_path / "m") if name.startswith("_")]
        convert(tmp_path / "m", "torch", tmp_path / f"{use_cache}.pt", Settings())


def test_a_narrow_model_turns_by_the_same_angles(tmp_path: Path) -> None:
    made = model()
    made.save_pretrained(tmp_path)
    positions = torch.tensor([[0, 1, 2**20 + 1, 2**40 + 3]])
    narrow = BDHForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    cast = model().to(torch.bfloat16)
    for other in (narrow, cast, narrow.half()):
        assert same_bits(other.backbone.rotary(positions, other.dtype), made.backbone.rotary(positions, torch.float32))


def test_a_body_is_saved_and_loaded_by_itself(tmp_path: Path) -> None:
    made = model()
    made.save_pretrained(tmp_path / "whole")
    body = BDHModel.from_pretrained(tmp_path / "whole")
    body.save_pretrained(tmp_path / "body")
    again = BDHModel.from_pretrained(tmp_path / "body").eval()
    assert same_bits(again(TOKENS).last_hidden_state, made.backbone(TOKENS).last_hidden_state)
    whole, told = BDHForCausalLM.from_pretrained(tmp_path / "body", output_loading_info=True)
    assert told["missing_keys"] == {HEAD}
    assert same_bits(whole.backbone.encoder, made.backbone.encoder)


def test_missing_weights_are_drawn_anew_and_reported(tmp_path: Path) -> None:
    BDHForCausalLM(BDHConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {"backbone.embed.weight": tensors["backbone.embed.weight"]}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    made, told = BDHForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert told["missing_keys"] == {HEAD, "backbone.encoder", "backbone.encoder_v", "backbone.decoder"}
    for name in told["missing_keys"]:
        drawn = made.get_parameter(name)
        assert abs(drawn.std().item() - 0.02) < 1e-3, name
        assert abs(drawn.mean().item()) < 1e-3, name
    assert same_bits(made.backbone.embed.weight, kept["backbone.embed.weight"])
    assert same_bits(made.backbone.rotary.fixed, fixed_point(made.config.sizes.n_neurons))


def test_extra_weights_are_reported_and_no_obstacle(tmp_path: Path) -> None:
    made = model()
    made.save_pretrained(tmp_path)
    extra = {"backbone.attn.freqs": torch.ones(1, 1, 1, 32), **load_file(tmp_path / "model.safetensors")}
    save_file(extra, tmp_path / "model.safetensors", {"format": "pt"})
    again, told = BDHForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert told["unexpected_keys"] == {"backbone.attn.freqs"}
    assert same(again, made)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    describe(tmp_path, hidden_size=8)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        BDHForCausalLM.from_pretrained(tmp_path)


@each_tie
def test_a_checkpoint_of_transformers_4_is_tied_unless_it_has_a_head(tied: bool, tmp_path: Path) -> None:
    made = model(tied)
    made.save_pretrained(tmp_path)
    describe(
        tmp_path, tie_word_embeddings=None, auto_map=None, dtype=None, torch_dtype="float32", transformers_version="4.57.1"
    )
    again = BDHForCausalLM.from_pretrained(tmp_path)
    assert same(again, made)
    assert is_tied(again) is tied
    again.save_pretrained(tmp_path / "again")
    assert same(BDHForCausalLM.from_pretrained(tmp_path / "again"), made)


def test_the_dtype_is_read_under_its_old_name(tmp_path: Path) -> None:
    made = model(dtype=torch.bfloat16)
    made.save_pretrained(tmp_path)
    describe(tmp_path, dtype=None, torch_dtype="bfloat16")
    assert same(BDHForCausalLM.from_pretrained(tmp_path), made)


@each_tie
@each_dtype
def test_bdh_convert_reads_what_was_saved(tied: bool, dtype: torch.dtype, weights: Weights, tmp_path: Path) -> None:
    made = model(tied, dtype, pad_token_id=256, eos_token_id=10)
    made.save_pretrained(tmp_path / "m", max_shard_size="10KB")
    BDHTokenizer().save_pretrained(tmp_path / "m")
    convert(tmp_path / "m", "torch", tmp_path / "m.pt", Settings())
    convert(tmp_path / "m.pt", "numpy", tmp_path / "m.safetensors", Settings())
    found, config = read(tmp_path / "m.safetensors")
    assert config == made.config.sizes
    for name, array, weight in zip(Params._fields, found, weights(made), strict=True):
        assert array.dtype.name == str(dtype).removeprefix("torch."), name
        assert array.tobytes() == weight.detach().contiguous().view(torch.uint8).numpy().tobytes(), name


@pytest.mark.parametrize("form", ["bdh_recurrent", "bdh_parallel"])
def test_bdh_convert_reads_what_was_saved_with_every_option(form: str, tmp_path: Path) -> None:
    made = model(output_attentions=form == "bdh_parallel", output_hidden_states=True, attn_implementation=form, num_labels=3)
    made.save_pretrained(tmp_path)
    assert open_checkpoint(tmp_path).config == made.config.sizes


def assert_says_what_the_specification_does(made: BDHForCausalLM, folder: Path) -> None:
    """The model's logits are those of the specification on the weights in the folder."""
    params, config = bdh_spec.read(folder)
    expected = expect(lambda p: {"logits": forward(TOKENS.numpy(), p, config)}, params, "float32")
    assert_agrees("transformers", {"logits": made(TOKENS).logits.detach().numpy()}, expected)


@each_tie
def test_bdh_spec_runs_what_was_saved(tied: bool, tmp_path: Path) -> None:
    made = model(tied)
    made.save_pretrained(tmp_path)
    assert_says_what_the_specification_does(made, tmp_path)


@each_dtype
def test_what_bdh_convert_writes_is_loaded(dtype: torch.dtype, weights: Weights, tmp_path: Path) -> None:
    params, config = bdh_spec.read()
    bdh_spec.save(tmp_path / "m.safetensors", params, config)
    convert(tmp_path / "m.safetensors", "torch", tmp_path / "m.pt", Settings(dtype="bf16" if dtype == torch.bfloat16 else None))
    convert(tmp_path / "m.pt", "hf", tmp_path / "m.hf", Settings())
    made, told = AutoModelForCausalLM.from_pretrained(tmp_path / "m.hf", output_loading_info=True)
    assert type(made) is BDHForCausalLM
    assert (made.dtype, is_tied(made)) == (dtype, False)
    assert not any(told.values())
    for weight, array in zip(weights(made), params, strict=True):
        assert same_bits(weight.detach(), torch.from_numpy(array).to(dtype))
    if dtype == torch.float32:
        assert_says_what_the_specification_does(made.eval(), tmp_path / "m.hf")
