"""Files that PyTorch and MLX themselves wrote, and files that they themselves read."""

from __future__ import annotations

import json
import os
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import mlx.nn
import mlx.optimizers
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import bdh_spec
from bdh_conformance.yardstick.tolerances import error
from bdh_convert import pickle_file
from bdh_convert.checkpoint import open_checkpoint, read
from bdh_convert.convert import Settings, convert
from bdh_convert.frequencies import deviation
from bdh_convert.steps import Wishes
from bdh_convert.tensors import Tensor
from bdh_convert.verify import SENTENCE
from bdh_spec import BDHConfig, CheckpointError, ConfigError, Frequencies, Params, ParamsError
from bdh_spec import model as spec
from bdh_spec.params import cast
from bdh_spec.rope import THETA, frequencies
from bdh_spec.stored_table import TABLE_ROUNDING

Weights = Callable[[BDHConfig], Params]


def upstream_freqs(N: int) -> torch.Tensor:
    """The table as upstream works it out, in float32 throughout."""
    pair = (torch.arange(0, N, 1, dtype=torch.float32) / 2).floor() * 2
    return 1.0 / (int(THETA) ** (pair / N)) / (2 * torch.pi)


class Upstream(nn.Module):
    """The parameters and the buffer of the original implementation, under its names."""

    def __init__(self, config: BDHConfig, gate: bool = False) -> None:
        super().__init__()
        V, D, nh, N = config.vocab_size, config.n_embd, config.n_head, config.n_neurons
        self.decoder = nn.Parameter(torch.zeros(nh * N, D))
        self.encoder = nn.Parameter(torch.zeros(nh, D, N))
        self.encoder_v = nn.Parameter(torch.zeros(nh, D, N))
        self.lm_head = nn.Parameter(torch.zeros(D, V))
        self.embed = nn.Embedding(V, D)
        self.attn = nn.Module()
        self.attn.register_buffer("freqs", upstream_freqs(N).view(1, 1, 1, N))
        if gate:
            self.lm_gate = nn.Parameter(torch.zeros(D, 1))

    def fill(self, params: Params) -> Upstream:
        state = {name: torch.from_numpy(value) for name, value in params._asdict().items()}
        self.load_state_dict({"embed.weight": state.pop("embed"), **state}, strict=False)
        return self


class OldMLX(mlx.nn.Module):
    """The parameters of BDH-MLX, among them the frequencies and a gate that nothing uses."""

    def __init__(self, config: BDHConfig) -> None:
        super().__init__()
        V, D, nh, N = config.vocab_size, config.n_embd, config.n_head, config.n_neurons
        self.attn = mlx.nn.Module()
        self.attn.freqs = mx.array(upstream_freqs(N).numpy()).reshape(1, 1, 1, N)
        self.embed = mlx.nn.Embedding(V, D)
        self.decoder = mx.zeros((nh * N, D))
        self.encoder = mx.zeros((nh, D, N))
        self.encoder_v = mx.zeros((nh, D, N))
        self.lm_head = mx.zeros((D, V))
        self.lm_gate = mx.ones((D, 1))

    def fill(self, params: Params) -> OldMLX:
        state = {name: mx.array(value) for name, value in params._asdict().items()}
        self.load_weights([("embed.weight", state.pop("embed")), *state.items()], strict=False)
        return self


def same(found: Params, wanted: Params) -> bool:
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(found, wanted, strict=True))


def test_a_plain_state_dict_of_torch_is_read(config: BDHConfig, weights: Weights, tmp_path: Path) -> None:
    torch.save(Upstream(config).fill(weights(config)).state_dict(), tmp_path / "m.pt")
    found, described = read(tmp_path / "m.pt", config.n_layer)
    assert same(found, weights(config))
    assert (described.n_head, described.n_neurons) == (config.n_head, config.n_neurons)


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_a_written_pt_is_a_state_dict_that_the_original_loads_strictly(
    suffix: str, config: BDHConfig, weights: Weights, canonical: Callable[[BDHConfig], Path], tmp_path: Path
) -> None:
    convert(canonical(config), "torch", tmp_path / f"m{suffix}", Settings())
    for mapped in (False, True):
        state = torch.load(tmp_path / f"m{suffix}", weights_only=True, mmap=mapped)
        assert isinstance(state, OrderedDict)
        Upstream(config).load_state_dict(state, strict=True)
        assert all(
            np.array_equal(state[name].numpy(), value) for name, value in weights(config)._asdict().items() if name in state
        )
        assert np.array_equal(state["embed.weight"].numpy(), weights(config).embed)
        assert np.array_equal(state["attn.freqs"].numpy().reshape(-1), frequencies(config.n_neurons))


