"""burn's ``.bin`` container, as BinFileRecorder writes it: bincode without names, in the order of the Rust struct's fields.

Whole numbers are bincode 2's: one byte up to 250, else 251, 252 or 253 and then 2, 4 or 8 little-endian bytes. The file
opens with five strings about the recorder (float type, int type, format, version, settings). Fields that hold no parameters
are recorded as None, one zero byte each, and how many there are differs between versions of the port. A parameter is the
string of its id, then its bytes with their length, its shape and the index of its dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from bdh_convert.raw import fetch_raw
from bdh_convert.tensors import MOST_AXES, Contents, Tensor
from bdh_spec.dtypes import TABLE
from bdh_spec.errors import CheckpointError
from bdh_spec.params import Params

FLOATS = {kind.short: kind.numpy for kind in TABLE}  # by the last part of the Rust type's name
WIDTHS = {251: 2, 252: 4, 253: 8}
LONGEST = 4096  # of a string about the recorder
MOST_NONES = 4096  # between two parameters


def looks_like(path: Path) -> bool:
    """Whether a file opens with strings about one of burn's recorders."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return "burn" in _about(file)[2]
    except CheckpointError:
        return False


def read(path: Path) -> Contents:
    """The five parameters, which are known by their order alone."""
    with path.open("rb") as file:
        dtype = FLOATS.get(_about(file)[0].split("::")[-1])
        if dtype is None:
            raise CheckpointError(
                f"{path} was recorded in another type than f64, f32, f16 or bf16: record it in full precision"
            )
        tree = {tensor.name: tensor for tensor in _parameters(path, file, dtype)}
        if _skip_nones(file):
            raise CheckpointError(f"{path} holds more than the five parameters of BDH: this is another model")
    return Contents(path, "burn", tree, dialect="burn")


def _about(file: IO[bytes]) -> list[str]:
    return [_string(file) for _ in range(5)]


def _parameters(path: Path, file: IO[bytes], dtype: np.dtype[np.generic]) -> Iterator[Tensor]:
    size = path.stat().st_size
    for name in Params._fields:
        _skip_nones(file)
        _string(file)  # the parameter's id
        nbytes, start = _whole(file), file.tell()
        if start + nbytes > size:
            raise CheckpointError(f"{path} ends before the last of its tensors: copy it again")
        file.seek(nbytes, 1)
        axes = _whole(file)
        if axes > MOST_AXES:
            raise CheckpointError(f"{path} holds {name} with {axes:,} axes: it is damaged")
        shape = tuple(_whole(file) for _ in range(axes))
        _whole(file)  # the dtype's index, whose meaning changed between versions of burn
        if math.prod(shape) * dtype.itemsize != nbytes:
            raise CheckpointError(f"{path} holds {nbytes} bytes for {name} of shape {shape}: it is damaged, or quantised")
        yield _tensor(path, name, shape, dtype, start)


def _tensor(path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype[np.generic], start: int) -> Tensor:
    return Tensor(name, shape, dtype, lambda: fetch_raw(path, start, dtype, math.prod(shape)).reshape(shape))


def _skip_nones(file: IO[bytes]) -> bytes:
    """Pass over fields without parameters; the byte that comes next, or nothing at the end."""
    ahead = file.read(MOST_NONES + 1)
    after = ahead.lstrip(b"\0")
    if ahead and not after and len(ahead) > MOST_NONES:
        raise CheckpointError(f"{file.name} holds more than {MOST_NONES:,} empty fields in a row: it is damaged")
    file.seek(-len(after), 1)
    return after[:1]


def _string(file: IO[bytes]) -> str:
    length = _whole(file)
    text = file.read(length) if length <= LONGEST else b""
    if len(text) != length:
        raise CheckpointError(f"{file.name} is no record of burn's, or is cut off: copy it again")
    return text.decode(errors="replace")


def _whole(file: IO[bytes]) -> int:
    byte = file.read(1)
    width = WIDTHS.get(byte[0], 0) if byte else 1
    rest = file.read(width)
    if not byte or len(rest) != width or byte[0] > max(WIDTHS):
        raise CheckpointError(f"{file.name} is no record of burn's, or is cut off: copy it again")
    return int.from_bytes(rest, "little") if width else byte[0]
