"""Arrays, and what the dtypes of weights are called, so that one word means one thing on every command line."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

SYNONYMS = {
    "f64": "float64",
    "fp64": "float64",
    "double": "float64",
    "f32": "float32",
    "fp32": "float32",
    "float": "float32",
    "bf16": "bfloat16",
    "f16": "float16",
    "fp16": "float16",
    "half": "float16",
}


def dtype_name(word: str) -> str:
    """The full name of a dtype, or the word itself where it is none of its short ones.

    >>> dtype_name("BF16"), dtype_name("int8")
    ('bfloat16', 'int8')
    """
    return SYNONYMS.get(word.lower(), word.lower())