def test_a_written_torch_safetensors_loads_strictly(
    small: BDHConfig, canonical: Callable[[BDHConfig], Path], tmp_path: Path
) -> None:
    convert(canonical(small), "torch", tmp_path / "m.safetensors", Settings())
    Upstream(small).load_state_dict(safetensors.torch.load_file(tmp_path / "m.safetensors"), strict=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_float_of_torch_is_read_and_written_to_the_bit(
    dtype: torch.dtype, small: BDHConfig, weights: Weights, tmp_path: Path
) -> None:
    model = Upstream(small).fill(weights(small))
    state = {name: value.to(dtype) if name != "attn.freqs" else value for name, value in model.state_dict().items()}
    torch.save(state, tmp_path / "given.pt")
    convert(tmp_path / "given.pt", "torch", tmp_path / "m.pt", Settings(Wishes(n_layer=1)))
    written = torch.load(tmp_path / "m.pt", weights_only=True)
    assert all(
        written[name].dtype == value.dtype and torch.equal(written[name], value)
        for name, value in state.items()
        if "attn" not in name
    )


@pytest.mark.parametrize("wrapper", ["model_state_dict", "state_dict", "model", "bdh_state_dict"])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "model."])
def test_wrappers_and_prefixes_are_seen_through(
    wrapper: str, prefix: str, small: BDHConfig, weights: Weights, tmp_path: Path
) -> None:
    state = {prefix + name: value for name, value in Upstream(small).fill(weights(small)).state_dict().items()}
    torch.save({"step": 3, wrapper: state, "optimizer_state_dict": {"lr": 1e-3}, "config": small.as_dict()}, tmp_path / "m.pt")
    checkpoint = open_checkpoint(tmp_path / "m.pt")
    assert checkpoint.config == small
    assert checkpoint.notes == ("left out, being no weights: step, optimizer_state_dict",)
    assert same(read(tmp_path / "m.pt")[0], weights(small))


def test_a_config_among_the_tensors_is_read(small: BDHConfig, weights: Weights, tmp_path: Path) -> None:
    torch.save({**Upstream(small).fill(weights(small)).state_dict(), "config": small.as_dict()}, tmp_path / "m.pt")
    assert read(tmp_path / "m.pt")[1] == small


def test_a_compiled_submodule_is_seen_through(small: BDHConfig, weights: Weights, tmp_path: Path) -> None:
    state = Upstream(small).fill(weights(small)).state_dict()
    state["attn._orig_mod.freqs"] = state.pop("attn.freqs")
    torch.save(state, tmp_path / "m.pt")
    assert same(read(tmp_path / "m.pt", 1)[0], weights(small))


def test_tensors_that_share_a_storage_or_lie_on_their_side_are_read_as_they_are(
    small: BDHConfig, weights: Weights, tmp_path: Path
) -> None:
    given = weights(small)
    state = Upstream(small).fill(given).state_dict()
    state["lm_head"] = torch.from_numpy(given.lm_head.T.copy()).T  # not contiguous
    both = torch.cat([torch.zeros(5), *(torch.from_numpy(given[i]).reshape(-1) for i in (1, 2))])
    size = given.encoder.size
    state["encoder"] = both[5 : 5 + size].view(given.encoder.shape)
    state["encoder_v"] = both[5 + size :].view(given.encoder.shape)
    torch.save(state, tmp_path / "m.pt")
    assert same(read(tmp_path / "m.pt", 1)[0], given)


@dataclass
class TheirConfig:
    """Stands for a configuration class that the converter must not import."""

    n_layer: int
    n_embd: int
    n_head: int
    vocab_size: int
    dropout: float
    mlp_internal_dim_multiplier: int

    def __setstate__(self, state: dict[str, Any]) -> None:
        raise AssertionError("a foreign class was unpickled")


