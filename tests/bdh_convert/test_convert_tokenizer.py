"""Checkpoints of ByT5's tokens, byte + 3: told apart wherever they say so, and never taken for bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import bdh_spec
from bdh_convert.checkpoint import open_checkpoint
from bdh_convert.convert import Settings, convert
from bdh_convert.inspect import report
from bdh_convert.tokenizer import NOTE
from bdh_spec import BDHConfig, ForeignTokensWarning
from bdh_spec.files import read_safetensors, write_safetensors

Canonical = Callable[[BDHConfig], Path]
Run = Callable[..., subprocess.CompletedProcess[str]]
OUTPUTS = {
    "numpy": "m.numpy.safetensors",
    "jax": "m.jax.safetensors",
    "torch": "m.pt",
    "mlx": "m.npz",
    "hf": "again.hf",
}


@pytest.fixture
def folder(tmp_path: Path, small: BDHConfig, canonical: Canonical) -> Path:
    """A folder of transformers that says nothing of tokens yet."""
    convert(canonical(small), "hf", tmp_path / "m.hf", Settings())
    return tmp_path / "m.hf"


def in_tokenizer_config(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer", "extra_ids": 0}))


def in_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tokenizer_class": "ByT5Tokenizer"}))


@pytest.mark.parametrize("say", [in_tokenizer_config, in_config])
def test_a_folder_says_it_in_either_file(say: Callable[[Path], None], folder: Path) -> None:
    assert open_checkpoint(folder).tokenizer is None
    say(folder)
    assert open_checkpoint(folder).tokenizer == "ByT5Tokenizer"
    assert NOTE in open_checkpoint(folder).notes


def test_a_file_that_describes_itself_is_not_doubted_for_what_lies_beside_it(
    folder: Path, small: BDHConfig, canonical: Canonical
) -> None:
    in_tokenizer_config(folder)
    in_tokenizer_config(folder.parent)
    assert open_checkpoint(canonical(small)).tokenizer is None


def test_a_bare_file_is_of_the_tokens_that_its_folder_names(tmp_path: Path, small: BDHConfig, canonical: Canonical) -> None:
    tensors = read_safetensors(canonical(small))[0]
    write_safetensors(tmp_path / "bare.safetensors", tensors, {})
    (tmp_path / "config.json").write_text(json.dumps(small.as_dict()))
    in_tokenizer_config(tmp_path)
    assert open_checkpoint(tmp_path / "bare.safetensors").tokenizer == "ByT5Tokenizer"


@pytest.mark.parametrize("class_name", ["BDHTokenizer", "PreTrainedTokenizerFast", None])
def test_another_tokenizer_is_nobodys_business(class_name: str | None, folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": class_name}))
    assert open_checkpoint(folder).tokenizer is None


@pytest.mark.parametrize(("target", "name"), OUTPUTS.items(), ids=OUTPUTS.keys())
def test_what_is_written_says_it_too(target: str, name: str, folder: Path, tmp_path: Path) -> None:
    in_tokenizer_config(folder)
    convert(folder, target, tmp_path / name, Settings())
    assert open_checkpoint(tmp_path / name).tokenizer == "ByT5Tokenizer"
    assert report(tmp_path / name)["tokenizer"] == "ByT5Tokenizer"


def test_the_user_is_told(folder: Path, call: Run) -> None:
    in_tokenizer_config(folder)
    assert NOTE in report(folder)["suspicious"]
    done = call("--to", "numpy", folder)
    assert done.returncode == 0
    assert done.stderr == f"bdh-convert: {NOTE}\n"


def test_whoever_loads_it_is_warned(folder: Path) -> None:
    in_tokenizer_config(folder)
    with pytest.warns(ForeignTokensWarning, match=r"m\.hf: its tokens are ByT5's"):
        bdh_spec.load(folder, backend="numpy")


@pytest.mark.parametrize("name", ["m.hf", *OUTPUTS.values()])
def test_bdh_generate_refuses_to_write_its_tokens_as_bytes(name: str, folder: Path, tmp_path: Path) -> None:
    in_tokenizer_config(folder)
    for target, output in OUTPUTS.items():
        if output == name:
            convert(folder, target, tmp_path / name, Settings())
    generate = Path(sys.executable).parent / "bdh-generate"
    done = subprocess.run([generate, "a", tmp_path / name, "--backend", "numpy"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"bdh-generate: {tmp_path / name}: {NOTE}\n"
