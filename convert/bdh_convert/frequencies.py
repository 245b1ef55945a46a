"""The frequency table that some dialects store, and whether it is the one that makes a model BDH (R4)."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

from bdh_convert.tensors import FLOATS, Tensor
from bdh_spec import rope, stored_table
from bdh_spec.config import BDHConfig
from bdh_spec.errors import ConfigError, ParamsError
from bdh_spec.params import Array
from bdh_spec.rope import Frequencies


def table(config: BDHConfig, freqs: Frequencies | None) -> Tensor:
    """The normative table or a model's own, float32 (N,)."""
    return Tensor.of("freqs", rope.frequencies(config.n_neurons) if freqs is None else freqs.array)


def values_of(stored: Tensor, config: BDHConfig) -> Array:
    """The numbers of a stored table, float32 (N,)."""
    demand_table(stored, config)
    with np.errstate(over="ignore"):
        return stored.load().reshape(-1).astype(np.float32)


def as_frequencies(name: str, values: Array) -> Frequencies:
    """A stored table as a model's own."""
    try:
        return Frequencies(values)
    except ConfigError as error:
        raise ParamsError(f"{name} is no table that a model can turn by: {error}") from None


def deviation(stored: Tensor, config: BDHConfig) -> float:
    """The largest relative difference of a stored table from the normative one; NaN counts as infinite."""
    demand_table(stored, config)
    values, wanted = (f.astype(np.float64).reshape(-1) for f in (stored.load(), rope.frequencies(config.n_neurons)))
    worst = float(np.abs(values / wanted - 1).max())
    return float("inf") if np.isnan(worst) else worst


def demand_table(stored: Tensor, config: BDHConfig) -> None:
    """Refuse a table of another number of neurons, or of what are no fractions."""
    if math.prod(stored.shape) != config.n_neurons:
        raise ParamsError(
            f"{stored.name} has shape {stored.shape}, config asks for (1, 1, 1, {config.n_neurons}): check"
            " n_embd, n_head and mlp_internal_dim_multiplier"
        )
    if stored.dtype not in FLOATS:
        raise ParamsError(f"{stored.name} has dtype {stored.dtype}: frequencies are floating point numbers")


def is_the_table(stored: Tensor, config: BDHConfig) -> bool:
    """Whether a stored table is BDH's, as rounded by the dtype it is stored in."""
    demand_table(stored, config)
    kind = ml_dtypes.finfo(stored.dtype)  # type: ignore[no-untyped-call]  # ml_dtypes leaves it untyped
    return stored_table.is_the_table(stored.load().reshape(-1), float(kind.eps), float(kind.smallest_subnormal))