def test_a_pickled_dataclass_is_read_without_its_class(small: BDHConfig, weights: Weights, tmp_path: Path) -> None:
    state = Upstream(small).fill(weights(small)).state_dict()
    torch.save({"model": state, "config": TheirConfig(**small.as_dict())}, tmp_path / "m.pt")
    assert read(tmp_path / "m.pt")[1] == small


class Bomb:
    """What a hostile file would hold: an object whose unpickling runs a command."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("place", ["beside", "config", "instead of a tensor", "all"])
def test_a_hostile_pickle_runs_nothing(place: str, small: BDHConfig, weights: Weights, tmp_path: Path) -> None:
    bomb = Bomb(tmp_path / "witness")
    state = Upstream(small).fill(weights(small)).state_dict()
    content = {
        "beside": {"model": state, "optimizer": bomb, "config": small.as_dict()},
        "config": {"model": state, "config": bomb},
        "instead of a tensor": {**state, "encoder": bomb},
        "all": bomb,
    }[place]
    torch.save(content, tmp_path / "m.pt")
    if place == "beside":
        assert same(read(tmp_path / "m.pt")[0], weights(small))
    else:
        with pytest.raises((CheckpointError, ConfigError, ParamsError)):
            read(tmp_path / "m.pt")
    assert not (tmp_path / "witness").exists()
    torch.load(tmp_path / "m.pt", weights_only=False)
    assert (tmp_path / "witness").exists()  # so the file would have run it


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(small: BDHConfig, weights: Weights, tmp_path: Path) -> None:
    tensors = [Tensor.of({"embed": "embed.weight"}.get(name, name), value) for name, value in weights(small)._asdict().items()]
    pickled = pickle_file.pickled(tensors)
    sixteen, seventeen = b"\x8a\x01\x10", b"\x8a\x01\x11"  # N in the shape of encoder, before that of anything else
    assert pickled.count(sixteen) > 1
    for data, refused in ((pickled, False), (pickled.replace(sixteen, seventeen, 1), True)):
        with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
            archive.writestr("m/data.pkl", data)
            for i, tensor in enumerate(tensors):
                archive.writestr(f"m/data/{i}", tensor.load().tobytes())
        if refused:
            with pytest.raises(CheckpointError, match=r"a tensor of shape \(2, 8, 17\) reaches beyond its storage of 256"):
                read(tmp_path / "m.pt", 1)
        else:
            assert same(read(tmp_path / "m.pt", 1)[0], weights(small))


def test_a_pickled_module_is_refused_by_name(small: BDHConfig, tmp_path: Path) -> None:
    torch.save(Upstream(small), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"is a pickled .*Upstream object: save its state_dict\(\) instead"):
        read(tmp_path / "m.pt", 1)


def test_the_format_of_torch_before_1_6_is_refused(small: BDHConfig, tmp_path: Path) -> None:
    torch.save(Upstream(small).state_dict(), tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"is a bare pickle, such as torch wrote before 1\.6: torch\.load it"):
        read(tmp_path / "m.pt", 1)


def test_the_gate_of_early_files_is_left_out_with_a_word(small: BDHConfig, weights: Weights, tmp_path: Path) -> None:
    torch.save(Upstream(small, gate=True).fill(weights(small)).state_dict(), tmp_path / "m.pt")
    checkpoint = open_checkpoint(tmp_path / "m.pt", Wishes(n_layer=1, dropout=0.0))
    assert checkpoint.notes == ("lm_gate is left out: no equation uses it",)


def test_one_frequency_table_per_layer_is_read_where_each_is_bdhs(small: BDHConfig, weights: Weights, tmp_path: Path) -> None:
    state = Upstream(small).fill(weights(small)).state_dict()
    table = state.pop("attn.freqs")
    torch.save(state | {"attns.0.freqs": table, "attns.1.freqs": table}, tmp_path / "m.pt")
    assert same(read(tmp_path / "m.pt", 2)[0], weights(small))
    torch.save(state | {"attns.0.freqs": table, "attns.1.freqs": table * 2}, tmp_path / "m.pt")
    with pytest.raises(ParamsError, match=r"attns\.1\.freqs differs from BDH's frequency table"):
        read(tmp_path / "m.pt", 2)


def test_r4_the_table_as_frameworks_work_it_out_is_bdhs_for_every_width() -> None:
    for N in [*range(2, 600, 2), 8192, 32768]:
        config = BDHConfig(n_layer=1, n_embd=N, n_head=1, mlp_internal_dim_multiplier=1)
        assert deviation(Tensor.of("freqs", upstream_freqs(N).numpy()), config) <= TABLE_ROUNDING / 3


def test_what_mlx_saves_is_read(config: BDHConfig, weights: Weights, tmp_path: Path) -> None:
    model = OldMLX(config).fill(weights(config))
    model.save_weights(str(tmp_path / "m.safetensors"))
    model.save_weights(str(tmp_path / "m.npz"))
    for name in ("m.safetensors", "m.npz"):
        assert same(read(tmp_path / name, config.n_layer)[0], weights(config))


def test_what_the_trainer_of_bdh_mlx_saves_is_read(small: BDHConfig, weights: Weights, tmp_path: Path) -> None:
    flat = {
        name.replace(".", "_"): value
        for name, value in mlx.nn.utils.tree_flatten(OldMLX(small).fill(weights(small)).parameters())
    }
    assert "embed_weight" in flat
    assert "attn_freqs" in flat
    mx.savez(str(tmp_path / "m.npz"), step=mx.array([250]), loss=mx.array([1.25]), **flat)
    checkpoint = open_checkpoint(tmp_path / "m.npz", Wishes(n_layer=1, dropout=0.1))
    assert checkpoint.dialect == "mlx"
    progress, gate = checkpoint.notes
    assert gate == "lm_gate is left out: no equation uses it"
    assert set(progress.removeprefix("left out, being no weights: ").split(", ")) == {"step", "loss"}
    assert same(read(tmp_path / "m.npz", 1)[0], weights(small))


def test_bfloat16_in_an_npz_of_mlx_is_bfloat16_and_not_void(small: BDHConfig, weights: Weights, tmp_path: Path) -> None:
    model = OldMLX(small).fill(weights(small))
    table = model.attn.freqs
    model.set_dtype(mx.bfloat16)
    model.attn.freqs = table
    model.save_weights(str(tmp_path / "m.npz"))
    assert np.load(tmp_path / "m.npz")["encoder"].dtype == np.dtype("V2")
    found, _ = read(tmp_path / "m.npz", 1)
    assert np.array_equal(found.encoder.astype(np.float32), np.array(model.encoder.astype(mx.float32)))


@pytest.mark.parametrize("name", ["m.safetensors", "m.npz"])
@pytest.mark.parametrize("dtype", [None, "bf16", "f16"])
def test_what_we_write_for_mlx_is_loaded_strictly_by_the_existing_port_and_by_ours(
    name: str, dtype: str | None, small: BDHConfig, weights: Weights, canonical: Callable[[BDHConfig], Path], tmp_path: Path
) -> None:
    bdh_mlx = pytest.importorskip("bdh_mlx", reason="the MLX port is not installed here")
    convert(canonical(small), "mlx", tmp_path / name, Settings(dtype=dtype))
    wanted = {None: mx.float32, "bf16": mx.bfloat16, "f16": mx.float16}[dtype]
    for model in (OldMLX(small), bdh_mlx.BDH(small)):
        model.load_weights(str(tmp_path / name))
        assert mx.array_equal(model.encoder, mx.array(weights(small).encoder).astype(wanted))
        assert mx.array_equal(model.embed.weight, mx.array(weights(small).embed).astype(wanted))
    assert mx.load(str(tmp_path / name))["attn.freqs"].dtype == mx.float32


@pytest.mark.parametrize("name", ["m.safetensors", "m.npz"])
def test_what_our_mlx_port_saves_is_read(name: str, small: BDHConfig, tmp_path: Path) -> None:
    bdh_mlx = pytest.importorskip("bdh_mlx", reason="the MLX port is not installed here")
    model = bdh_mlx.BDH(small)
    model.save_weights(tmp_path / name)
    found, described = read(tmp_path / name, small.n_layer)
    assert np.array_equal(found.encoder, np.array(model.encoder))
    assert described.n_neurons == small.n_neurons


def test_our_torch_port_loads_strictly_both_ways(
    small: BDHConfig, weights: Weights, canonical: Callable[[BDHConfig], Path], tmp_path: Path
) -> None:
    bdh_torch = pytest.importorskip("bdh_torch", reason="the PyTorch port is not installed here")
    convert(canonical(small), "torch", tmp_path / "m.pt", Settings())
    model = bdh_torch.BDH(small)
    model.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True), strict=True)
    torch.save(model.state_dict(), tmp_path / "again.pt")
    assert same(read(tmp_path / "again.pt", small.n_layer)[0], weights(small))


class Trained(OldMLX):
    """BDH-MLX as it computes and trains: every array is a weight to its optimiser, the frequencies too."""

    def __call__(self, idx: mx.array) -> mx.array:
        positions = mx.arange(idx.shape[1]).astype(mx.float32)[:, None]
        angle = (positions * self.attn.freqs.reshape(-1)) % 1 * (2 * np.pi)  # T N
        x = normed(self.embed(idx))[:, None]  # B 1 T D
        for _ in range(self.layers):
            sparse = mx.maximum(x @ self.encoder, 0)
            quarter = mx.stack([-sparse[..., 1::2], sparse[..., ::2]], axis=-1).reshape(sparse.shape)
            turned = sparse * mx.cos(angle) + quarter * mx.sin(angle)
            seen = normed(mx.tril(turned @ turned.swapaxes(-1, -2), -1) @ x)
            gated = sparse * mx.maximum(seen @ self.encoder_v, 0)
            merged = gated.swapaxes(1, 2).reshape(idx.shape[0], 1, idx.shape[1], -1)
            x = normed(x + normed(merged @ self.decoder))
        return x[:, 0] @ self.lm_head

    def train_on(self, text: mx.array, steps: int) -> Trained:
        def loss(model: Trained) -> mx.array:
            return mlx.nn.losses.cross_entropy(model(text[:, :-1]), text[:, 1:], reduction="mean")

        optimizer, step = mlx.optimizers.AdamW(learning_rate=1e-3, weight_decay=0.1), mlx.nn.value_and_grad(self, loss)
        for _ in range(steps):
            optimizer.update(self, step(self)[1])
            mx.eval(self.parameters(), optimizer.state)
        return self


def normed(x: mx.array) -> mx.array:
    return mx.fast.layer_norm(x, None, None, 1e-5)


@pytest.fixture
def trained(weights: Weights) -> Trained:
    """A model after some steps of BDH-MLX's trainer, which have moved each frequency by itself."""
    model = Trained(TRAINED)
    model.layers = TRAINED.n_layer
    text = mx.array(np.frombuffer(b"The dragon hatches. The dragon flies. " * 2, np.uint8).astype(np.int32))[None]
    model.fill(weights(TRAINED)).train_on(text, 8)
    table = np.array(model.attn.freqs).ravel()
    assert (table < 0).any()
    assert (table[::2] != table[1::2]).all()
    return model


