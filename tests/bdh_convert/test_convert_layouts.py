"""More layouts of trainers, by the torch port: each is read to the bit, converted there and back, and writes text."""

from __future__ import annotations

import collections
import copy
import dataclasses
import json
import pickle
import random
import subprocess
import sys
import types
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict

import bdh_spec
from bdh_convert.checkpoint import open_checkpoint
from bdh_convert.convert import Settings, convert
from bdh_convert.steps import Wishes
from bdh_spec import BDHConfig, BDHError, Params
from bdh_torch import BDH

State = dict[str, Any]
CONFIG = BDHConfig(n_layer=2, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=11, dropout=0.25)
SIZES = CONFIG.as_dict()
NAMES = ("embed.weight", "encoder", "encoder_v", "decoder", "lm_head")
pytestmark = pytest.mark.filterwarnings("ignore")  # of torch, about formats on their way out


@pytest.fixture
def model() -> BDH:
    """A model whose every weight moves the logits."""
    torch.manual_seed(7)
    made = BDH(CONFIG)
    with torch.no_grad():
        for weight in made.parameters():
            weight *= 20
    return made


def stepped(model: BDH, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer that has a state."""
    tokens = torch.arange(10).view(2, 5)
    model(tokens, tokens)[1].backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def named(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def is_the_model(path: Path, model: BDH, wishes: Wishes = Wishes()) -> bool:  # noqa: B008
    """Whether a path gives a model's weights bit for bit and its configuration, and so does what is made of it."""
    checkpoint = open_checkpoint(path, wishes)
    first = convert(path, "mlx", path.parent / "made.npz", Settings(wishes, force=True)).path
    second = convert(first, "torch", path.parent / "made.pt", Settings(Wishes(n_layer=2), force=True)).path
    wanted = [model.state_dict()[name].contiguous().view(torch.uint8).numpy() for name in NAMES]
    for found in (checkpoint, open_checkpoint(second, Wishes(n_layer=2))):
        held = [np.ascontiguousarray(weight.load()).view(np.uint8) for weight in found.weights]
        if not all(np.array_equal(a, b) for a, b in zip(held, wanted, strict=True)):
            return False
    assert len(bdh_spec.load(second, backend="numpy").generate(b"\x01\x02", max_new_tokens=3, seed=7)) == 5
    return checkpoint.config.n_layer == CONFIG.n_layer


PREFIXES = (
    "module._orig_mod.",
    "bdh.",
    "backbone.",
    "transformer.",
    "generator.module._forward_module.",
    "policy._fsdp_wrapped_module._orig_mod.",
    "network.core.bdh.",
    "0.",
    "module.0.",
    "base_model.model.",
    "self.",
    "_net.",
    "my-model.",
    "_wrapped_module.inner._orig_mod.",
    "params/",
    "params/params/model/",
)
WRAPS = (
    "state.model.params",
    "checkpoint.state_dict",
    "payload.weights.net.module",
    "trainer.state.model.state_dict",
    "ema_state_dict",
    "agent",
    "best.model",
    "0.model",
    "train_state.params",
)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_in_any_order_are_seen_through(prefix: str, model: BDH, tmp_path: Path) -> None:
    torch.save({"state_dict": named(model.state_dict(), prefix), "config": SIZES}, tmp_path / "m.pt")
    assert is_the_model(tmp_path / "m.pt", model)


@pytest.mark.parametrize("wrap", WRAPS)
def test_wrappers_within_wrappers_are_seen_through(wrap: str, model: BDH, tmp_path: Path) -> None:
    content: State = dict(model.state_dict())
    for key in reversed(wrap.split(".")):
        content = {key: content, "epoch": 3, "val_loss": 1.25}
    torch.save(content | {"config": SIZES}, tmp_path / "m.pt")
    assert is_the_model(tmp_path / "m.pt", model)


@pytest.mark.parametrize("put", [lambda s: (s, {"epoch": 3}), lambda s: [s], lambda s: {"model": list(s.items())}])
def test_lists_around_weights_and_of_them_are_seen_through(put: Callable[[State], Any], model: BDH, tmp_path: Path) -> None:
    torch.save(put(model.state_dict()), tmp_path / "m.pt")
    assert is_the_model(tmp_path / "m.pt", model, Wishes(n_layer=2))


def test_names_as_jax_spells_the_way_through_a_tree_are_read(model: BDH, tmp_path: Path) -> None:
    state = model.state_dict()
    weights = {field: state[name].numpy() for field, name in zip(Params._fields, NAMES, strict=True)}
    moments = {name: np.zeros_like(weight) for name, weight in weights.items()}
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    for spelt in ("{}/{}", "['{}']['{}']", "{}.{}"):
        entries = {spelt.format("params", name): weight for name, weight in weights.items()}
        np.savez(tmp_path / "m.npz", **entries, **{spelt.format("opt_state", name): m for name, m in moments.items()})
        assert is_the_model(tmp_path / "m.npz", model)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": lambda weights: torch.optim.SGD(weights, 1e-3, momentum=0.9),
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "nadam": torch.optim.NAdam,
    "adadelta": torch.optim.Adadelta,
}


