"""Checkpoints as trainers write them: found by a rule, whatever is around and beside the weights."""

from __future__ import annotations

import copy
import subprocess
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from bdh_convert.checkpoint import open_checkpoint, read
from bdh_convert.find import entries, find
from bdh_convert.inspect import report
from bdh_convert.steps import Wishes
from bdh_convert.vocabulary import is_about_training
from bdh_spec import BDHConfig, BDHError, CheckpointError, ConfigError, Params, ParamsError
from bdh_spec.rope import frequencies

Weights = Callable[[BDHConfig], Params]
Run = Callable[..., subprocess.CompletedProcess[str]]
State = dict[str, Any]


class Attention(nn.Module):
    """The frequencies, where the original keeps them."""

    def __init__(self, N: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.from_numpy(frequencies(N)).view(1, 1, 1, N))


class Model(nn.Module):
    """The parameters of the original, and a loss that trains them."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        tensors = Params(*(torch.from_numpy(weight.copy()) for weight in params))
        self.embed = nn.Embedding.from_pretrained(tensors.embed, freeze=False)
        self.encoder, self.encoder_v, self.decoder, self.lm_head = map(nn.Parameter, tensors[1:])
        self.attn = Attention(params.encoder.shape[2])

    def forward(self) -> torch.Tensor:
        return sum((weight**2).sum() for weight in self.parameters())


@pytest.fixture
def trained(small: BDHConfig, weights: Weights) -> tuple[Model, torch.optim.AdamW]:
    """A model and its optimizer after a step, so that the optimizer has a state."""
    model = Model(weights(small))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model().backward()
    optimizer.step()
    return model, optimizer


def is_read(path: Path, model: nn.Module, wishes: Wishes = Wishes(n_layer=1)) -> bool:  # noqa: B008
    """Whether a path gives the weights of a model, bit for bit."""
    state = model.state_dict()
    found = Params(*(weight.load() for weight in open_checkpoint(path, wishes).weights))
    wanted = [state[name].numpy() for name in ("embed.weight", "encoder", "encoder_v", "decoder", "lm_head")]
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(found, wanted, strict=True))


NANOGPT = {
    "out_dir": "out",
    "eval_interval": 250,
    "log_interval": 10,
    "eval_iters": 200,
    "eval_only": False,
    "always_save_checkpoint": True,
    "init_from": "scratch",
    "wandb_log": True,
    "wandb_project": "dragons",
    "wandb_run_name": "hatchling",
    "dataset": "shakespeare",
    "gradient_accumulation_steps": 40,
    "batch_size": 12,
    "block_size": 512,
    "n_layer": 12,  # what a resumed run was started with; the model's own arguments count
    "learning_rate": 6e-4,
    "max_iters": 600000,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "decay_lr": True,
    "warmup_iters": 2000,
    "lr_decay_iters": 600000,
    "min_lr": 6e-5,
    "backend": "nccl",
    "device": "cuda",
    "dtype": "bfloat16",
    "compile": True,
}


def test_the_layout_of_nanogpt_is_read(trained: tuple[Model, Any], small: BDHConfig, tmp_path: Path) -> None:
    model, optimizer = trained
    arguments = {key: value for key, value in small.as_dict().items() if key != "dropout"} | {"bias": False, "dropout": 0.25}
    content = {
        "model": {f"_orig_mod.{name}": value for name, value in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "model_args": arguments,
        "iter_num": 250,
        "best_val_loss": torch.tensor(1.25),
        "config": NANOGPT,
    }
    torch.save(content, tmp_path / "ckpt.pt")
    assert is_read(tmp_path / "ckpt.pt", model, Wishes())
    checkpoint = open_checkpoint(tmp_path / "ckpt.pt")
    assert checkpoint.config == small
    first, second = checkpoint.notes
    assert first == "left out, being no weights: optimizer, iter_num, best_val_loss"
    assert second.startswith("left alone in the configuration, being about training: out_dir, eval_interval, log_interval")


def test_the_layout_of_lightning_is_read(trained: tuple[Model, Any], small: BDHConfig, tmp_path: Path) -> None:
    model, optimizer = trained
    state = {f"net.{name}": value for name, value in model.state_dict().items()}
    content = {
        "epoch": 3,
        "global_step": 1000,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state | {"criterion.weight": torch.ones(11), "train_acc.total": torch.tensor(3)},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val_loss'}": {"best_model_score": torch.tensor(2.0)}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"last_epoch": 3}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95), "config": small.as_dict()},
    }
    torch.save(content, tmp_path / "last.ckpt")
    assert is_read(tmp_path / "last.ckpt", model, Wishes())
    assert open_checkpoint(tmp_path / "last.ckpt").config == small
    assert "criterion" in open_checkpoint(tmp_path / "last.ckpt").notes[0]
    (tmp_path / "version_0" / "checkpoints").mkdir(parents=True)
    (tmp_path / "last.ckpt").rename(tmp_path / "version_0" / "checkpoints" / "last.ckpt")
    assert is_read(tmp_path, model, Wishes())  # the folder of a run with one checkpoint in it
    torch.save(content, tmp_path / "epoch=2.ckpt")
    with pytest.raises(
        CheckpointError, match=r"holds 2 checkpoints, epoch=2\.ckpt, version_0/checkpoints/last\.ckpt: name one"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("wrap", ["model", "state_dict", "net", "weights", "module", "ema.shadow", "a.b.c", ""])
@pytest.mark.parametrize(
    "prefix",
    ["", "_orig_mod.", "module.", "net.", "_fsdp_wrapped_module.", "_orig_mod.module._checkpoint_wrapped_module.model."],
)
def test_any_wrappers_and_prefixes_are_seen_through(
    wrap: str, prefix: str, small: BDHConfig, weights: Weights, tmp_path: Path
) -> None:
    model = Model(weights(small))
    content: State = {prefix + name: value for name, value in model.state_dict().items()}
    for key in reversed(wrap.split(".") if wrap else []):
        content = {key: content, "step": 3}
    torch.save(content, tmp_path / "m.pt")
    assert is_read(tmp_path / "m.pt", model)


def test_wrappers_within_names_are_seen_through(small: BDHConfig, weights: Weights, tmp_path: Path) -> None:
    model = Model(weights(small))
    state = model.state_dict()
    state["embed._fsdp_wrapped_module.weight"] = state.pop("embed.weight")
    state["attn._checkpoint_wrapped_module._orig_mod.freqs"] = state.pop("attn.freqs")
    safetensors.torch.save_file(
        {f"_orig_mod.module.{name}": value for name, value in state.items()}, tmp_path / "m.safetensors"
    )
    assert is_read(tmp_path / "m.safetensors", model)


def test_what_is_no_weight_by_its_kind_is_left_alone(small: BDHConfig, weights: Weights, tmp_path: Path) -> None:
    model = Model(weights(small))
    beside = {
        "rng": torch.get_rng_state(),
        "n_averaged": torch.tensor(3),
        "opt_state.0.mu.encoder": torch.zeros(2, 8, 16),
        "criterion.weight": torch.ones(11),
        "step": torch.tensor(7),
    }
    torch.save(model.state_dict() | beside | {"sparse": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "m.pt")
    assert is_read(tmp_path / "m.pt", model)
    torch.save(model.state_dict() | {"encoder_mask": torch.ones(16, dtype=torch.uint8)}, tmp_path / "m.pt")
    with pytest.raises(ParamsError, match="holds encoder_mask, which no dialect of BDH has"):
        read(tmp_path / "m.pt", 1)


def test_an_optimizers_copies_under_the_names_of_weights_are_no_set(small: BDHConfig, weights: Weights, tmp_path: Path) -> None:
    model = Model(weights(small))
    moments = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    torch.save({"model": model.state_dict(), "optimizer": {"exp_avg": moments}}, tmp_path / "m.pt")
    assert is_read(tmp_path / "m.pt", model)


@pytest.mark.parametrize("chosen", ["model", "ema"])
def test_of_two_sets_the_user_names_one(chosen: str, small: BDHConfig, weights: Weights, tmp_path: Path, call: Run) -> None:
    model = Model(weights(small))
    average = Model(Params(*(weight * np.float32(0.5) for weight in weights(small))))
    content = {"model": model.state_dict(), "ema": {f"module.{k}": v for k, v in average.state_dict().items()}}
    torch.save(content, tmp_path / "m.pt")
    said = "the file holds several sets of weights, model, ema: bdh-convert --weights model takes the first"
    refused = call("--to", "numpy", "m.pt", "--n-layer", 1)
    assert (refused.returncode, refused.stderr) == (2, f"bdh-convert: {said}\n")
    assert said in report(tmp_path / "m.pt")["suspicious"]
    done = call("--to", "numpy", "m.pt", "--n-layer", 1, "--weights", chosen)
    assert done.returncode == 0, done.stderr
    found, _ = read(tmp_path / "m.numpy.safetensors")
    assert np.array_equal(found.encoder, {"model": model, "ema": average}[chosen].encoder.detach().numpy())
    assert "there are model, ema" in call("--to", "jax", "m.pt", "--n-layer", 1, "--weights", "best").stderr


def test_sets_in_one_state_dict_are_told_apart(small: BDHConfig, weights: Weights, tmp_path: Path) -> None:
    model = Model(weights(small))
    average = copy.deepcopy(model)
    average.attn.freqs *= 55  # the other set's frequencies are no concern of this one
    state = {f"model.{k}": v for k, v in model.state_dict().items()} | {
        f"ema_model.module.{k}": v for k, v in average.state_dict().items()
    }
    torch.save({"state_dict": state}, tmp_path / "m.ckpt")
    assert is_read(tmp_path / "m.ckpt", model, Wishes(weights="state_dict.model", n_layer=1))
    with pytest.raises(ParamsError, match=r"attn\.freqs differs from BDH's frequency table"):
        open_checkpoint(tmp_path / "m.ckpt", Wishes(weights="ema_model", n_layer=1))


def test_a_set_whose_shapes_fit_no_model_is_not_taken_for_weights(small: BDHConfig, weights: Weights, tmp_path: Path) -> None:
    model = Model(weights(small))
    scales = {name: torch.ones(1) for name in model.state_dict()}
    torch.save({"model": model.state_dict(), "scales": scales}, tmp_path / "m.pt")
    assert is_read(tmp_path / "m.pt", model)


def test_parameters_kept_as_such_are_read(small: BDHConfig, weights: Weights, tmp_path: Path) -> None:
    model = Model(weights(small))
    torch.save(model.state_dict(keep_vars=True), tmp_path / "m.pt")
    assert is_read(tmp_path / "m.pt", model)


def test_a_list_of_one_model_is_seen_through(small: BDHConfig, weights: Weights, tmp_path: Path) -> None:
    model = Model(weights(small))
    torch.save({"models": [{"weights": model.state_dict(), "config": small.as_dict()}]}, tmp_path / "m.pt")
    assert is_read(tmp_path / "m.pt", model, Wishes())


@pytest.mark.parametrize("kind", ["parameter", "parameter with attributes", "another table", "a bare table"])
def test_frequencies_are_read_or_refused_whatever_they_are_pickled_as(
    kind: str, small: BDHConfig, weights: Weights, tmp_path: Path
) -> None:
    state = Model(weights(small)).state_dict()
    table = nn.Parameter(state["attn.freqs"] * 55)
    if kind == "parameter with attributes":
        table.note = "trained"
    beside = {"another table": "attn.freqs", "a bare table": "freqs"}.get(kind)
    content: State = {"model": state, "buffers": {beside: table}} if beside else state | {"attn.freqs": table}
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(BDHError, match="freqs differs from BDH's frequency table"):
        open_checkpoint(tmp_path / "m.pt", Wishes(n_layer=1))


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("encoder", np.zeros((2, 8, 16), np.float32)),
        ("encoder", torch.zeros(2, 8, 16).to_sparse()),
        ("attn.freqs", np.zeros(16, np.float32)),
        ("attn.freqs", Namespace(table=1)),
    ],
)
def test_what_bears_the_name_of_a_weight_and_is_none_is_refused_by_name(
    what: str, value: Any, small: BDHConfig, weights: Weights, tmp_path: Path
) -> None:
    torch.save(Model(weights(small)).state_dict() | {what: value}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=rf"holds {what} as .*, which is no array of floating point numbers"):
        open_checkpoint(tmp_path / "m.pt", Wishes(n_layer=1))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_frequencies_that_are_no_floats_are_refused(
    dtype: torch.dtype, small: BDHConfig, weights: Weights, tmp_path: Path
) -> None:
    state = Model(weights(small)).state_dict()
    torch.save(state | {"attn.freqs": state["attn.freqs"].to(dtype)}, tmp_path / "m.pt")
    with pytest.raises(ParamsError, match=r"attn\.freqs has dtype (int64|bool)"):
        open_checkpoint(tmp_path / "m.pt", Wishes(n_layer=1))


@pytest.mark.parametrize("beside", [Namespace(lr=1e-3, n_layer=1), {"n_layer": 1, "optimizer": {"name": "adamw", "lr": 3e-4}}])
def test_arguments_of_a_run_tell_what_they_know(beside: Any, small: BDHConfig, weights: Weights, tmp_path: Path) -> None:
    model = Model(weights(small))
    torch.save({"net": model.state_dict(), "args": beside}, tmp_path / "m.pt")
    assert is_read(tmp_path / "m.pt", model, Wishes())


class Settings(dict):
    """A mapping of a class of its own, as many trainers have one."""


class Sealed:
    """A configuration of which a pickle keeps nothing but the class."""


def test_a_configuration_is_read_from_a_mapping_of_any_class_or_it_is_said_that_it_is_not(
    small: BDHConfig, weights: Weights, tmp_path: Path
) -> None:
    model = Model(weights(small))
    torch.save({"model": model.state_dict(), "config": Settings(small.as_dict())}, tmp_path / "m.pt")
    assert open_checkpoint(tmp_path / "m.pt").config == small
    torch.save({"model": model.state_dict(), "config": Settings(small.as_dict() | {"k_sparse": 3})}, tmp_path / "m.pt")
    with pytest.raises(ConfigError, match="has k_sparse = 3, which BDH has not"):
        open_checkpoint(tmp_path / "m.pt")
    torch.save({"model": model.state_dict(), "config": Sealed()}, tmp_path / "m.pt")
    notes = open_checkpoint(tmp_path / "m.pt", Wishes(n_layer=1)).notes
    assert any(note.startswith("nothing can be read of config (a ") and "Sealed" in note for note in notes)


@pytest.mark.parametrize("name", ["val.weight", "project.weight", "train.gate", "step_embedding.weight", "data.scale"])
def test_a_tensor_whose_name_may_be_a_part_of_a_model_is_refused(
    name: str, small: BDHConfig, weights: Weights, tmp_path: Path
) -> None:
    torch.save(Model(weights(small)).state_dict() | {name: torch.ones(2, 2)}, tmp_path / "m.pt")
    with pytest.raises(ParamsError, match=f"holds {name}, which no dialect of BDH has"):
        open_checkpoint(tmp_path / "m.pt", Wishes(n_layer=1))


@pytest.mark.parametrize("where", ["model_args", "config", "hyper_parameters"])
def test_a_switch_of_another_model_is_refused_wherever_it_stands(
    where: str, small: BDHConfig, weights: Weights, tmp_path: Path
) -> None:
    model = Model(weights(small))
    content = {"model": model.state_dict(), "model_args": small.as_dict(), "config": dict(NANOGPT)}
    content.setdefault(where, {})["k_sparse"] = 8
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(ConfigError, match="has k_sparse = 8, which BDH has not"):
        open_checkpoint(tmp_path / "m.pt")


@pytest.mark.parametrize(
    "key", ["layer_norm_eps", "step_embedding", "attention_backend", "output_norm", "state_decay", "window_size", "lora_rank"]
)
def test_a_key_with_a_word_that_nobody_knows_is_not_about_training(key: str) -> None:
    assert not is_about_training(key)


def test_a_module_beside_the_model_that_may_be_a_part_of_it_is_refused(
    small: BDHConfig, weights: Weights, tmp_path: Path
) -> None:
    state = {f"model.{name}": value for name, value in Model(weights(small)).state_dict().items()}
    torch.save({"state_dict": state | {"adapter.lora_A": torch.ones(2, 2)}}, tmp_path / "m.pt")
    with pytest.raises(ParamsError, match=r"holds adapter\.lora_A, which no dialect of BDH has"):
        open_checkpoint(tmp_path / "m.pt", Wishes(n_layer=1))


def test_a_folder_of_torch_distributed_is_read_without_unpickling(
    trained: tuple[Model, Any], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model, optimizer = trained
    model.to(torch.bfloat16)
    content = {"model": model.state_dict(), "optim": optimizer.state_dict(), "step": 3}
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(content, checkpoint_id=tmp_path / "m")
    found = open_checkpoint(tmp_path / "m", Wishes(n_layer=1))
    for name, weight in zip(("embed.weight", "encoder"), found.weights, strict=False):
        assert np.array_equal(weight.load().view(np.uint16), model.state_dict()[name].view(torch.uint16).numpy())
    assert found.dialect == "torch"
    next((tmp_path / "m").glob("*.distcp")).unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp could not be read|No such file"):
        open_checkpoint(tmp_path / "m", Wishes(n_layer=1)).weights.embed.load()


def test_a_folder_of_accelerate_is_read(trained: tuple[Model, Any], tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(*trained)
    for safe in (True, False):
        folder = tmp_path / f"safe-{safe}"
        accelerator.save_state(str(folder), safe_serialization=safe)
        assert is_read(folder, accelerator.unwrap_model(model))
    accelerator.free_memory(model, optimizer)


def test_folders_of_deepspeed_are_read_where_one_process_held_all(small: BDHConfig, weights: Weights, tmp_path: Path) -> None:
    model = Model(weights(small))
    folder = tmp_path / "run" / "global_step100"
    folder.mkdir(parents=True)
    (tmp_path / "run" / "latest").write_text("global_step100")
    content = {
        "module": model.state_dict(),
        "ds_config": {"zero_optimization": {"stage": 2}},
        "param_shapes": [{"encoder": (2, 8)}],
    }
    torch.save(content, folder / "mp_rank_00_model_states.pt")
    assert is_read(tmp_path / "run", model)
    assert is_read(folder, model)
    (folder / "mp_rank_00_model_states.pt").rename(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match=r"python zero_to_fp32\.py"):
        open_checkpoint(tmp_path / "run")


def test_a_mapping_that_holds_itself_is_walked_once() -> None:
    circle: State = {"encoder": 1}
    circle["again"] = circle
    circle["list"] = [circle, {"decoder": 2}]
    assert sorted(entry.name for entry in entries(circle)) == ["encoder", "list.1.decoder"]
    with pytest.raises(CheckpointError, match="no dialect of BDH has these names"):
        find(circle)
