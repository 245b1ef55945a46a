"""The folder of torch.distributed.checkpoint, as FSDP writes it: a pickle of what lies where, and files of pieces.

Each piece is a file of torch's with one tensor in it, at an offset of a file of many.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bdh_convert import pickle_file
from bdh_convert.metadata import parse_config
from bdh_convert.pickle_file import Foreign
from bdh_convert.raw import Archive, read_small
from bdh_convert.tensors import Contents, Tensor, Unreadable
from bdh_spec.dtypes import TABLE
from bdh_spec.errors import CheckpointError
from bdh_spec.files import reading, shown
from bdh_spec.params import Array

DESCRIPTION, CONFIG = ".metadata", "config.json"
DTYPES = {f"torch.{kind.name}": kind.numpy for kind in TABLE}


@dataclass(frozen=True)
class Piece:
    """A block of a tensor, and the part of a file that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Archive

    def load(self) -> Array:
        held, _ = pickle_file.load(self.file)
        if not isinstance(held, Tensor) or held.shape != self.sizes:
            raise CheckpointError(f"{self.file.path} holds something else than a block of shape {self.sizes}: copy it again")
        return held.load()


def looks_like(path: Path) -> bool:
    """Whether a folder says what lies where in it."""
    return (path / DESCRIPTION).is_file()


def read(path: Path) -> Contents:
    """The tensors of all pieces; what else was saved is named only."""
    described = _described(path)
    places = _places(path, described)
    tree = {str(name): _entry(path, str(name), about, places) for name, about in described["state_dict_metadata"].items()}
    config = path / CONFIG
    return Contents(path, "dcp", tree, parse_config(config, read_small(config)) if config.is_file() else None)


def _described(path: Path) -> dict[str, Any]:
    file = path / DESCRIPTION
    if file.stat().st_size > pickle_file.LONGEST:
        raise CheckpointError(f"{file} has {file.stat().st_size:,} bytes: a checkpoint of BDH is described in a few thousand")
    found = pickle_file.unpickled(Archive(file), file.read_bytes(), "")
    fields = found.attributes() if isinstance(found, Foreign) else {}
    if not all(isinstance(fields.get(name), Mapping) for name in ("state_dict_metadata", "storage_data")):
        raise CheckpointError(f"{file} is no description by torch.distributed.checkpoint: save the state dict with torch.save")
    return fields


def _places(path: Path, described: dict[str, Any]) -> dict[tuple[Any, Any], Archive]:
    """Where the piece of a tensor at an offset lies."""
    places = {}
    for index, info in described["storage_data"].items():
        key, where = index.attributes(), info.attributes()
        name = str(where["relative_path"])
        if Path(name).name != name:
            raise CheckpointError(f"{path / DESCRIPTION} points to {shown(name, 80)}, outside its folder: download it again")
        if where.get("transform_descriptors"):
            raise CheckpointError(f"{path / name} is compressed: save the state dict with torch.save")
        places[key["fqn"], key.get("offset")] = Archive(path / name, where["offset"], where["length"])
    return places


def _entry(path: Path, name: str, about: Foreign, places: Mapping[tuple[Any, Any], Archive]) -> Tensor | Unreadable:
    fields = about.attributes()
    if "chunks" not in fields:
        return about
    properties = fields["properties"].state
    kind = properties[0] if isinstance(properties, tuple) else properties["dtype"]
    dtype = DTYPES.get(kind.qualified)
    if dtype is None:
        return pickle_file.Quantised(kind.qualified)
    chunks = [chunk.attributes() for chunk in fields["chunks"]]
    pieces = [Piece(c["offsets"], c["sizes"], places[name, c["offsets"]]) for c in chunks]
    return _assembled(path, name, fields["size"], dtype, pieces)


def _assembled(path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], pieces: list[Piece]) -> Tensor:
    def fetch() -> Array:
        with reading(path):
            whole = np.zeros(shape, dtype)
            for piece in pieces:
                whole[_block(piece)] = piece.load()
            return whole

    tensor = Tensor(name, shape, dtype, fetch)
    inside = all(
        len(piece.offsets) == len(piece.sizes) == len(shape)
        and all(0 <= at <= at + size <= whole for at, size, whole in zip(piece.offsets, piece.sizes, shape, strict=True))
        for piece in pieces
    )
    held = sum(math.prod(piece.sizes) for piece in pieces)
    stored = sum(piece.file.length or 0 for piece in pieces)
    if not inside or held != math.prod(shape) or stored < tensor.nbytes:
        raise CheckpointError(
            f"{path} holds {held:,} of the {math.prod(shape):,} numbers of {shown(name, 80)}: copy all its files"
        )
    return tensor


def _block(piece: Piece) -> tuple[slice, ...]:
    return tuple(slice(at, at + size) for at, size in zip(piece.offsets, piece.sizes, strict=True))
