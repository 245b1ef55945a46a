"""The Hugging Face container: a folder with config.json and model.safetensors, whole or in shards."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from bdh_convert import pickle_file, safetensors_file, tokenizer
from bdh_convert.metadata import parse_config
from bdh_convert.raw import read_small
from bdh_convert.tensors import Contents, Tensor
from bdh_spec.config import BDHConfig
from bdh_spec.dtypes import DTYPES
from bdh_spec.errors import CheckpointError
from bdh_spec.files import check_readable, held, part_of, shown, sync

CONFIG = "config.json"
WEIGHTS, PICKLED = "model.safetensors", "pytorch_model.bin"
INDICES = {f"{name}.index.json": name for name in (WEIGHTS, PICKLED)}  # where the weights are in shards
MAX_SHARD_SIZE = 50 * 10**9  # bytes, from which transformers makes shards as well
# What describes other weights than those that were just written beside it.
STALE = ("model*.safetensors", "pytorch_model*.bin", *INDICES, "tokenizer*", "special_tokens_map.json", "added_tokens.json")


def looks_like(path: Path) -> bool:
    """Whether a folder holds weights under the names of transformers and accelerate."""
    return any((path / name).is_file() for name in (WEIGHTS, PICKLED, *INDICES))


def read(path: Path) -> Contents:
    """The tensors of all shards, and the configuration."""
    shards = [_shard(path / name) for name in _shards(path)]
    tree = {name: tensor for shard in shards for name, tensor in shard.tree.items()}
    config = path / CONFIG
    about = parse_config(config, read_small(config)) if config.is_file() else shards[0].config
    return replace(shards[0], path=path, container="hf", tree=tree, config=about)


def _shards(path: Path) -> list[str]:
    for whole in (WEIGHTS, PICKLED):
        if (path / whole).is_file():
            return [whole]
    index = next(path / name for name in INDICES if (path / name).is_file())
    weight_map = parse_config(index, read_small(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} maps no weights to shards: download it again")
    names = sorted(set(map(str, weight_map.values())))
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{index} points to {shown(repr(outside[0]), 80)}, outside its folder: download it again")
    return names


def _shard(path: Path) -> Contents:
    check_readable(path)
    return (safetensors_file if safetensors_file.looks_like(path) else pickle_file).read(path)


def write(part: Path, tensors: Iterable[Tensor], about: Mapping[str, str], max_shard_size: int = MAX_SHARD_SIZE) -> None:
    """Fill a folder that BDHForCausalLM.from_pretrained reads."""
    tensors = list(tensors)
    found = tensors[0].dtype.name
    dtype = found if found in DTYPES else "float32"
    config = BDHConfig.from_dict(json.loads(about["config"]))
    (part / CONFIG).write_text(json.dumps(_config_json(config, dtype), indent=2) + "\n")
    tokenizer.write(part, about.get("tokenizer"))
    about = {**about, "format": "pt"}  # transformers refuses a file whose metadata does not name a framework it knows
    shards = in_shards(tensors, max_shard_size)
    for name, shard in shards.items():
        safetensors_file.write(part / name, shard, about)
    if len(shards) > 1:
        (part / f"{WEIGHTS}.index.json").write_text(json.dumps(_index(shards), indent=2, sort_keys=True) + "\n")


def in_shards(tensors: Iterable[Tensor], most: int) -> dict[str, list[Tensor]]:
    """The files of a folder and their tensors, in order: as many to a file as fit in ``most`` bytes, and at least one."""
    shards: list[list[Tensor]] = [[]]
    room = most
    for tensor in tensors:
        if tensor.nbytes > room and shards[-1]:
            shards.append([])
            room = most
        shards[-1].append(tensor)
        room -= tensor.nbytes
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{k:05}-of-{len(shards):05}.safetensors": shard for k, shard in enumerate(shards, 1)}


def _index(shards: Mapping[str, list[Tensor]]) -> dict[str, Any]:
    """Which shard holds which tensor, as transformers looks it up."""
    tensors = [tensor for shard in shards.values() for tensor in shard]
    return {
        "metadata": {
            "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors),
            "total_size": sum(tensor.nbytes for tensor in tensors),
        },
        "weight_map": {tensor.name: name for name, shard in shards.items() for tensor in shard},
    }


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
def whole_folder(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """A folder beside ``path`` to fill: it takes the name at the end, or vanishes if anything went wrong.

    In a folder that exists already, the files of the same names are replaced and those that describe other weights removed.
    """
    part = part_of(path)
    left = "some of its files may be new, so convert again" if path.is_dir() else "nothing was left there"
    try:
        part.mkdir()
        with held(part):
            yield part
            for file in part.iterdir():
                sync(file)
            sync(part)
            if path.is_dir() and replace:
                _move_into(part, path)
            else:
                _publish(part, path)
        with suppress(OSError):  # the folder is there and whole
            sync(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written ({error.strerror or error}): {left}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _publish(part: Path, path: Path) -> None:
    """Give a folder its name, which fails where another one with anything in it has taken it."""
    try:
        part.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise CheckpointError(f"{path} has been made by someone else meanwhile: it is kept, choose another name") from None


def stale(path: Path) -> list[Path]:
    """The files of a folder that would describe other weights than those that are written into it, unless replaced."""
    return sorted({file for pattern in STALE for file in path.glob(pattern)})


def _move_into(part: Path, path: Path) -> None:
    written = sorted(part.iterdir(), reverse=True)  # the weights before the configuration
    for file in written:
        file.replace(path / file.name)
    for old in stale(path):
        if old.name not in {file.name for file in written}:
            old.unlink()
