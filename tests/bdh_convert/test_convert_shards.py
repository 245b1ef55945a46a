"""Folders of transformers whose weights are in several files."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest
import torch

from bdh_convert.checkpoint import read
from bdh_convert.command import command, number_of_bytes
from bdh_convert.hf_folder import in_shards
from bdh_convert.tensors import Tensor
from bdh_spec import BDHConfig
from bdh_transformers import BDHForCausalLM

Canonical = Callable[[BDHConfig], Path]
Run = Callable[..., subprocess.CompletedProcess[str]]
WHOLE = {"config.json", "model.safetensors"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("most", [1, 1000, 1500, 2048, 10_000])
def test_shards_come_back_bit_for_bit_and_open_in_transformers(
    most: int, canonical: Canonical, config: BDHConfig, tmp_path: Path, call: Run
) -> None:
    canonical(config)
    done = call("->hf", "checkpoint.safetensors", "-o", "hf", "--max-shard-size", most)
    assert done.returncode == 0, done.stderr
    assert call("->numpy", "hf", "-o", "back.safetensors").returncode == 0
    assert (tmp_path / "back.safetensors").read_bytes() == _again(tmp_path, call)
    loaded, report = BDHForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values())
    assert call("->hf", "checkpoint.safetensors", "-o", "whole").returncode == 0
    for name, weight in BDHForCausalLM.from_pretrained(tmp_path / "whole").state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)


def _again(folder: Path, call: Run) -> bytes:
    assert call("->numpy", "checkpoint.safetensors", "-o", "direct.safetensors").returncode == 0
    return (folder / "direct.safetensors").read_bytes()


def test_the_index_and_the_names_are_those_of_transformers(
    canonical: Canonical, small: BDHConfig, tmp_path: Path, call: Run
) -> None:
    canonical(small)
    assert call("->hf", "checkpoint.safetensors", "-o", "ours", "--max-shard-size", "1KiB").returncode == 0
    BDHForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs", max_shard_size=1024)
    ours, theirs = (json.loads((tmp_path / who / "model.safetensors.index.json").read_text()) for who in ("ours", "theirs"))
    assert ours["metadata"] == theirs["metadata"]
    assert set(ours["weight_map"]) == set(theirs["weight_map"])
    assert {name for name in names(tmp_path / "theirs") if "safetensors" in name} | {"config.json"} == names(tmp_path / "ours")


@pytest.mark.parametrize(("first", "second"), [(("--max-shard-size", 1), ()), ((), ("--max-shard-size", 1))])
def test_whole_weights_and_shards_replace_one_another(
    first: tuple[object, ...], second: tuple[object, ...], canonical: Canonical, small: BDHConfig, tmp_path: Path, call: Run
) -> None:
    canonical(small)
    assert call("->hf", "checkpoint.safetensors", "-o", "hf", *first).returncode == 0
    before = names(tmp_path / "hf")
    done = call("->hf", "checkpoint.safetensors", "-o", "hf", "--force", *second)
    gone = sorted(before - names(tmp_path / "hf"))
    assert gone
    assert f"removed, being about other weights: {', '.join(gone)}\n" in done.stderr
    assert (names(tmp_path / "hf") == WHOLE) == (not second)
    assert call("->numpy", "hf", "-o", "back.safetensors").returncode == 0
    assert read(tmp_path / "back.safetensors")[1] == small


def test_small_models_are_one_file(canonical: Canonical, small: BDHConfig, tmp_path: Path, call: Run) -> None:
    canonical(small)
    assert call("->hf", "checkpoint.safetensors", "-o", "hf").returncode == 0
    assert names(tmp_path / "hf") == WHOLE


def test_a_shard_holds_what_fits_and_at_least_one_tensor() -> None:
    tensors = [Tensor.of(str(size), np.zeros(size, np.int8)) for size in (3, 4, 9, 1, 2, 3)]
    held = [[tensor.nbytes for tensor in shard] for shard in in_shards(tensors, 7).values()]
    assert held == [[3, 4], [9], [1, 2, 3]]
    assert list(in_shards(tensors, 22)) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500mib", 500 << 20), ("1 KB", 1000), ("2TiB", 2 << 40), ("77", 77), ("3B", 3)]
)
def test_sizes_are_read_as_transformers_reads_them(text: str, size: int) -> None:
    assert number_of_bytes(click.Context(command), command.params[0], text) == size
