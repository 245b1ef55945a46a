"""What bad input gets: one sentence on stderr, exit status 2, and a folder as it was."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bdh_convert.checkpoint import open_checkpoint
from bdh_convert.convert import Settings, convert
from bdh_convert.steps import Wishes
from bdh_spec import BDHConfig, BDHError, Params
from bdh_spec.checkpoint import save_state
from bdh_spec.files import write_safetensors
from bdh_spec.model import init_state
from bdh_spec.params import shapes

Weights = Callable[[BDHConfig], Params]
Run = Callable[..., subprocess.CompletedProcess[str]]


def listing(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def upstream(params: Params) -> dict[str, Any]:
    """Tensors under upstream's names, without the table."""
    named = params._asdict()
    return {"embed.weight": named.pop("embed"), **named}


def write(path: Path, tensors: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> None:
    """A safetensors file as others write it, with a config.json beside it."""
    write_safetensors(path, tensors, {})
    if config is not None:
        (path.parent / "config.json").write_text(json.dumps(config))


def missing(folder: Path, params: Params, config: BDHConfig) -> None:
    pass


def empty(folder: Path, params: Params, config: BDHConfig) -> None:
    (folder / "m").touch()


def pointer(folder: Path, params: Params, config: BDHConfig) -> None:
    (folder / "m").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")


def prose(folder: Path, params: Params, config: BDHConfig) -> None:
    (folder / "m").write_text("These are not the weights you are looking for.\n" * 9)


def empty_folder(folder: Path, params: Params, config: BDHConfig) -> None:
    (folder / "m").mkdir()


def cut_safetensors(folder: Path, params: Params, config: BDHConfig) -> None:
    write(folder / "m", upstream(params), config.as_dict())
    (folder / "m").write_bytes((folder / "m").read_bytes()[:-100])


def cut_pt(folder: Path, params: Params, config: BDHConfig) -> None:
    torch.save({name: torch.from_numpy(value) for name, value in upstream(params).items()}, folder / "m")
    (folder / "m").write_bytes((folder / "m").read_bytes()[:-100])


def cut_npz(folder: Path, params: Params, config: BDHConfig) -> None:
    np.savez(folder / "m.npz", **upstream(params))
    (folder / "m").write_bytes((folder / "m.npz").read_bytes()[:-100])


def damaged_pt(folder: Path, params: Params, config: BDHConfig) -> None:
    torch.save({name: torch.from_numpy(value) for name, value in upstream(params).items()}, folder / "m")
    data = bytearray((folder / "m").read_bytes())
    at = data.index(params.encoder.tobytes())
    data[at + 100] ^= 1
    (folder / "m").write_bytes(data)
    (folder / "config.json").write_text(json.dumps(config.as_dict()))


def archive_of_text(folder: Path, params: Params, config: BDHConfig) -> None:
    with zipfile.ZipFile(folder / "m", "w") as archive:
        archive.writestr("readme.txt", "nothing here")


def no_n_layer(folder: Path, params: Params, config: BDHConfig) -> None:
    write(folder / "m", upstream(params))


def missing_tensor(folder: Path, params: Params, config: BDHConfig) -> None:
    tensors = upstream(params)
    del tensors["encoder_v"]
    write(folder / "m", tensors, config.as_dict())


def unknown_tensor(folder: Path, params: Params, config: BDHConfig) -> None:
    write(folder / "m", upstream(params) | {"memory_bank": np.zeros((2, 2), np.float32)}, config.as_dict())


def affine_norm(folder: Path, params: Params, config: BDHConfig) -> None:
    write(folder / "m", upstream(params) | {"ln.weight": np.ones(8, np.float32)}, config.as_dict())


def bias(folder: Path, params: Params, config: BDHConfig) -> None:
    write(folder / "m", upstream(params) | {"lm_bias": np.ones(8, np.float32)}, config.as_dict())


def learned_positions(folder: Path, params: Params, config: BDHConfig) -> None:
    write(folder / "m", upstream(params) | {"pos_emb.weight": np.ones((8, 8), np.float32)}, config.as_dict())


def alibi_tensor(folder: Path, params: Params, config: BDHConfig) -> None:
    write(folder / "m", upstream(params) | {"attn.alibi_slopes": np.ones(2, np.float32)}, config.as_dict())


def layers_by_name(folder: Path, params: Params, config: BDHConfig) -> None:
    write(folder / "m", upstream(params) | {"layers.0.encoder": params.encoder}, config.as_dict())


def layers_by_rank(folder: Path, params: Params, config: BDHConfig) -> None:
    write(folder / "m", upstream(params) | {"encoder": np.stack([params.encoder] * 2)}, config.as_dict())


def wrong_shape(folder: Path, params: Params, config: BDHConfig) -> None:
    write(folder / "m", upstream(params) | {"decoder": params.decoder[:-1]}, config.as_dict())


def head_on_its_side(folder: Path, params: Params, config: BDHConfig) -> None:
    write(folder / "m", upstream(params) | {"lm_head": params.lm_head.T.copy()}, config.as_dict())


def integers(folder: Path, params: Params, config: BDHConfig) -> None:
    write(folder / "m", upstream(params) | {"encoder": params.encoder.astype(np.int32)}, config.as_dict())


def other_sizes(folder: Path, params: Params, config: BDHConfig) -> None:
    write(folder / "m", upstream(params), config.as_dict() | {"n_embd": 64})


def nan(folder: Path, params: Params, config: BDHConfig) -> None:
    params.decoder[3, 2] = np.nan
    write(folder / "m", upstream(params), config.as_dict())


def inf(folder: Path, params: Params, config: BDHConfig) -> None:
    params.lm_head[1, 4] = -np.inf
    write(folder / "m", upstream(params), config.as_dict())


def wrong_freqs(folder: Path, params: Params, config: BDHConfig) -> None:
    table = np.full((1, 1, 1, config.n_neurons), 0.1, np.float32)
    write(folder / "m", upstream(params) | {"attn.freqs": table}, config.as_dict())


def canonical_names_and_nobodys_word(folder: Path, params: Params, config: BDHConfig) -> None:
    """Only a file that this project wrote means the table that is in it."""
    write(folder / "m", params._asdict() | {"freqs": np.full(config.n_neurons, 0.1, np.float32)}, config.as_dict())


def freqs_of_another_width(folder: Path, params: Params, config: BDHConfig) -> None:
    write(folder / "m", upstream(params) | {"attn.freqs": np.ones((1, 1, 1, 6), np.float32)}, config.as_dict())


def config_in_ruins(folder: Path, params: Params, config: BDHConfig) -> None:
    write(folder / "m", upstream(params))
    (folder / "config.json").write_text('{"n_layer": 2,')


def twice(folder: Path, params: Params, config: BDHConfig) -> None:
    write(folder / "m", upstream(params) | {"module.encoder": params.encoder}, config.as_dict())


def recurrent_state(folder: Path, params: Params, config: BDHConfig) -> None:
    save_state(folder / "m", init_state(1, config), config, "0" * 64, np.zeros((1, 0), np.int64))


REFUSED = {
    missing: "m does not exist",
    empty: "m is empty",
    pointer: "m is a git-LFS pointer",
    prose: "m is no checkpoint",
    empty_folder: "m is a folder without model.safetensors",
    cut_safetensors: "m is no whole safetensors file",
    cut_pt: "m is a damaged or cut off zip archive",
    cut_npz: "m is a damaged or cut off zip archive",
    damaged_pt: "m is a damaged or cut off zip archive",
    archive_of_text: "m is a zip archive without tensors",
    no_n_layer: "give --n-layer",
    missing_tensor: "no tensor is named encoder_v",
    unknown_tensor: "memory_bank, which no dialect of BDH has",
    affine_norm: "ln.weight, a sign of affine norms",
    bias: "lm_bias, a sign of biases",
    learned_positions: "pos_emb.weight, a sign of learned positions",
    alibi_tensor: "attn.alibi_slopes, a sign of alibi",
    layers_by_name: "layers.0.encoder, a sign of weights per layer",
    layers_by_rank: "encoder has shape (2, 2, 8, 16), weights per layer",
    wrong_shape: "decoder has shape (31, 8), config asks for (32, 8)",
    head_on_its_side: "it is transposed",
    integers: "encoder has dtype int32",
    other_sizes: "the configuration has n_embd = 64, the shapes of the tensors 8",
    nan: "decoder holds nan at [3, 2]",
    inf: "lm_head holds -inf at [1, 4]",
    wrong_freqs: "differs from BDH's frequency table",
    canonical_names_and_nobodys_word: "freqs differs from BDH's frequency table",
    freqs_of_another_width: "attn.freqs has shape (1, 1, 1, 6)",
    config_in_ruins: "is no JSON",
    twice: "holds encoder more than once",
    recurrent_state: "is a saved recurrent state",
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_bad_input_gets_one_sentence_and_status_2_and_leaves_nothing(
    spoil: Callable[[Path, Params, BDHConfig], None], small: BDHConfig, weights: Weights, tmp_path: Path, run: Run
) -> None:
    spoil(tmp_path, weights(small), small)
    before = listing(tmp_path)
    done = run("--to", "numpy", "m")
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert REFUSED[spoil] in done.stderr
    assert done.stderr.startswith("bdh-convert: ")
    assert done.stderr.count("\n") == 1
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rotary_embedding", "alibi"),
        ("alibi", True),
        ("k_sparse", 32),
        ("top_k_sparse", 0.1),
        ("sliding_window", 512),
        ("per_layer_weights", True),
        ("shared_weights", False),
        ("affine", True),
        ("bias", True),
        ("rope_theta", 10000.0),
        ("n_expert", 4),
        ("relu_threshold", 0.1),
        ("layer_norm_eps", 1e-6),
        ("activation", "gelu"),
        ("model_type", "llama"),
    ],
)
def test_a_switch_of_another_model_is_refused_by_name(
    key: str, value: object, small: BDHConfig, weights: Weights, tmp_path: Path
) -> None:
    write(tmp_path / "m", upstream(weights(small)), small.as_dict() | {key: value})
    with pytest.raises(BDHError, match=f"the configuration has {key} = "):
        open_checkpoint(tmp_path / "m")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rotary_embedding", "rope"),
        ("alibi", False),
        ("k_sparse", 0),
        ("sliding_window", None),
        ("rope_theta", 65536),
        ("bias", False),
    ],
)
def test_a_switch_that_is_off_is_no_obstacle(
    key: str, value: object, small: BDHConfig, weights: Weights, tmp_path: Path
) -> None:
    write(tmp_path / "m", upstream(weights(small)), small.as_dict() | {key: value})
    assert open_checkpoint(tmp_path / "m").config == small


