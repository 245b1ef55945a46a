"""Weights in int8 (R17): two tensors of a file, values and scales, that are one weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bdh_convert.tensors import F32, Tensor
from bdh_spec.errors import ParamsError
from bdh_spec.int8 import AXES, SCALE, Int8, check_layout, check_scale, check_values, dequantised, round_weight, scale_shape
from bdh_spec.params import Params

I8 = np.dtype(np.int8)


@dataclass(frozen=True)
class Scaled(Tensor):
    """A weight in int8, which is one of float32 to whoever loads it."""

    values: Tensor
    scale: Tensor

    @classmethod
    def of_two(cls, name: str, values: Tensor, scale: Tensor) -> Scaled:
        """A weight, of our name, out of what a file holds for it."""

        def fetch() -> Any:
            return dequantised(loaded(name, values, scale), F32)

        return cls(name, values.shape, F32, fetch, values, scale)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    @property
    def stored_as(self) -> str:
        return I8.name

    def load_int8(self) -> Int8:
        """The weight as it is."""
        return loaded(self.name, self.values, self.scale)

    def parts(self) -> list[Tensor]:
        return [self.values, self.scale]

    def transposed(self) -> Tensor:
        return self._plain().transposed()

    def cast(self, dtype: np.dtype[Any]) -> Tensor:
        return self._plain().cast(dtype)

    def _plain(self) -> Tensor:
        """The same as a tensor of float32, of which nothing else is known."""
        return Tensor(self.name, self.shape, self.dtype, self.fetch)


def loaded(name: str, values: Tensor, scale: Tensor) -> Int8:
    """A weight out of what a file holds for it, refused where that is none."""
    weight = Int8(values.load(), scale.load(), getattr(AXES, name))
    check_scale(name, weight.scale, weight.shape)
    check_values(name, weight.values)
    return weight


def in_int8(weight: Tensor) -> Scaled:
    """A weight that is rounded to int8 whenever it is read."""
    name = weight.name
    values = Tensor(name, weight.shape, I8, lambda: round_weight(name, weight.load()).values)
    scale = Tensor(f"{name}{SCALE}", scale_shape(name, weight.shape), F32, lambda: round_weight(name, weight.load()).scale)
    return Scaled.of_two(name, values, scale)


def speaks_int8(tensors: Mapping[str, Tensor]) -> bool:
    """Whether tensors under the canonical names hold anything of a model in int8."""
    named = [tensors[name] for name in Params._fields if name in tensors]
    return any(tensor.dtype == I8 for tensor in named) or any(f"{name}{SCALE}" in tensors for name in Params._fields)


def join(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a file in int8, each weight with its scales one of them, and what is wrong with those that cannot be."""
    joined, wrong = dict(tensors), []
    for name in Params._fields:
        values, scale = joined.get(name), joined.pop(f"{name}{SCALE}", None)
        if values is None:  # which is noticed where weights are named
            continue
        try:
            joined[name] = joined_weight(name, values, scale)
        except ParamsError as error:
            wrong.append(str(error))
    return joined, wrong


def joined_weight(name: str, values: Tensor, scale: Tensor | None) -> Scaled:
    """One weight with its scales, which are few and so looked at right away."""
    if values.dtype != I8:
        raise ParamsError(f"{name} has dtype {values.dtype} in a file of weights in int8: all five are, or none")
    if scale is None:
        raise ParamsError(f"{name} is int8, and no tensor is named {name}{SCALE}: nobody can tell what its values stand for")
    check_layout(name, scale, values.shape)
    check_scale(name, scale.load(), values.shape)
    return Scaled.of_two(name, values, scale)
