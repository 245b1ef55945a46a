"""The ``.npz`` container as NumPy and MLX write it: a zip archive of ``.npy`` entries."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from bdh_convert.metadata import parse_config, said_of_itself
from bdh_convert.raw import Archive, is_zip, raw_bytes
from bdh_convert.tensors import BF16, Contents, Tensor, Unreadable
from bdh_spec.errors import CheckpointError
from bdh_spec.files import shown
from bdh_spec.params import Array

VOID = np.dtype("V2")  # what NumPy makes of MLX's bfloat16
DOTTED = {"embed_weight": "embed.weight", "attn_freqs": "attn.freqs"}  # BDH-MLX's trainer writes _ for dots


def looks_like(path: Path) -> bool:
    """Whether a zip archive holds arrays of NumPy."""
    if not is_zip(path):
        return False
    with Archive(path).open() as archive:
        return any(name.endswith(".npy") for name in archive.namelist())


def read(path: Path) -> Contents:
    """The arrays of an archive, under names with dots."""
    with Archive(path).open() as archive:
        entries = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        tree = {DOTTED.get(name, name): _entry(path, archive, name) for name in entries}
        said = parse_config(path, archive.comment) if archive.comment.startswith(b"{") else {}
    about = {"dialect": "mlx"} | {key: value for key, value in said_of_itself(path, said).items() if value}
    return Contents(path, "npz", tree, **about)


def _entry(path: Path, archive: zipfile.ZipFile, name: str) -> Tensor | Unreadable:
    with archive.open(name + ".npy") as file:
        shape, fortran, stored = _header(path, name, file)
    if stored.hasobject:
        return Pickled()
    dtype = stored.newbyteorder("<")

    def fetch() -> Array:
        skip = lambda file: _header(path, name, file)  # noqa: E731
        flat = Archive(path).numbers(name + ".npy", stored, math.prod(shape), skip)
        return flat.astype(dtype, copy=False).reshape(shape, order="F" if fortran else "C")

    return Tensor(DOTTED.get(name, name), shape, dtype, fetch)


class Pickled(Unreadable):
    """An array of objects, which nobody unpickles."""

    qualified = "array of objects"


def _header(path: Path, name: str, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(file)
    except ValueError as error:
        raise CheckpointError(f"{path} holds no array as {shown(name, 80)} ({error}): save it again") from None
    return shape, fortran, BF16 if dtype == VOID else dtype


def write(part: Path, tensors: Iterable[Tensor], about: Mapping[str, str]) -> None:
    """An archive that mx.load and numpy.load read; what it says of itself stands in the archive's comment."""
    with zipfile.ZipFile(part, "w") as archive:
        archive.comment = json.dumps(dict(about)).encode()
        for tensor in tensors:
            info = zipfile.ZipInfo(tensor.name + ".npy")
            info.file_size = tensor.nbytes + 1024  # tells the archive whether it needs the large form
            with archive.open(info, "w") as file:
                file.write(_npy_header(tensor))
                file.write(raw_bytes(tensor.load()))


def _npy_header(tensor: Tensor) -> bytes:
    described = "<V2" if tensor.dtype == BF16 else np.lib.format.dtype_to_descr(tensor.dtype)  # as MLX names its bfloat16
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": described, "fortran_order": False, "shape": tensor.shape})
    return out.getvalue()
