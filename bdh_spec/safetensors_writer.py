"""The safetensors format, written so that the same tensors and metadata are the same bytes every time.

The library's own writer leaves the order of metadata to a hash that is seeded anew in each process. All else is as there: a
length, a JSON header padded to eight bytes, then the numbers, those of wide types first so that all are aligned.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from bdh_spec.errors import CheckpointError
from bdh_spec.params import Array

# In the order in which tensors are written.
DTYPES = {
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
RANK = {dtype: rank for rank, dtype in enumerate(NAMES)}


class Stored(Protocol):
    """A tensor that may still be in another file."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def load(self) -> Array:
        """The values, C-contiguous."""


def write(path: Path, tensors: Iterable[Stored], metadata: Mapping[str, str]) -> None:
    """Write a file a tensor at a time, so that no more than one is in memory."""
    ordered = sorted(tensors, key=lambda tensor: (_rank(tensor), tensor.name))
    header = _header(ordered, metadata)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in ordered:
            values = tensor.load()
            file.write(raw_bytes(values.astype(_little_endian(values.dtype), copy=False)))


def raw_bytes(values: Array) -> memoryview:
    """The bytes of a C-contiguous array, without a copy."""
    return values.reshape(-1).view(np.uint8).data  # NumPy lends no buffer of bfloat16 itself


def nbytes(tensor: Stored) -> int:
    """The room that a tensor takes in a file."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _rank(tensor: Stored) -> int:
    little = _little_endian(tensor.dtype)
    if little not in RANK:
        raise CheckpointError(f"{tensor.name} is {tensor.dtype}, which safetensors cannot hold: store it as float32")
    return RANK[little]


def _little_endian(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return dtype.newbyteorder("<") if dtype.kind in "fiu" else dtype


def _header(tensors: Iterable[Stored], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for tensor in tensors:
        start, end = end, end + nbytes(tensor)
        dtype = NAMES[_little_endian(tensor.dtype)]
        entries[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)
