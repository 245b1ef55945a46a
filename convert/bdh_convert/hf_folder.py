"""The Hugging Face container: a folder with config.json and model.safetensors, whole or in shards."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from bdh_convert import safetensors_file
from bdh_convert.metadata import parse_config
from bdh_convert.tensors import Contents, Tensor
from bdh_spec.config import BDHConfig
from bdh_spec.errors import CheckpointError
from bdh_spec.files import check_readable

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def read(path: Path) -> Contents:
    """The tensors of all shards, and the configuration."""
    shards = [safetensors_file.read(_readable(path / name)) for name in _shards(path)]
    tensors = {name: tensor for shard in shards for name, tensor in shard.tensors.items()}
    config = path / CONFIG
    about = parse_config(config, config.read_bytes()) if config.exists() else shards[0].config
    return replace(shards[0], path=path, container="hf", tensors=tensors, config=about)


def _shards(path: Path) -> list[str]:
    if (path / WEIGHTS).exists():
        return [WEIGHTS]
    if not (path / INDEX).exists():
        raise CheckpointError(f"{path} is a folder without {WEIGHTS}: name a file in it, or a folder that transformers saved")
    weight_map = parse_config(path / INDEX, (path / INDEX).read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX} maps no weights to shards: download it again")
    names = sorted(set(map(str, weight_map.values())))
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{path / INDEX} points to {outside[0]!r}, outside its folder: download it again")
    return names


def _readable(path: Path) -> Path:
    check_readable(path)
    return path


def write(part: Path, tensors: Iterable[Tensor], about: Mapping[str, str], config: BDHConfig) -> None:
    """Fill a folder that BDHForCausalLM.from_pretrained reads."""
    tensors = list(tensors)
    dtype = {"float64": "float64", "float16": "float16", "bfloat16": "bfloat16"}.get(tensors[0].dtype.name, "float32")
    (part / CONFIG).write_text(json.dumps(_config_json(config, dtype), indent=2) + "\n")
    # transformers refuses a file whose metadata does not name a framework it knows
    safetensors_file.write(part / WEIGHTS, tensors, {**about, "format": "pt"})


def _config_json(config: BDHConfig, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["BDHForCausalLM"],
        "model_type": "bdh",
        "num_hidden_layers": config.n_layer,
        "hidden_size": config.n_embd,
        "num_attention_heads": config.n_head,
        "mlp_internal_dim_multiplier": config.mlp_internal_dim_multiplier,
        "vocab_size": config.vocab_size,
        "dropout": config.dropout,
        "tie_word_embeddings": False,
        "dtype": dtype,
        "torch_dtype": dtype,  # what transformers called it before 4.56
    }


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` to fill: it takes the name at the end, or vanishes if anything went wrong.

    In a folder that exists already, only the files of the same names are replaced.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        part.mkdir()
        yield part
        for file in part.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        if path.is_dir():
            for file in sorted(part.iterdir(), reverse=True):  # the weights before the configuration
                file.replace(path / file.name)
        else:
            part.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written ({error.strerror or error}): nothing was left there") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