def test_an_existing_output_is_kept(
    canonical: Callable[[BDHConfig], Path], small: BDHConfig, tmp_path: Path, call: Run
) -> None:
    canonical(small)
    (tmp_path / "checkpoint.torch.safetensors").write_text("mine")
    done = call("--to", "torch", "checkpoint.safetensors")
    assert done.returncode == 2
    assert "checkpoint.torch.safetensors exists" in done.stderr
    assert (tmp_path / "checkpoint.torch.safetensors").read_text() == "mine"
    assert call("--to", "torch", "checkpoint.safetensors", "--force").returncode == 0
    assert open_checkpoint(tmp_path / "checkpoint.torch.safetensors").config == small


@pytest.mark.parametrize("output", ["file/out.safetensors", "nowhere/out.safetensors", "/proc/out.safetensors", "/proc/out"])
def test_a_place_that_cannot_be_written_to_is_refused(
    output: str, canonical: Callable[[BDHConfig], Path], small: BDHConfig, tmp_path: Path, call: Run
) -> None:
    if output.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("no /proc here: it is the one folder in which even root can create nothing")
    canonical(small)
    (tmp_path / "file").write_text("no folder")
    before = listing(tmp_path)
    target = "numpy" if output.endswith(".safetensors") else "hf"
    done = call("--to", target, "checkpoint.safetensors", "-o", output)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert listing(tmp_path) == before


