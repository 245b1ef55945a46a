"""R17: weights in int8, with a float32 scale for each column.

A column is what one output is summed from, so that a scale may be taken out of the sum: a neuron's D weights of ``encoder`` or
``encoder_v``, a feature's nh*N of the decoder, a token's D of ``lm_head``. Of ``embed``, where a row is looked up and nothing
summed, it is the row, which the norm makes as long as any other: what rounding does to it must not depend on longer ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bdh_spec.errors import ParamsError
from bdh_spec.params import Array, Params

MOST = 127  # of a column's values, in size: -128 stands for nothing
AXES = Params(embed=1, encoder=1, encoder_v=1, decoder=0, lm_head=0)  # of each weight, the one along which a scale is shared
SCALE = ".scale"  # ends the name of a weight's scales


@dataclass(frozen=True, eq=False)
class Int8:
    """A weight in int8. To whoever takes it for an array it is one of float32, made anew each time.

    >>> half = Int8(np.array([[-127, 64]], np.int8), np.array([0.5], np.float32), 1)
    >>> np.asarray(half)
    array([[-63.5,  32. ]], dtype=float32)
    """

    values: Array  # int8, in the shape of the weight
    scale: Array  # float32, in that shape without ``axis``
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """What it is to others."""
        return np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("a weight in int8 is no array of floating point numbers: let it be copied into one")
        return dequantised(self, self.dtype if dtype is None else dtype)


def dequantised(weight: Int8, dtype: npt.DTypeLike) -> Array:
    """Each value times its column's scale: exact in float64, rounded once in float32."""
    wide = np.result_type(dtype, np.float32)
    return (weight.values.astype(wide) * np.expand_dims(weight.scale, weight.axis)).astype(dtype)


def widened(params: Params, dtype: npt.DTypeLike = np.float32) -> Params:
    """The same weights without any in int8."""
    return Params(*(dequantised(weight, dtype) if isinstance(weight, Int8) else weight for weight in params))


def are_int8(params: Params) -> bool:
    """Whether weights are in int8: all five are, or none."""
    return all(isinstance(weight, Int8) for weight in params)


def rounded(params: Params) -> Params:
    """Weights in int8 that are nearest to these.

    A column's scale is its largest size over 127, so that a column of zeros has the scale 0.
    """
    return Params(*(round_weight(name, weight) for name, weight in params._asdict().items()))


def round_weight(name: str, weight: Array) -> Int8:
    """One weight in int8: by way of float64, so that everybody who rounds gets the same bytes."""
    wide, axis = np.asarray(weight, np.float64), getattr(AXES, name)
    if not np.isfinite(wide).all():
        where = tuple(map(int, np.argwhere(~np.isfinite(wide))[0]))
        raise ParamsError(f"{name} holds {wide[where]} at {list(where)}, which int8 cannot: mend the weights first")
    with np.errstate(over="ignore"):
        scale = (np.abs(wide).max(axis) / MOST).astype(np.float32)
    if not np.isfinite(scale).all():
        raise ParamsError(
            f"{name} holds {np.abs(wide).max():g}, and a scale of float32 ends at 3.4e+38: scale the weights down"
        )
    unit = np.expand_dims(scale, axis).astype(np.float64)
    values = np.rint(np.divide(wide, unit, out=np.zeros_like(wide), where=unit > 0))  # ties to even
    return Int8(values.clip(-MOST, MOST).astype(np.int8), scale, axis)  # a scale below float32's normal numbers is coarse


def check_int8(params: Params) -> Params:
    """Refuse weights of which only some are in int8, or whose values and scales are none of R17."""
    if (kept := [name for name, weight in params._asdict().items() if not isinstance(weight, Int8)]) and len(kept) < len(
        params
    ):
        raise ParamsError(f"{kept[0]} is no weight in int8, and others are: round all five or none")
    for name, weight in params._asdict().items():
        if isinstance(weight, Int8):
            check_scale(name, weight.scale, weight.shape)
            check_values(name, weight.values)
    return params


def check_values(name: str, values: Array) -> None:
    """Refuse values (any shape) of another type, or the one that no rounding gives."""
    if values.dtype != np.int8:
        raise ParamsError(f"{name} has values of {values.dtype}: a weight in int8 has whole numbers from -127 to 127")
    if values.size and values.min() < -MOST:
        where = list(map(int, np.argwhere(values < -MOST)[0]))
        raise ParamsError(f"{name} holds -128 at {where}: values in int8 run from -127 to 127, so round the weights again")


def check_scale(name: str, scale: Array, shape: tuple[int, ...]) -> None:
    """Refuse scales of a weight of this shape that are too many or too few, of another type, or no sizes."""
    check_layout(name, scale, shape)
    if (wrong := ~((scale >= 0) & (scale < np.inf))).any():
        where = tuple(map(int, np.argwhere(wrong)[0]))
        raise ParamsError(f"{name}{SCALE} holds {scale[where]:g} at {list(where)}: a scale is finite and not below zero")


def check_layout(name: str, scale: Any, shape: tuple[int, ...]) -> None:
    """The same of scales that may still be in a file, as far as their shape and dtype tell."""
    wanted = scale_shape(name, shape)
    if scale.shape != wanted:
        raise ParamsError(f"{name}{SCALE} has shape {scale.shape}, {name} asks for {wanted}: give one scale for each column")
    if scale.dtype != np.float32:
        raise ParamsError(f"{name}{SCALE} has dtype {scale.dtype}: scales are float32")


def scale_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """How many scales a weight of this name and shape has.

    >>> scale_shape("encoder", (4, 256, 8192)), scale_shape("decoder", (32768, 256))
    ((4, 8192), (256,))
    """
    axis = getattr(AXES, name)
    return (*shape[:axis], *shape[axis + 1 :])