def as_its_trainer_saves(model: Trained, path: Path) -> None:
    flat = {name.replace(".", "_"): value for name, value in mlx.utils.tree_flatten(model.parameters())}
    mx.savez(str(path), step=mx.array([8]), loss=mx.array([1.25]), **flat)


TRAINED = BDHConfig(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=8, dropout=0.1)
TEXT = np.frombuffer(b"The dragon flies. ", np.uint8).astype(np.int32)[None]


@pytest.mark.parametrize("port", ["numpy", "torch", "mlx", "jax"])
@pytest.mark.parametrize("name", ["trainer.npz", "m.npz", "m.safetensors"])
def test_a_model_that_bdh_mlx_trained_gives_its_own_logits_on_every_port(
    trained: Trained, name: str, port: str, tmp_path: Path
) -> None:
    path, wanted = tmp_path / name, np.array(trained(mx.array(TEXT)))
    as_its_trainer_saves(trained, path) if name == "trainer.npz" else trained.save_weights(str(path))
    for phase in ("exact", "float32"):
        model = bdh_spec.load(path, port, "cpu", phase=phase, n_layer=2, freqs="keep")
        assert error(model.forward(TEXT), wanted) < 3e-6
    assert error(bdh_spec.load(path, port, "cpu", n_layer=2, freqs="reset").forward(TEXT), wanted) > 0.01


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("numpy", "c.safetensors"),
        ("jax", "j.safetensors"),
        ("torch", "t.pt"),
        ("torch", "t.safetensors"),
        ("mlx", "m.safetensors"),
        ("mlx", "m.npz"),
    ],
)
def test_keep_carries_the_table_through_every_dialect_that_stores_one(
    trained: Trained, target: str, name: str, tmp_path: Path
) -> None:
    as_its_trainer_saves(trained, tmp_path / "trainer.npz")
    own = Frequencies(np.array(trained.attn.freqs))
    kept = convert(tmp_path / "trainer.npz", target, tmp_path / name, Settings(Wishes(n_layer=2, freqs="keep")))
    assert kept.checkpoint.config.freqs == own
    assert kept.losses[0] == kept.losses[1]
    again = read(tmp_path / name, 2, "keep")
    assert again[1].freqs == own
    back = convert(tmp_path / name, "mlx", tmp_path / "back.npz", Settings(Wishes(n_layer=2, freqs="keep")))
    assert np.array_equal(mx.load(str(tmp_path / "back.npz"))["attn.freqs"].reshape(-1), mx.array(own.array))
    assert back.losses == kept.losses
    if target in ("numpy", "jax"):  # which describe themselves
        assert read(tmp_path / name)[1] == again[1]
    else:
        with pytest.raises(ParamsError, match="differs from BDH's frequency table"):
            read(tmp_path / name)


