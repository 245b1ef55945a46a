"""The dtypes that weights can have, and what they are called: one table, so that one word means one thing everywhere."""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np


class DType(NamedTuple):
    """A dtype of weights."""

    name: str  # in this project, NumPy, PyTorch, JAX and MLX
    short: str  # in Rust, and in capitals in safetensors
    synonyms: tuple[str, ...]  # on command lines, beside these two
    numpy: np.dtype[Any]


TABLE = (
    DType("float32", "f32", ("fp32", "float"), np.dtype("<f4")),
    DType("float64", "f64", ("fp64", "double"), np.dtype("<f8")),
    DType("bfloat16", "bf16", (), np.dtype(ml_dtypes.bfloat16)),
    DType("float16", "f16", ("fp16", "half"), np.dtype("<f2")),
)
DTYPES = tuple(kind.name for kind in TABLE)
WIDE = ("float32", "float64")  # the others are narrow
SYNONYMS = {word: kind.name for kind in TABLE for word in (kind.short, *kind.synonyms)}


def dtype_name(word: str) -> str:
    """The full name of a dtype, or the word itself where it is none of its short ones.

    >>> dtype_name("BF16"), dtype_name("int8")
    ('bfloat16', 'int8')
    """
    return SYNONYMS.get(word.lower(), word.lower())


def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype of that name, bfloat16 included."""
    return next(kind.numpy for kind in TABLE if kind.name == name)
