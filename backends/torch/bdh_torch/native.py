"""``elements.c`` and ``token.c``, compiled once for this machine if it has a C compiler, and kept; else PyTorch does the same.

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

# Rounding may be fused and zeros have no sign; infinities and NaN are what they are. With OpenMP, of which PyTorch has brought
# the library already: one pool of threads, of the size that torch.set_num_threads says.
FLAGS = (
    *("-std=c99", "-shared", "-fPIC", "-O3", "-march=native", "-fopenmp"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"),
)
KINDS = {torch.float32: (), torch.bfloat16: ("-DBFLOAT16",)}
WORD = 4  # bytes, in which elements.c counts how far rows are apart
ROWS = 1024  # of a piece of a sum in token.c
PATIENCE = 60  # seconds for a compiler, which takes one

log = logging.getLogger(__name__)


@cache
def compiled(dtype: torch.dtype) -> Compiled | None:
    """``elements.c`` for neurons of a dtype, or None where it cannot be had."""
    library = _had("elements.c", dtype)
    return Compiled(library) if library else None


@cache
def token(dtype: torch.dtype) -> Token | None:
    """``token.c`` for weights of a dtype, or None where it cannot be had."""
    library = _had("token.c", dtype)
    return Token(library) if library else None


def _had(source: str, dtype: torch.dtype) -> ctypes.CDLL | None:
    if dtype not in KINDS or os.environ.get("BDH_NATIVE") == "0" or sys.platform != "linux" or sys.byteorder != "little":
        return None
    try:
        return _library(source, KINDS[dtype])
    except (OSError, subprocess.SubprocessError) as error:
        log.info("%s is not used, PyTorch's operations are: %s", source, error)
        return None


def _library(source: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    """Load what was compiled before, or compile it now."""
    path = Path(__file__).with_name(source)
    command = [*shlex.split(os.environ.get("CC", "cc")), *FLAGS, *flags]
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True, timeout=PATIENCE).stdout
    what = b"\0".join([path.read_bytes(), version, _processor(), *(part.encode() for part in command)])
    name, folder = f"{path.stem}-{hashlib.sha256(what).hexdigest()[:32]}.so", _folder()
    if folder:
        with suppress(OSError):  # it is not there, or has been damaged
            return ctypes.CDLL(str(folder / name))
    with tempfile.TemporaryDirectory(dir=folder) as room:
        new = Path(room) / name
        subprocess.run([*command, str(path), "-o", str(new)], capture_output=True, check=True, timeout=PATIENCE)
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


class Token:
    """What one token reads large memory for: see ``decode``."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._through = _function(library.through, *[pointer] * 4, *[size] * 6)
        self._weighted_sum = _function(library.weighted_sum, *[pointer] * 3, *[size] * 4)

    def through(self, state: Tensor, rotated: Tensor, v: Tensor) -> Tensor:
        """Attention (G, 1, D) of rotated neurons (G, 1, N) and values (B, 1, D) by a state (G, N, D); then that remembers them.

        The state and the neurons are float32, and lie in the order of their axes.
        """
        G, N, D = state.shape
        v, pieces = v.to(state.dtype).contiguous(), -(-N // ROWS)
        attention = state.new_zeros(G, pieces, D)
        pointers = (values.data_ptr() for values in (state, rotated, v, attention))
        self._through(*pointers, G, len(v), N, D, pieces, ROWS)
        return attention.sum(1, keepdim=True)

    def weighted_sum(self, weights: Tensor, factors: Tensor) -> Tensor:
        """The sum (K) in float32 of weights (R, K), which lie in the order of their axes, each row by its factor (R)."""
        (R, K), factors = weights.shape, factors.to(torch.float32).contiguous()
        pieces = -(-R // ROWS)
        sums = factors.new_zeros(pieces, K)
        self._weighted_sum(weights.data_ptr(), factors.data_ptr(), sums.data_ptr(), R, K, pieces, ROWS)
        return sums.sum(0)
