"""The safetensors container: a length, a JSON header, then the raw little-endian bytes of each tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors

from bdh_convert.metadata import said_of_itself
from bdh_convert.raw import fetch_raw
from bdh_convert.tensors import Contents, Tensor, Unreadable
from bdh_spec import safetensors_writer
from bdh_spec.errors import CheckpointError
from bdh_spec.safetensors_writer import DTYPES

LONGEST_HEADER = 4 << 20  # bytes, enough for tens of thousands of tensors


def looks_like(path: Path) -> bool:
    """Whether the file starts as safetensors does: a plausible length, then an opening brace."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < 100_000_000


def read(path: Path) -> Contents:
    """The tensors of a file, and what its metadata says."""
    with path.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        if length > LONGEST_HEADER:
            raise CheckpointError(f"{path} describes its tensors in {length:,} bytes: a checkpoint of BDH holds a handful")
        text = raw.read(length)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:  # for its checks: offsets, lengths, overlaps
            about = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is no whole safetensors file ({error}): copy or convert it again") from None
    header: dict[str, Any] = json.loads(text)
    header.pop("__metadata__", None)
    tree = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    return Contents(path, "safetensors", tree, **said_of_itself(path, about))


def _tensor(path: Path, name: str, entry: Mapping[str, Any], start: int) -> Tensor | Unreadable:
    if entry["dtype"] not in DTYPES:
        return Quantised(entry["dtype"])
    shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
    offset = start + entry["data_offsets"][0]
    return Tensor(name, shape, dtype, lambda: fetch_raw(path, offset, dtype, math.prod(shape)).reshape(shape))


class Quantised(Unreadable):
    """Numbers of a type that is no float of NumPy's."""

    def __init__(self, dtype: str) -> None:
        self.qualified = f"{dtype} tensor"


def write(part: Path, tensors: Iterable[Tensor], about: Mapping[str, str]) -> None:
    """Write the tensors one after the other."""
    safetensors_writer.write(part, tensors, about)
