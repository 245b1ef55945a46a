"""Files at the border: safetensors read with an explanation when they are not, and written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import ml_dtypes  # noqa: F401  safetensors finds bfloat16 for NumPy only once this is imported
import numpy as np
import safetensors
from safetensors.numpy import save

from bdh_spec.errors import CheckpointError
from bdh_spec.params import Array


def check_readable(path: Path) -> None:
    """Refuse what no reader of files could make sense of: missing, a folder, empty, or a git-LFS pointer."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: check the path")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: name a file in it")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty: copy or download it again")
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{path} is a git-LFS pointer and not the file itself: run `git lfs pull`")


def read_safetensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """All tensors of a file and its metadata."""
    check_readable(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is no whole safetensors file ({error}): copy or convert it again") from None


def write_safetensors(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write tensors under the final name only when all of them are on disk."""
    with whole_file(path) as part:
        # Not save_file: it leaves the file readable by its owner only, whatever the user's umask says.
        part.write_bytes(save({name: np.asarray(value, order="C") for name, value in tensors.items()}, dict(metadata)))


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to: it takes the name at the end, or vanishes if anything went wrong."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written ({error.strerror or error}): nothing was left there") from error
    finally:
        with suppress(OSError):  # where nothing could be written there is nothing to remove
            part.unlink()