@pytest.mark.parametrize(("target", "output"), [("numpy", "o.safetensors"), ("torch", "o.pt"), ("mlx", "o.npz"), ("hf", "o")])
def test_a_disk_that_fills_up_leaves_no_file(
    target: str, output: str, canonical: Callable[[BDHConfig], Path], small: BDHConfig, tmp_path: Path, run: Run
) -> None:
    canonical(small)
    before = listing(tmp_path)

    # A limit on the size of files, in blocks of 512 bytes, stands for a full disk: writing fails half way.
    full_disk = ("sh", "-c", 'ulimit -f 6; exec "$@"', "sh")
    done = run("--to", target, "checkpoint.safetensors", "-o", output, through=full_disk)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert f"{output} could not be written" in done.stderr
    assert listing(tmp_path) == before


@pytest.mark.parametrize("target", ["numpy", "hf"])
def test_an_interruption_leaves_no_file(target: str, tmp_path: Path) -> None:
    config = BDHConfig(n_layer=1, n_embd=64, n_head=2, mlp_internal_dim_multiplier=16)
    write(tmp_path / "m", upstream(Params(*(np.zeros(shape, np.float32) for shape in shapes(config)))), config.as_dict())
    before = listing(tmp_path)
    slow = (  # stands still before the third tensor, so that the signal finds it writing
        "import time, bdh_spec.safetensors_writer as f\n"
        "raw, seen = f.raw_bytes, []\n"
        "def slowly(values):\n"
        "    seen.append(values)\n"
        "    if len(seen) == 3: print('writing', flush=True); time.sleep(30)\n"
        "    return raw(values)\n"
        "f.raw_bytes = slowly\n"
        "from bdh_convert.cli import main; main()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", slow, "--to", target, "m"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    assert any(".part" in name for name in listing(tmp_path))
    child.send_signal(signal.SIGINT)
    _, talk = child.communicate(timeout=20)
    assert child.returncode == 130
    assert talk.strip() == "bdh-convert: interrupted, nothing was left behind"
    assert listing(tmp_path) == before


def test_weights_that_are_not_finite_are_converted_when_asked(
    small: BDHConfig, weights: Weights, tmp_path: Path, call: Run
) -> None:
    nan(tmp_path, weights(small), small)
    done = call("--to", "numpy", "m", "--allow-nonfinite")
    assert done.returncode == 0, done.stderr
    assert "loss on a sentence: nan before, nan after" in done.stdout


def test_what_is_said_twice_must_be_said_the_same(small: BDHConfig, canonical: Callable[[BDHConfig], Path]) -> None:
    with pytest.raises(BDHError, match=r"the configuration has n_layer = 1, the command line 4"):
        open_checkpoint(canonical(small), Wishes(n_layer=4))
    with pytest.raises(BDHError, match=r"the configuration has dropout = 0\.25, the command line 0\.5"):
        open_checkpoint(canonical(small), Wishes(dropout=0.5))
    assert open_checkpoint(canonical(small), Wishes(n_layer=1, dropout=0.25)).config == small


def test_a_file_that_reads_back_differently_gets_no_name(
    small: BDHConfig, canonical: Callable[[BDHConfig], Path], tmp_path: Path, run: Run
) -> None:
    canonical(small)
    before = listing(tmp_path)
    lying = (
        "import bdh_spec.safetensors_writer as f\n"
        "raw = f.raw_bytes\n"
        "def wrong(values):\n"
        "    values = values.copy(); values.reshape(-1)[-1] += 1e-3\n"
        "    return raw(values)\n"
        "f.raw_bytes = wrong\n"
        "from bdh_convert.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", lying, "--to", "jax", "checkpoint.safetensors"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "embed read back differs from what was written" in done.stderr
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt", "m.npz", "m"])
def test_no_damage_to_a_file_gets_past_the_errors_of_this_project(
    name: str, small: BDHConfig, canonical: Callable[[BDHConfig], Path], tmp_path: Path
) -> None:
    target = {"m.safetensors": "torch", "m.pt": "torch", "m.npz": "mlx", "m": "hf"}[name]
    convert(canonical(small), target, tmp_path / name, Settings())
    file = tmp_path / name / "model.safetensors" if target == "hf" else tmp_path / name
    sound = file.read_bytes()
    rng = np.random.default_rng(11)
    refused = 0
    for _ in range(150):
        damaged = bytearray(sound)
        for at in rng.integers(0, len(sound) if rng.random() < 0.5 else 900, size=rng.integers(1, 6)):
            damaged[at] = rng.integers(256)
        file.write_bytes(damaged[: rng.integers(1, len(damaged))] if rng.random() < 0.2 else damaged)
        try:
            checkpoint = open_checkpoint(tmp_path / name)
            for weight in checkpoint.weights:
                weight.load()
        except BDHError:
            refused += 1
    assert refused > 20
