"""The five weights, shared by all layers."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bdh_spec.arrays import Array as Array
from bdh_spec.config import BDHConfig
from bdh_spec.errors import ParamsError
from bdh_spec.rope import Frequencies

INIT_STD = 0.02


class Params(NamedTuple):
    """Weights of a model, or five of anything else, such as their gradients or shapes."""

    embed: Any  # V D
    encoder: Any  # nh D N
    encoder_v: Any  # nh D N
    decoder: Any  # nh*N D
    lm_head: Any  # D V


def shapes(config: BDHConfig) -> Params:
    """The shape of each weight.

    >>> shapes(BDHConfig()).encoder
    (4, 256, 8192)
    """
    V, D, nh, N = config.vocab_size, config.n_embd, config.n_head, config.n_neurons
    return Params((V, D), (nh, D, N), (nh, D, N), (nh * N, D), (D, V))


def count(config: BDHConfig) -> int:
    """The number of trainable values."""
    return sum(int(np.prod(shape)) for shape in shapes(config))


def init(config: BDHConfig, rng: np.random.Generator) -> Params:
    """Fresh float32 weights, normal with standard deviation 0.02."""
    return Params(*(rng.normal(0.0, INIT_STD, shape).astype(np.float32) for shape in shapes(config)))


def cast(params: Params, dtype: npt.DTypeLike) -> Params:
    """The weights in another dtype, C-contiguous: safetensors writes any other layout as garbage."""
    return Params(*(np.ascontiguousarray(weight, dtype=dtype) for weight in params))


def check_params(params: Params, config: BDHConfig) -> Params:
    """Refuse weights whose shapes or dtypes do not fit the configuration."""
    for name, weight, shape in zip(Params._fields, params, shapes(config), strict=True):
        if tuple(np.shape(weight)) != shape:
            raise ParamsError(
                f"{name} has shape {tuple(np.shape(weight))}, config asks for {shape}: check {_sizes_behind(name)}"
            )
        if np.dtype(weight.dtype).kind in "biuc" or np.dtype(weight.dtype).names:
            raise ParamsError(f"{name} has dtype {weight.dtype}: weights are floating point numbers")
    return params


def fingerprint(params: Params, freqs: Frequencies | None = None) -> str:
    """The SHA-256 of the weights as float32, and of the model's own frequencies if it has any.

    The same for every file and port that holds these values.
    """
    digest = hashlib.sha256()
    own = {} if freqs is None else {"freqs": freqs.array}
    for name, values in {**params._asdict(), **own}.items():
        digest.update(f"{name}{np.shape(values)}".encode())
        digest.update(np.ascontiguousarray(values, dtype="<f4").data)
    return digest.hexdigest()


def _sizes_behind(name: str) -> str:
    if name in ("embed", "lm_head"):
        return "vocab_size and n_embd"
    return "n_embd, n_head and mlp_internal_dim_multiplier"