def test_each_loss_is_that_of_its_side(trained: Trained, tmp_path: Path, call: Callable[..., Any]) -> None:
    as_its_trainer_saves(trained, tmp_path / "trainer.npz")
    text = np.frombuffer(SENTENCE, np.uint8).astype(np.int64)[None]
    params, config = read(tmp_path / "trainer.npz", 2, "keep")
    by = {}
    for freqs in (config.freqs, None):
        logits = spec.forward(text[:, :-1], params, replace(config, freqs=freqs))
        by[freqs is None] = spec.loss(logits, text[:, 1:])
    assert abs(by[False] - by[True]) > 1e-3
    kept = call("--to", "torch", "trainer.npz", "--n-layer", 2, "--freqs", "keep", "-o", "keep.pt")
    assert f"loss on a sentence: {by[False]:.6f} before, {by[False]:.6f} after" in kept.stdout
    reset = call("--to", "torch", "trainer.npz", "--n-layer", 2, "--freqs", "reset", "-o", "reset.pt")
    assert f"{by[False]:.6f} before by its own frequencies, {by[True]:.6f} after by BDH's" in reset.stdout
    told = json.loads(call("--to", "hf", "keep.pt", "--n-layer", 2, "--freqs", "reset", "-o", "hf", "--json").stdout)
    assert (told["freqs"], told["losses"]) == ("reset", pytest.approx([by[False], by[True]], rel=1e-6))
    shown = call("--inspect", "trainer.npz", "--n-layer", 2)
    assert "attn.freqs differs from BDH's frequency table by up to" in shown.stdout
    assert f"--freqs keep: the loss on a sentence is {by[False]:.6f} by its own frequencies" in shown.stdout
    assert f"--freqs reset: the loss on a sentence is {by[True]:.6f} by BDH's" in shown.stdout


