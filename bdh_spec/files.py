"""Files at the border: read with an explanation when they are not what they seem, and written whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  safetensors finds bfloat16 for NumPy only once this is imported
import numpy as np
import safetensors

from bdh_spec import safetensors_writer
from bdh_spec.errors import BDHError, CheckpointError
from bdh_spec.params import Array

if sys.platform != "win32":  # where a file that somebody writes cannot be removed anyway
    import fcntl

LONGEST = 600  # characters of a message, whatever a file makes it hold


def shown(text: object, most: int = LONGEST) -> str:
    """What a file says, fit for a terminal and a log: control characters spelt out, and the middle of what is long left out.

    >>> shown("encoder\\x1b[2J")
    'encoder\\\\x1b[2J'
    """
    plain = str(text)
    if len(plain) > most:
        plain = f"{plain[: most * 2 // 3]}...{plain[-most // 3 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in plain)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """The border that a file's content crosses: whatever goes wrong behind it is one of this project's errors."""
    try:
        yield
    except BDHError as error:
        raise type(error)(shown(error)) from None
    except OSError as error:
        raise CheckpointError(shown(f"{path} could not be read ({error.strerror or error}): check it and its disk")) from None
    except Exception as error:  # noqa: BLE001  a hostile file can make a reader raise anything at all
        raise CheckpointError(
            shown(f"{path} is damaged, or not what it seems ({type(error).__name__}: {error}): copy or save it again")
        ) from None


def check_readable(path: Path) -> None:
    """Refuse what no reader of files could make sense of: missing, a folder, a pipe, empty, or a git-LFS pointer."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: check the path")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: name a file in it")
    if not path.is_file():
        raise CheckpointError(f"{path} is no regular file, and a checkpoint is read from many places at once: save it first")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty: copy or download it again")
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{path} is a git-LFS pointer and not the file itself: run `git lfs pull`")


def read_safetensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """All tensors of a file and its metadata."""
    with reading(path):
        check_readable(path)
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{path} is no whole safetensors file ({error}): copy or convert it again") from None


def write_safetensors(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write tensors under the final name only when all of them are on disk."""
    with whole_file(path) as part:
        safetensors_writer.write(part, [Named(name, value) for name, value in tensors.items()], metadata)


@dataclass(frozen=True)
class Named:
    """An array to be written under a name."""

    name: str
    values: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.values.dtype

    def load(self) -> Array:
        return np.asarray(self.values, order="C")


@contextmanager
def whole_file(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """A file beside ``path`` to write to: it takes the name at the end, or vanishes if anything went wrong.

    Without ``replace`` the name must still be free then, so that of two writers one gets an error and none loses its work.
    """
    part = part_of(path)
    try:
        part.touch(exist_ok=False)
        with held(part):
            yield part
            sync(part)
            publish(part, path, replace)
        with suppress(OSError):  # the file is there and whole; only a power cut now could still take its name away
            sync(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written ({error.strerror or error}): nothing was left there") from error
    finally:
        with suppress(OSError):  # where nothing could be written there is nothing to remove
            part.unlink()


def sync(path: Path) -> None:
    """Wait until the disk holds what was written to a file, or the names in a folder."""
    folder = path.is_dir()
    if folder and sys.platform == "win32":  # where folders cannot be opened
        return
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(part: Path, path: Path, replace: bool) -> None:
    """Give a finished file its name."""
    if replace:
        part.replace(path)
        return
    try:
        os.link(part, path)  # fails where the name is taken, and there is no moment in between
    except FileExistsError:
        raise CheckpointError(f"{path} has been made by someone else meanwhile: it is kept, choose another name") from None
    except OSError:  # a file system without links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        part.replace(path)


def clear_parts(folder: Path, name: str = "*") -> None:
    """Remove what killed writers left unfinished in a folder; ``name`` is a pattern of the files it was to be."""
    for old in folder.glob(f".{name}.*.part"):
        with suppress(OSError), held(old) as alone:
            if alone:
                shutil.rmtree(old) if old.is_dir() else old.unlink()


def part_of(path: Path) -> Path:
    """The name of something unfinished beside ``path``, after clearing what killed writers left under such names."""
    clear_parts(path.parent, _literal(path.name))
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


@contextmanager
def held(part: Path) -> Iterator[bool]:
    """Whether something unfinished is this process's alone, which it then is until the end: of the block, or of the process."""
    if sys.platform == "win32":  # where nothing is locked, and nothing taken for abandoned
        yield False
        return
    handle = os.open(part, os.O_RDONLY)
    try:
        yield _lock(handle)
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _literal(name: str) -> str:
    """A name for glob, in which no character stands for others."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
