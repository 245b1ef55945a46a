"""From a file into a pytree, and pytrees that ``jax.export`` can write down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.export
import jax.numpy as jnp

import bdh_spec
from bdh_jax.model import RecurrentState
from bdh_spec.config import BDHConfig
from bdh_spec.params import Params
from bdh_spec.registry import Freqs

# Both are NamedTuples, which jax.export asks to be named once in a process.
jax.export.register_namedtuple_serialization(Params, serialized_name="bdh_spec.Params")
jax.export.register_namedtuple_serialization(RecurrentState, serialized_name="bdh_jax.RecurrentState")


def load(
    path: str | Path, dtype: Any = jnp.float32, *, n_layer: int | None = None, freqs: Freqs | None = None
) -> tuple[Params, BDHConfig]:
    """The weights of a checkpoint of any dialect, and its configuration; ``freqs`` keeps or resets frequencies of its own.

    >>> params, config = load(bdh_spec.checkpoint.EMBEDDED)
    >>> params.encoder.shape, config.n_layer
    ((4, 64, 512), 4)
    """
    params, config = bdh_spec.read(path, n_layer, freqs)
    return Params(*(jnp.asarray(weight, dtype) for weight in params)), config
