"""Numbers as bytes, in and out of files, without a second copy in memory."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from lzma import LZMAError
from pathlib import Path
from typing import IO, Any

import numpy as np

from bdh_spec.errors import CheckpointError
from bdh_spec.params import Array

CHUNK = 1 << 20  # bytes or numbers


def fetch_raw(path: Path, offset: int, dtype: np.dtype[Any], count: int) -> Array:
    """``count`` numbers that start at ``offset`` of a file."""
    with path.open("rb") as file:
        file.seek(offset)
        return read_numbers(file, path, dtype, count)


def read_numbers(file: IO[bytes], path: Path, dtype: np.dtype[Any], count: int) -> Array:
    """The next ``count`` numbers of an open file."""
    values = np.empty(count, dtype)
    room, filled = raw_bytes(values), 0
    while filled < len(room):
        part = file.read(min(CHUNK, len(room) - filled))  # in pieces: a zip entry copies whatever is asked of it
        if not part:
            raise CheckpointError(f"{path} ends before the last of its tensors: copy it again")
        room[filled : filled + len(part)] = part
        filled += len(part)
    return values


def raw_bytes(values: Array) -> memoryview:
    """The bytes of a C-contiguous array."""
    return values.reshape(-1).view(np.uint8).data  # NumPy lends no buffer of bfloat16 itself


def chunks(values: Array) -> Iterator[Array]:
    """A C-contiguous array in flat pieces, so that what is computed from it needs little memory of its own."""
    flat = values.reshape(-1)
    for start in range(0, flat.size, CHUNK):
        yield flat[start : start + CHUNK]


@contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip archive to read, with one error for whatever is wrong with it."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, LZMAError, EOFError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} is a damaged or cut off zip archive ({error}): copy it again") from None


def read_entry(path: Path, entry: str, dtype: np.dtype[Any], count: int, skip: Callable[[IO[bytes]], object] = id) -> Array:
    """``count`` numbers of an archive's entry, after whatever ``skip`` reads."""
    with open_zip(path) as archive, archive.open(entry) as file:
        if archive.getinfo(entry).file_size < count * dtype.itemsize:
            raise CheckpointError(f"{path} holds too few numbers in {entry}: copy it again")
        skip(file)
        return read_numbers(file, path, dtype, count)