def test_a_model_of_its_own_frequencies_goes_to_no_folder_of_transformers(trained: Trained, tmp_path: Path) -> None:
    as_its_trainer_saves(trained, tmp_path / "trainer.npz")
    settings = Settings(Wishes(n_layer=2, freqs="keep"))
    convert(tmp_path / "trainer.npz", "numpy", tmp_path / "c.safetensors", settings)
    for source, asked in (("trainer.npz", settings), ("c.safetensors", Settings())):
        with pytest.raises(CheckpointError, match=r"hf files store no frequencies.* --freqs reset.*numpy, jax, torch, mlx"):
            convert(tmp_path / source, "hf", tmp_path / "hf", asked)
        assert not (tmp_path / "hf").exists()
    convert(tmp_path / "c.safetensors", "hf", tmp_path / "hf", Settings(Wishes(freqs="reset")))


@pytest.mark.parametrize("shape", [(-1,), (1, 1, 1, -1), (1, -1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_a_trained_table_is_kept_in_whatever_it_is_stored(
    small: BDHConfig, weights: Weights, dtype: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    table = (upstream_freqs(small.n_neurons) - 5e-3).to(getattr(torch, dtype))
    state = Upstream(small).fill(weights(small)).state_dict() | {"attn.freqs": table.reshape(shape)}
    torch.save({f"_orig_mod.{name}": value for name, value in state.items()}, tmp_path / "m.pt")
    kept = read(tmp_path / "m.pt", 1, "keep")[1].freqs
    assert np.array_equal(kept.array, table.float().numpy())
    assert read(tmp_path / "m.pt", 1, "reset")[1].freqs is None
    if dtype in ("float32", "bfloat16"):  # that MLX stores
        arrays = {name: mx.array(value.float().numpy()) for name, value in state.items()}
        mx.savez(str(tmp_path / "m.npz"), **arrays | {"attn.freqs": arrays["attn.freqs"].astype(getattr(mx, dtype))})
        assert read(tmp_path / "m.npz", 1, "keep")[1].freqs == kept


def test_a_table_of_nan_can_be_reset_and_not_kept(small: BDHConfig, weights: Weights, tmp_path: Path) -> None:
    state = Upstream(small).fill(weights(small)).state_dict()
    torch.save(state | {"attn.freqs": state["attn.freqs"] * torch.nan}, tmp_path / "m.pt")
    with pytest.raises(ParamsError, match=r"attn\.freqs is no table that a model can turn by: frequency 0 is nan"):
        read(tmp_path / "m.pt", 1, "keep")
    outcome = convert(tmp_path / "m.pt", "numpy", tmp_path / "m.safetensors", Settings(Wishes(n_layer=1, freqs="reset")))
    assert np.isnan(outcome.losses[0])
    assert np.isfinite(outcome.losses[1])


def test_a_trained_table_is_refused_unless_told_to_keep_or_reset_it(small: BDHConfig, weights: Weights, tmp_path: Path) -> None:
    model = OldMLX(small).fill(weights(small))
    model.attn.freqs = model.attn.freqs - 5e-5  # one AdamW step at the learning rate of that port's trainer
    model.save_weights(str(tmp_path / "m.npz"))
    with pytest.raises(
        ParamsError, match=r"attn\.freqs differs from BDH's frequency table by up to .* --freqs reset .* --freqs keep"
    ):
        read(tmp_path / "m.npz", 1)

    reset = convert(tmp_path / "m.npz", "torch", tmp_path / "reset.pt", Settings(Wishes(n_layer=1, freqs="reset")))
    assert any("BDH's table is written instead" in note for note in reset.checkpoint.notes)
    assert np.array_equal(torch.load(tmp_path / "reset.pt")["attn.freqs"].numpy().reshape(-1), frequencies(small.n_neurons))

    keep = convert(tmp_path / "m.npz", "torch", tmp_path / "keep.pt", Settings(Wishes(n_layer=1, freqs="keep")))
    assert any("the result is not BDH" in note for note in keep.checkpoint.notes)
    kept = torch.load(tmp_path / "keep.pt")["attn.freqs"].numpy()
    assert kept.shape == (1, 1, 1, small.n_neurons)
    assert np.array_equal(kept, np.array(model.attn.freqs))

    with pytest.raises(CheckpointError, match="hf files store no frequencies, so --freqs keep cannot"):
        convert(tmp_path / "m.npz", "hf", tmp_path / "keep", Settings(Wishes(n_layer=1, freqs="keep")))


def test_tables_that_differ_from_layer_to_layer_are_another_model(small: BDHConfig, weights: Weights, tmp_path: Path) -> None:
    state = Upstream(small).fill(weights(small)).state_dict()
    table = state.pop("attn.freqs")
    torch.save(state | {"attns.0.freqs": table * 2, "attns.1.freqs": table * 3}, tmp_path / "m.pt")
    for wish in ("keep", "reset"):
        with pytest.raises(ParamsError, match="one table for all layers: this is another model"):
            read(tmp_path / "m.pt", 1, wish)


def test_a_table_stored_as_bfloat16_is_known_and_one_rounded_to_it_is_not(
    small: BDHConfig, weights: Weights, tmp_path: Path
) -> None:
    state = Upstream(small).fill(weights(small)).to(torch.bfloat16).state_dict()
    torch.save(state, tmp_path / "m.pt")
    assert same(read(tmp_path / "m.pt", 1)[0], cast(weights(small), ml_dtypes.bfloat16))
    torch.save(state | {"attn.freqs": state["attn.freqs"].float()}, tmp_path / "m.pt")
    with pytest.raises(ParamsError, match="differs from BDH's frequency table"):
        read(tmp_path / "m.pt", 1)
