"""The frequency table that some dialects store, and whether it is the one that makes a model BDH (R4)."""

from __future__ import annotations

import numpy as np

from bdh_convert.tensors import Tensor
from bdh_spec.config import BDHConfig
from bdh_spec.errors import ParamsError
from bdh_spec.rope import frequencies

# Upstream computes the formula in float32 throughout: 1 / theta^(2 floor(n/2) / N) / (2 pi). Over every even N to 2000 and
# powers of two to 131072 that is at most 8.6 * 2^-24 from the normative table, in torch and in MLX alike: an exponent rounded
# by 2^-25 costs ln(theta) = 11 times that. Four times as much leaves room for the power functions of accelerators, and is far
# from a trained table: one AdamW step at a learning rate of 5e-5 moves the smallest frequency to 20 times itself and the
# largest by 3e-4.
ALLOWED = 32 * 2.0**-24


def table(config: BDHConfig) -> Tensor:
    """The normative table in the shape in which files store it."""
    return Tensor.of("freqs", frequencies(config.n_neurons)).row()


def deviation(stored: Tensor, config: BDHConfig) -> float:
    """The largest relative difference of a stored table from the normative one; NaN counts as infinite."""
    values = stored.load().astype(np.float64).reshape(-1)
    if values.size != config.n_neurons:
        raise ParamsError(
            f"{stored.name} has shape {stored.shape}, config asks for (1, 1, 1, {config.n_neurons}): check"
            " n_embd, n_head and mlp_internal_dim_multiplier"
        )
    wanted = frequencies(config.n_neurons).astype(np.float64)
    worst = float(np.abs(values / wanted - 1).max())
    return float("inf") if np.isnan(worst) else worst


def is_the_table(stored: Tensor, config: BDHConfig) -> bool:
    return deviation(stored, config) <= ALLOWED
