"""The safetensors container: a length, a JSON header, then the raw little-endian bytes of each tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from bdh_convert.metadata import said_of_itself
from bdh_convert.raw import fetch_raw, raw_bytes
from bdh_convert.tensors import BF16, F16, F32, F64, Contents, Tensor
from bdh_spec.errors import CheckpointError

DTYPES = {"F64": F64, "F32": F32, "F16": F16, "BF16": BF16, "I64": np.dtype("<i8"), "I32": np.dtype("<i4")}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def looks_like(path: Path) -> bool:
    """Whether the file starts as safetensors does: a plausible length, then an opening brace."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < 100_000_000


def read(path: Path) -> Contents:
    """The tensors of a file, and what its metadata says."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:  # for its checks: offsets, lengths, overlaps
            about = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is no whole safetensors file ({error}): copy or convert it again") from None
    with path.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header: dict[str, Any] = json.loads(raw.read(length))
    header.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    return Contents(path, "safetensors", tensors, **said_of_itself(path, about))


def _tensor(path: Path, name: str, entry: Mapping[str, Any], start: int) -> Tensor:
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{path} holds {name} as {entry['dtype']}: weights are F64, F32, F16 or BF16, so dequantise it first"
        )
    shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
    offset = start + entry["data_offsets"][0]
    return Tensor(name, shape, dtype, lambda: fetch_raw(path, offset, dtype, math.prod(shape)).reshape(shape))


def write(part: Path, tensors: Iterable[Tensor], about: Mapping[str, str]) -> None:
    """Write the tensors one after the other."""
    tensors = list(tensors)
    header = _header(tensors, about)
    with part.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors:
            file.write(raw_bytes(tensor.load()))


def _header(tensors: Iterable[Tensor], about: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(about)}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        entries[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)  # padded so that the first tensor is aligned
