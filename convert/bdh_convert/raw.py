"""Numbers as bytes, in and out of files, without a second copy in memory."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path
from typing import IO, Any

import numpy as np

from bdh_spec.errors import CheckpointError
from bdh_spec.files import reading, shown
from bdh_spec.params import Array

CHUNK = 1 << 20  # bytes or numbers
SMALL = 1 << 20  # bytes of what is text and no numbers
PACKED = 200  # how many times as large as itself a compressed entry may claim to be
DAMAGES = (zipfile.BadZipFile, zlib.error, LZMAError, EOFError, KeyError, RuntimeError, UnicodeDecodeError, struct.error)


def read_small(path: Path) -> bytes:
    """The whole of a file of text, such as a configuration."""
    if path.stat().st_size > SMALL:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes, too many for what it is: download it again")
    return path.read_bytes()


def fetch_raw(path: Path, offset: int, dtype: np.dtype[Any], count: int) -> Array:
    """``count`` numbers that start at ``offset`` of a file."""
    with reading(path), path.open("rb") as file:
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


def is_zip(path: Path) -> bool:
    """Whether a path is a file that opens as zip archives do."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


class Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, path: Path, start: int = 0, length: int | None = None) -> None:
        super().__init__()
        self._file = path.open("rb")
        size = self._file.seek(0, io.SEEK_END)
        if start + (length or 0) > size:
            raise CheckpointError(f"{path} ends before the last of its tensors: copy it again")
        self._start, self._length, self._at = start, size - start if length is None else length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence])
        return self._at

    def readinto(self, room: Any) -> int:
        self._file.seek(self._start + self._at)
        part = self._file.read(max(0, min(len(room), self._length - self._at)))
        room[: len(part)] = part
        self._at += len(part)
        return len(part)

    def close(self) -> None:
        self._file.close()
        super().close()


@dataclass(frozen=True)
class Archive:
    """A zip archive that is a file, or a part of one."""

    path: Path
    start: int = 0
    length: int | None = None

    @contextmanager
    def open(self) -> Iterator[zipfile.ZipFile]:
        """The archive to read, with one error for whatever is wrong with it."""
        try:
            with Window(self.path, self.start, self.length) as file, zipfile.ZipFile(file) as archive:
                yield archive
        except DAMAGES as error:
            raise CheckpointError(f"{self.path} is a damaged or cut off zip archive ({error}): copy it again") from None

    def small(self, archive: zipfile.ZipFile, entry: str, most: int) -> bytes:
        """The whole of an entry that describes others."""
        size = archive.getinfo(entry).file_size
        if size > most:
            raise CheckpointError(f"{self.path} describes itself in {size:,} bytes, where {most:,} are plenty: save it again")
        return archive.read(entry)

    def numbers(self, entry: str, dtype: np.dtype[Any], count: int, skip: Callable[[IO[bytes]], object] = id) -> Array:
        """``count`` numbers of an entry, after whatever ``skip`` reads."""
        with reading(self.path), self.open() as archive, archive.open(entry) as file:
            info = archive.getinfo(entry)
            if info.file_size < count * dtype.itemsize:
                raise CheckpointError(f"{self.path} holds too few numbers in {shown(entry, 80)}: copy it again")
            if info.file_size > PACKED * info.compress_size + SMALL:
                raise CheckpointError(f"{self.path} unpacks {shown(entry, 80)} to {info.file_size:,} bytes: that is no weight")
            skip(file)
            return read_numbers(file, self.path, dtype, count)
