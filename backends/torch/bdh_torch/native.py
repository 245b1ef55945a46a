"""``elements.c``, compiled once for this machine where it has a C compiler, and kept; elsewhere PyTorch does the same.

``CC`` names the compiler, ``XDG_CACHE_HOME`` the folder it is kept in (``~/.cache``), and ``BDH_NATIVE=0`` does without.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from bdh_torch.elements import Phases

SOURCE = Path(__file__).with_name("elements.c")
# Rounding may be fused and zeros have no sign; infinities and NaN are what they are. With OpenMP, of which PyTorch has brought
# the library already: one pool of threads, of the size that torch.set_num_threads says.
FLAGS = (
    *("-std=c99", "-shared", "-fPIC", "-O3", "-march=native", "-fopenmp"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"),
)
KINDS = {torch.float32: (), torch.bfloat16: ("-DBFLOAT16",)}
WORD = 4  # bytes, in which elements.c counts how far rows are apart
PATIENCE = 60  # seconds for a compiler, which takes one

log = logging.getLogger(__name__)


@cache
def compiled(dtype: torch.dtype) -> Compiled | None:
    """The operations for a dtype, or None where they cannot be had."""
    if dtype not in KINDS or os.environ.get("BDH_NATIVE") == "0" or sys.platform != "linux" or sys.byteorder != "little":
        return None
    try:
        return Compiled(_library(KINDS[dtype]))
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        log.info("elements.c is not used, PyTorch's operations are: %s", error)
        return None


def _library(flags: tuple[str, ...]) -> ctypes.CDLL:
    """Load what was compiled before, or compile it now."""
    command = [*shlex.split(os.environ.get("CC", "cc")), *FLAGS, *flags]
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True, timeout=PATIENCE).stdout
    what = b"\0".join([SOURCE.read_bytes(), version, _processor(), *(part.encode() for part in command)])
    name, folder = f"elements-{hashlib.sha256(what).hexdigest()[:32]}.so", _folder()
    if folder:
        with suppress(OSError):  # it is not there, or has been damaged
            return ctypes.CDLL(str(folder / name))
    with tempfile.TemporaryDirectory(dir=folder) as room:
        new = Path(room) / name
        subprocess.run([*command, str(SOURCE), "-o", str(new)], capture_output=True, check=True, timeout=PATIENCE)
        library = ctypes.CDLL(str(new))  # which stays when its file has gone
        if folder:
            new.replace(folder / name)
    return library


def _folder() -> Path | None:
    """Where libraries are kept, or None where there is no home or nobody may write to it: then each process has its own."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bdh_torch"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return folder if os.access(folder, os.W_OK) else None


def _processor() -> bytes:
    """What tells processors apart for which ``-march=native`` may differ: homes are shared by machines."""
    lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    return platform.machine().encode() + next((line for line in lines if line.lower().startswith((b"flags", b"features"))), b"")


class Compiled:
    """``elements``, whose docstrings say what each does."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        matrix, table = [pointer, size], [pointer, size, pointer, size]
        self._relu_and_turn = _function(library.relu_and_turn, *matrix, *matrix, *table, size, size)
        self._gate = _function(library.gate, *matrix, *matrix, size, size)
        self._undo_gate = _function(library.undo_gate, *matrix * 5, size, size)
        self._undo_turn = _function(library.undo_turn, *matrix, *table, *matrix, *matrix, size, size)

    def relu_and_turn(self, neurons: Tensor, by: Phases, out: Tensor) -> None:
        self._relu_and_turn(*_matrix(neurons), *_matrix(out), *_table(by), *_size(neurons))

    def gate(self, neurons: Tensor, opened: Tensor) -> None:
        self._gate(*_matrix(neurons), *_matrix(opened), *_size(neurons))

    def undo_gate(self, neurons: Tensor, opened: Tensor, slopes: Tensor, waiting: Tensor, mask: Tensor | None) -> None:
        matrices = (part for values in (neurons, opened, slopes, waiting, mask) for part in _matrix(values))
        self._undo_gate(*matrices, *_size(neurons))

    def undo_turn(self, slopes: Tensor, by: Phases, waiting: Tensor, neurons: Tensor) -> None:
        self._undo_turn(*_matrix(slopes), *_table(by), *_matrix(waiting), *_matrix(neurons), *_size(slopes))


def _function(function: ctypes._NamedFuncPointer, *arguments: type) -> ctypes._NamedFuncPointer:
    function.argtypes, function.restype = arguments, None
    return function


def _matrix(values: Tensor | None) -> tuple[int | None, int]:
    """Where it begins, and how many words its rows are apart. The neurons of a row lie side by side."""
    return (None, 0) if values is None else (values.data_ptr(), values.stride(0) * values.element_size() // WORD)


def _table(by: Phases) -> tuple[int, int, int | None, int]:
    """Where phases begin, how many numbers their rows are apart, where the shift is, and how many places there are."""
    return by.local.data_ptr(), by.local.stride(0) * 2, None if by.shift is None else by.shift.data_ptr(), len(by.local)


def _size(values: Tensor) -> tuple[int, int]:
    """Rows, and pairs of neurons."""
    return values.shape[0], values.shape[1] // 2