@pytest.mark.parametrize("kept", ["by name", "in a list", "as objects", "with names", "as FSDP names it"])
def test_states_of_optimizers_are_left_alone(kept: str, model: BDH, tmp_path: Path) -> None:
    optimizers = {name: stepped(model, make(model.parameters())) for name, make in OPTIMIZERS.items()}
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizers["adamw"], 1e-3, 100)
    content = {
        "by name": {"optimizers": {name: each.state_dict() for name, each in optimizers.items()}},
        "in a list": {"optimizer_states": [each.state_dict() for each in optimizers.values()]},
        "as objects": {"optimizer": optimizers["adamw"]},
        "with names": {"optimizer": torch.optim.AdamW(model.named_parameters()).state_dict()},
        "as FSDP names it": {"optim": get_state_dict(model, optimizers["adamw"])[1]},
    }[kept]
    state = {"model": model.state_dict(), "config": SIZES, "lr_scheduler": scheduler.state_dict()}
    torch.save(state | content, tmp_path / "m.pt")
    assert is_the_model(tmp_path / "m.pt", model)


BESIDE: dict[str, Callable[[], State]] = {
    "random states": lambda: {
        "rng_state": torch.get_rng_state(),
        "cuda_rng_state": [torch.get_rng_state()],
        "numpy_rng_state": np.random.get_state(),
        "python_rng_state": random.getstate(),
        "generator": np.random.default_rng(0),
    },
    "a scaler": lambda: {"scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0}},
    "losses as modules": lambda: {"criterion": torch.nn.CrossEntropyLoss(torch.ones(11)), "act": torch.nn.functional.relu},
    "numbers of NumPy's": lambda: {"best": np.float64(1.25), "history": np.arange(3), "seen": np.int64(7)},
    "what weights_only refuses": lambda: {"path": Path("x"), "count": collections.Counter("ab"), "set": {1}, "bytes": b"\xff"},
    "what Megatron keeps": lambda: {"iteration": 3, "args": Namespace(tensor_model_parallel_size=1, world_size=8, git_sha="a")},
}


@pytest.mark.parametrize("what", BESIDE)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_trainers_keep_beside_the_weights_is_left_alone(what: str, protocol: int, model: BDH, tmp_path: Path) -> None:
    content = {"model": model.state_dict(), "config": SIZES} | BESIDE[what]()
    torch.save(content, tmp_path / "m.pt", pickle_protocol=protocol)
    assert is_the_model(tmp_path / "m.pt", model)


@pytest.mark.parametrize("what", ["rng_state", "numpy_rng_state", "python_rng_state"])
def test_random_states_among_the_weights_are_left_alone(what: str, model: BDH, tmp_path: Path) -> None:
    torch.save(dict(model.state_dict()) | {what: BESIDE["random states"]()[what], "config": SIZES}, tmp_path / "m.pt")
    assert is_the_model(tmp_path / "m.pt", model)


def test_an_optimizer_in_the_names_of_one_flat_mapping_is_left_alone(model: BDH, tmp_path: Path) -> None:
    moments = {f"app.optim.state.{name}.exp_avg": torch.zeros(3) for name in NAMES}
    torch.save(named(model.state_dict(), "app.model.") | moments | {"config": SIZES}, tmp_path / "m.pt")
    assert is_the_model(tmp_path / "m.pt", model)
    torch.save(named(model.state_dict(), "app.model.") | {"app.gate.weight": torch.ones(3)}, tmp_path / "m.pt")
    with pytest.raises(BDHError, match=r"holds gate\.weight, which no dialect of BDH has"):
        open_checkpoint(tmp_path / "m.pt", Wishes(n_layer=2))


def strided(value: torch.Tensor) -> torch.Tensor:
    """The same values, as every second row and third column of a larger matrix."""
    larger = torch.zeros(2 * value.shape[0], 3 * value.shape[1])
    larger[::2, ::3] = value
    return larger[::2, ::3]


def in_one_storage(state: State) -> State:
    whole, at, made = torch.cat([value.reshape(-1) for value in state.values()]), 0, {}
    for name, value in state.items():
        made[name] = whole[at : at + value.numel()].view(value.shape)
        at += value.numel()
    return made


VIEWS: dict[str, Callable[[State], State]] = {
    "on its side": lambda s: s | {"lm_head": s["lm_head"].T.contiguous().T},
    "permuted": lambda s: s | {"encoder": s["encoder"].permute(2, 0, 1).contiguous().permute(1, 2, 0)},
    "strided": lambda s: s | {"embed.weight": strided(s["embed.weight"])},
    "of one storage": in_one_storage,
    "as parameters": lambda s: {name: torch.nn.Parameter(value) for name, value in s.items()},
    "twice": lambda s: {"model": s, "raw": s},
}


@pytest.mark.parametrize("what", VIEWS)
def test_views_of_storages_are_read_as_they_are(what: str, model: BDH, tmp_path: Path) -> None:
    torch.save({"m": VIEWS[what](dict(model.state_dict())), "config": SIZES}, tmp_path / "m.pt")
    assert is_the_model(tmp_path / "m.pt", model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_read_to_the_bit(dtype: torch.dtype, model: BDH, tmp_path: Path) -> None:
    torch.save({"m": model.to(dtype).state_dict(), "config": SIZES}, tmp_path / "m.pt")
    found = [np.ascontiguousarray(w.load()).view(np.uint8) for w in open_checkpoint(tmp_path / "m.pt").weights]
    wanted = [model.state_dict()[name].view(torch.uint8).numpy() for name in NAMES]
    assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_tensor_that_repeats_its_storage_is_read_unless_it_fills_the_memory(model: BDH, tmp_path: Path) -> None:
    with torch.no_grad():
        model.embed.weight.copy_(model.embed.weight[:1].expand(11, 8))
    state = dict(model.state_dict())
    state["embed.weight"] = state["embed.weight"][:1].clone().expand(11, 8)
    torch.save({"m": state, "config": SIZES}, tmp_path / "m.pt")
    assert is_the_model(tmp_path / "m.pt", model)
    torch.save({"m": state | {"lm_head": torch.zeros(1).expand(2**40)}}, tmp_path / "m.pt")
    with pytest.raises(BDHError, match=r"reaches beyond its storage of 1"):
        open_checkpoint(tmp_path / "m.pt", Wishes(n_layer=2))


def test_a_view_that_changes_the_sign_is_refused_and_never_misread(model: BDH, tmp_path: Path) -> None:
    state = dict(model.state_dict())
    torch.save(state | {"encoder": torch._neg_view(-state["encoder"])}, tmp_path / "m.pt")
    with pytest.raises(BDHError, match=r"holds encoder as float32 tensor with \{'neg': True\}"):
        open_checkpoint(tmp_path / "m.pt", Wishes(n_layer=2))


@pytest.mark.parametrize("device", ["cuda:0", "mps:0", "xpu", "meta"])
def test_where_tensors_lay_when_they_were_saved_does_not_matter(device: str, model: BDH, tmp_path: Path) -> None:
    torch.save({"m": model.state_dict(), "config": SIZES}, tmp_path / "cpu.pt")
    place = b"X" + len(device).to_bytes(4, "little") + device.encode()
    with zipfile.ZipFile(tmp_path / "cpu.pt") as old, zipfile.ZipFile(tmp_path / "m.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b"X\x03\x00\x00\x00cpu", place))
    assert is_the_model(tmp_path / "m.pt", model)


@dataclasses.dataclass
class Sizes:
    """A configuration class that nobody here imports."""

    n_layer: int
    n_embd: int
    dropout: float
    n_head: int
    mlp_internal_dim_multiplier: int
    vocab_size: int


class Node:
    """A value as OmegaConf keeps it."""

    def __init__(self, value: Any) -> None:
        self._metadata, self._parent, self._val = {"optional": True}, None, value


class Omega:
    """A mapping as OmegaConf keeps it."""

    def __init__(self, values: State) -> None:
        self._metadata, self._parent, self._content = Node, None, {key: Node(value) for key, value in values.items()}


CONFIGS: dict[str, Callable[[State], State]] = {
    "namespace": lambda c: {"args": Namespace(**c, lr=1e-3, out="runs/a")},
    "simple namespace": lambda c: {"config": types.SimpleNamespace(**c)},
    "dataclass": lambda c: {"config": Sizes(**c)} if set(c) == set(SIZES) else {"config": Namespace(**c)},
    "our own": lambda c: {"config": CONFIG} if c == SIZES else {"config": c},
    "defaultdict": lambda c: {"config": collections.defaultdict(int, c)},
    "ordered": lambda c: {"config": collections.OrderedDict(c)},
    "text in JSON": lambda c: {"config": json.dumps(c)},
    "of NumPy's numbers": lambda c: {"config": {k: np.int64(v) if type(v) is int else np.float64(v) for k, v in c.items()}},
    "like OmegaConf's": lambda c: {"config": Omega(c)},
    "parts": lambda c: {"config": {"model": c, "train": {"lr": 1e-3, "steps": 5}, "data": {"path": "x"}}},
    "cfg": lambda c: {"cfg": c},
    "cfg in parts": lambda c: {"cfg": {"model": c}},
    "model_cfg": lambda c: {"model_cfg": c},
    "model_kwargs": lambda c: {"model_kwargs": c},
    "configuration": lambda c: {"configuration": c},
    "opt": lambda c: {"opt": Namespace(**c)},
    "beside the weights": lambda c: {**c, "epoch": 3, "best_val_loss": 1.25},
    "of Hydra": lambda c: {"config": c | {"_target_": "src.models.BDH"}},
    "of Lightning": lambda c: {
        "hyper_parameters": c | {"_instantiator": "lightning.pytorch.cli._InstantiatorFn"},
        "datamodule_hyper_parameters": {"n_layer": 99, "batch_size": 3},
    },
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_configuration_is_known_by_what_it_tells(what: str, model: BDH, tmp_path: Path) -> None:
    torch.save({"model": model.state_dict()} | CONFIGS[what](SIZES), tmp_path / "m.pt")
    assert open_checkpoint(tmp_path / "m.pt").config == CONFIG
    assert is_the_model(tmp_path / "m.pt", model)


@pytest.mark.parametrize("what", CONFIGS)
@pytest.mark.parametrize("switch", [{"k_sparse": 8}, {"activation": "gelu"}])
def test_a_switch_of_another_model_is_refused_in_every_one_of_them(
    what: str, switch: State, model: BDH, tmp_path: Path
) -> None:
    if what == "of NumPy's numbers" and "activation" in switch:
        switch = {"gate": np.bool_(True)}
    torch.save({"model": model.state_dict()} | CONFIGS[what](SIZES | switch), tmp_path / "m.pt")
    with pytest.raises(BDHError, match=rf"has {next(iter(switch))} = .*, which BDH has not"):
        open_checkpoint(tmp_path / "m.pt")


def test_a_configuration_in_the_metadata_of_others_is_read(model: BDH, tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for said in (SIZES, SIZES | {"k_sparse": 8}):
        about = {"format": "pt", "title": "{", "step": "7", "model_config": json.dumps(said)}
        safetensors.torch.save_file(state, tmp_path / "m.safetensors", about)
        if said == SIZES:
            assert is_the_model(tmp_path / "m.safetensors", model)
        else:
            with pytest.raises(BDHError, match="has k_sparse = 8"):
                open_checkpoint(tmp_path / "m.safetensors")


SETS: dict[str, Callable[[State, State], State]] = {
    "ema": lambda a, b: {"model": a, "ema": b},
    "ema_model": lambda a, b: {"state_dict": named(a, "model.") | named(b, "ema_model.module.")},
    "avg": lambda a, b: {"model": a, "avg": {"n_averaged": torch.tensor(3)} | named(b, "module.")},
    "ema.shadow": lambda a, b: {"model": a, "ema": {"decay": 0.999, "num_updates": 3, "shadow": b}},
    "student": lambda a, b: {"teacher": a, "student": b},
    "swa_model": lambda a, b: {"model": named(a, "_orig_mod."), "swa_model": {"n_averaged": torch.tensor(3)} | b},
}


@pytest.mark.parametrize("name", SETS)
def test_an_average_beside_the_weights_is_the_users_to_choose(name: str, model: BDH, tmp_path: Path) -> None:
    other = copy.deepcopy(model)
    other.encoder.data *= 2
    torch.save(SETS[name](model.state_dict(), other.state_dict()) | {"config": SIZES}, tmp_path / "m.pt")
    with pytest.raises(BDHError, match=rf"several sets of weights, .*{name}: bdh-convert --weights"):
        open_checkpoint(tmp_path / "m.pt")
    assert is_the_model(tmp_path / "m.pt", other, Wishes(weights=name))
    first = "teacher" if name == "student" else "model"
    assert is_the_model(tmp_path / "m.pt", model, Wishes(weights=first))


def test_an_average_without_names_is_left_alone(model: BDH, tmp_path: Path) -> None:
    shadow = {"decay": 0.999, "shadow_params": [weight.data for weight in model.parameters()], "collected_params": None}
    torch.save({"model": model.state_dict(), "ema": shadow, "config": SIZES}, tmp_path / "m.pt")
    assert is_the_model(tmp_path / "m.pt", model)


@pytest.mark.parametrize("name", ["m", "weights.bin", "M.PT", "a.b.c", "pytorch_model.bin"])
def test_a_file_is_known_by_its_content_and_not_by_its_name(name: str, model: BDH, tmp_path: Path) -> None:
    torch.save({"m": model.state_dict(), "config": SIZES}, tmp_path / name)
    assert is_the_model(tmp_path / name, model)


REFUSED: dict[str, tuple[Callable[[BDH], Any], str]] = {
    "a module": (
        lambda model: {"model": model, "config": SIZES},
        r"holds model as a pickled .*BDH object: save its state_dict",
    ),
    "float8": (lambda m: m.state_dict() | {"encoder": m.encoder.data.to(torch.float8_e4m3fn)}, "holds encoder as"),
    "no values": (lambda m: m.state_dict() | {"encoder": m.encoder.data.to("meta")}, "holds encoder as"),
    "lists of numbers": (lambda m: [1, 2], "holds a list: a checkpoint is a state dict"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_set_of_weights_is_refused_by_what_it_is(what: str, model: BDH, tmp_path: Path) -> None:
    make, said = REFUSED[what]
    torch.save(make(model), tmp_path / "m.pt")
    with pytest.raises(BDHError, match=said):
        open_checkpoint(tmp_path / "m.pt", Wishes(n_layer=2))


def test_a_bare_pickle_says_whose_it_is(model: BDH, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({name: value.numpy() for name, value in model.state_dict().items()}))
    with pytest.raises(BDHError, match=r"torch wrote before 1\.6"):
        open_checkpoint(tmp_path / "old.pt")
    with pytest.raises(BDHError, match="by another than torch: load it where you trust it"):
        open_checkpoint(tmp_path / "m.pkl")


def test_folders_of_accelerate_and_its_checkpoints_are_read(model: BDH, tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    stepped(prepared, optimizer)
    accelerator.save_state(str(tmp_path / "state"))
    accelerator.save_model(prepared, str(tmp_path / "model"), max_shard_size="2KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    for folder in ("state", "model"):
        assert is_the_model(tmp_path / folder, model, Wishes(n_layer=2))
    accelerator.free_memory()


def test_a_folder_of_torch_distributed_with_everything_of_a_run_is_read(model: BDH, tmp_path: Path) -> None:
    state, optimizer = get_state_dict(model, stepped(model, torch.optim.AdamW(model.parameters())))
    content = {"app": {"model": state, "optim": optimizer}, "config": SIZES, "rng": torch.get_rng_state(), "step": 3}
    dcp.save(content, checkpoint_id=tmp_path / "step-100")
    assert is_the_model(tmp_path / "step-100", model, Wishes(n_layer=2))


def test_an_adapter_is_no_model(model: BDH, tmp_path: Path) -> None:
    from bdh_transformers import BDHConfig as TheirConfig
    from bdh_transformers import BDHForCausalLM

    theirs = BDHForCausalLM(TheirConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=11))
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(target_parameters=["encoder"], r=2))
    torch.save({"model": adapted.state_dict()}, tmp_path / "m.pt")
    with pytest.raises(BDHError, match=r"lora_A.*, which no dialect of BDH has"):
        open_checkpoint(tmp_path / "m.pt", Wishes(n_layer=2))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(BDHError, match="LoRA adapter"):
        open_checkpoint(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert np.array_equal(open_checkpoint(tmp_path / "merged").weights.encoder.load(), theirs.backbone.encoder.detach().numpy())


@pytest.fixture(scope="module")
def saved_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes saved together, in every way that torch has."""
    folder = tmp_path_factory.mktemp("two")
    script = Path(__file__).with_name("save_on_many.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, folder]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    return folder


@pytest.mark.parametrize("name", ["ddp.pt", "zero.pt", "full.pt", "pieces", "pieces of a run"])
def test_what_two_processes_saved_together_is_read(name: str, saved_by_two: Path) -> None:
    whole = torch.load(saved_by_two / f"whole-{name.split('.')[0].split(' ')[0]}.pt")
    weights = open_checkpoint(saved_by_two / name, Wishes(n_layer=2)).weights
    assert all(np.array_equal(weight.load(), whole[there].numpy()) for weight, there in zip(weights, NAMES, strict=True))


def test_what_one_of_two_processes_holds_is_refused_by_name(saved_by_two: Path) -> None:
    with pytest.raises(BDHError, match=r"holds encoder as torch\.distributed\.tensor\.DTensor"):
        open_checkpoint(saved_by_two / "rank0.pt", Wishes(n_layer=2))
