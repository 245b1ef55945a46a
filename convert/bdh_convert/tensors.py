"""Arrays that are still in their file, so that a checkpoint is handled a tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bdh_convert.raw import chunks
from bdh_spec.dtypes import TABLE, numpy_dtype
from bdh_spec.errors import CheckpointError
from bdh_spec.files import shown
from bdh_spec.params import Array

FLOATS = tuple(kind.numpy for kind in TABLE)
F32, F64, BF16, F16 = map(numpy_dtype, ("float32", "float64", "bfloat16", "float16"))
MOST_AXES = 8


class Unreadable:
    """What a file holds under a name, and what is neither numbers nor a plain value."""

    qualified = "object"  # what to call it in an error

    def is_module(self) -> bool:
        """Whether it is an object around weights."""
        return False


@dataclass(frozen=True)
class Tensor:
    """What a file says of an array, and the way to its values."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fetch: Callable[[], Array]

    def __post_init__(self) -> None:
        if len(self.shape) > MOST_AXES or any(type(size) is not int or not 0 <= size < 2**63 for size in self.shape):
            raise CheckpointError(f"{shown(self.name, 80)} has shape {shown(self.shape, 80)}: that is no array of weights")

    @classmethod
    def of(cls, name: str, array: Array) -> Tensor:
        return cls(name, array.shape, array.dtype, lambda: array)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def stored_as(self) -> str:
        """The dtype that its file has it in, by name."""
        return self.dtype.name

    def load(self) -> Array:
        """The values, C-contiguous."""
        return np.ascontiguousarray(self.fetch())

    def parts(self) -> list[Tensor]:
        """The tensors of a file that it is made of."""
        return [self]

    def named(self, name: str) -> Tensor:
        return replace(self, name=name)

    def transposed(self) -> Tensor:
        """The same matrix with its axes swapped."""
        return replace(self, shape=self.shape[::-1], fetch=lambda: self.fetch().T)

    def row(self) -> Tensor:
        """The same values as (1, 1, 1, N), the shape in which files store a frequency table."""
        shape = (1, 1, 1, math.prod(self.shape))
        return replace(self, shape=shape, fetch=lambda: self.fetch().reshape(shape))

    def cast(self, dtype: np.dtype[Any]) -> Tensor:
        """The same values in another dtype, refused where one of them does not fit."""
        return self if dtype == self.dtype else replace(self, dtype=dtype, fetch=lambda: _narrow(self, dtype))


def _narrow(tensor: Tensor, dtype: np.dtype[Any]) -> Array:
    values = tensor.load()
    cast = np.empty(values.shape, dtype)
    for part, narrow in zip(chunks(values), chunks(cast), strict=True):
        with np.errstate(over="ignore"):
            narrow[:] = part
        if (lost := np.isfinite(part) & ~np.isfinite(narrow)).any():
            raise CheckpointError(
                f"{tensor.name} holds {float(part[lost][0]):g}, beyond {dtype.name}: choose a wider dtype, such as bf16"
            )
    return cast


@dataclass(frozen=True)
class Contents:
    """What a container holds, before anyone asks whose dialect it is."""

    path: Path
    container: str  # the name of its row in containers.py
    tree: Mapping[Any, Any]  # names to tensors; in a pickle to whatever else it holds, and to further mappings
    config: dict[str, Any] | None = None  # as the file's own metadata, or a config.json of its folder, has it
    dialect: str | None = None  # when the file says so itself
    tokenizer: str | None = None  # if its tokens are no bytes: the class that transformers reads them with
    is_ours: bool = False  # whether this project wrote it, so that a table in it is meant
