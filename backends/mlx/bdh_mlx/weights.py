"""The files of this dialect: names with dots in safetensors, names with underscores in what the older trainer wrote."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from bdh_spec.checkpoint import SPEC_VERSION
from bdh_spec.config import BDHConfig
from bdh_spec.errors import CheckpointError, OwnFrequenciesWarning, ParamsError
from bdh_spec.files import check_readable, whole_file
from bdh_spec.params import Params, check_params, shapes
from bdh_spec.rope import Frequencies, frequencies
from bdh_spec.stored_table import is_the_table

NAMES = Params("embed.weight", "encoder", "encoder_v", "decoder", "lm_head")
FREQUENCIES, GATE = "attn.freqs", "lm_gate"
TRAINER = {"embed_weight": "embed.weight", "attn_freqs": FREQUENCIES}  # the older trainer saved with _ for .
PROGRESS = ("step", "loss")  # and these beside them


def load(path: str | Path) -> dict[str, mx.array]:
    """The arrays of a ``.safetensors`` or ``.npz`` file by name."""
    check_readable(Path(path))
    try:
        arrays = mx.load(str(path))
    except (RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is no whole .safetensors or .npz file ({error}): copy or convert it again") from error
    if not isinstance(arrays, dict):
        raise CheckpointError(f"{path} is one array without a name: a checkpoint is a .safetensors or .npz file")
    return arrays


def save(path: str | Path, arrays: Mapping[str, mx.array], config: BDHConfig) -> None:
    """Write the arrays, and the model's own frequencies if it has any, under the final name only when all are on disk."""
    own = {} if config.freqs is None else {FREQUENCIES: mx.array(config.freqs.array).reshape(1, 1, 1, -1)}
    suffix = Path(path).suffix
    if suffix not in (".safetensors", ".npz"):
        raise CheckpointError(f"{path} ends in {suffix!r}: name a file that ends in .safetensors or .npz")
    about = {"format": "mlx", "spec_version": SPEC_VERSION, "config": json.dumps(config.as_dict())}
    with whole_file(Path(path)) as part, part.open("wb") as file:
        if suffix == ".npz":
            mx.savez(file, **arrays, **own)
        else:
            mx.save_safetensors(file, {**arrays, **own}, about)


def select(
    found: Mapping[str, mx.array], config: BDHConfig, strict: bool = True
) -> tuple[dict[str, mx.array], Frequencies | None]:
    """The weights among ``found``, by the module's names, and the model's own frequencies; what is neither is refused."""
    named = {TRAINER.get(name, name): value for name, value in found.items() if name not in PROGRESS}
    for name, value in named.items():
        if not isinstance(value, mx.array):
            raise ParamsError(f"{name} is a {type(value).__name__}: give an mx.array, such as mx.load returns")
    table = named.pop(FREQUENCIES, None)
    check_gate(named.pop(GATE, None), config)
    if strict and set(named) != set(NAMES):
        raise ParamsError(_names_message(set(named)))
    weights = check_weights({name: named[name] for name in NAMES if name in named}, config)
    return weights, read_frequencies(table, config)


def check_weights(weights: dict[str, mx.array], config: BDHConfig) -> dict[str, mx.array]:
    """Refuse weights whose shapes or dtypes do not fit the configuration; one that is absent fits."""
    check_params(Params(*map(_outline, map(weights.get, NAMES), shapes(config))), config)
    return weights


def read_frequencies(found: mx.array | None, config: BDHConfig) -> Frequencies | None:
    """The model's own frequencies after loading: those of the file if it holds any, none where they are BDH's table.

    The older port trained them by accident. Such a model computes by what it trained, and says so.
    """
    if found is None:
        return config.freqs
    table = frequencies(config.n_neurons)
    if found.size != table.size:
        raise ParamsError(
            f"{FREQUENCIES} has {found.size} values, config asks for {table.size}: check n_embd, n_head and"
            " mlp_internal_dim_multiplier"
        )
    if not mx.issubdtype(found.dtype, mx.floating):
        raise ParamsError(f"{FREQUENCIES} has dtype {found.dtype}: frequencies are floating point numbers")
    values, kind = np.array(found.astype(mx.float32)).reshape(-1), mx.finfo(found.dtype)
    if not np.isfinite(values).all():
        n = int(np.argmin(np.isfinite(values)))
        raise ParamsError(f"{FREQUENCIES} is {values[n]} at [{n}], by which nothing can turn: mend the file")
    if is_the_table(values, kind.eps, kind.smallest_normal * kind.eps):
        return None
    own = Frequencies(values)
    if own != config.freqs:
        off = np.abs(values / table - 1)
        n = int(np.argmax(off))
        warnings.warn(
            f"{FREQUENCIES} is not the table of R4: {values[n]:.8g} at [{n}] instead of {table[n]:.8g}, so it was trained; this"
            " model computes by it, and bdh-convert --freqs reset puts BDH's table back",
            OwnFrequenciesWarning,
            stacklevel=4,
        )
    return own


def check_gate(found: mx.array | None, config: BDHConfig) -> None:
    """Refuse a gate of another shape than the one that early versions carried and never used."""
    if found is not None and tuple(found.shape) != (config.n_embd, 1):
        raise ParamsError(f"{GATE} has shape {tuple(found.shape)}, the unused one of early versions ({config.n_embd}, 1)")


def _outline(weight: mx.array | None, shape: tuple[int, ...]) -> Any:
    """Shape and kind of a weight as an array that can be checked, of ``shape`` where there is no weight."""
    if weight is None:
        return np.broadcast_to(np.float32(0), shape)
    return np.broadcast_to(np.float32(0) if mx.issubdtype(weight.dtype, mx.floating) else np.int64(0), weight.shape)


def _names_message(names: set[str]) -> str:
    missing, unknown = sorted(set(NAMES) - names), sorted(names - set(NAMES))
    parts = [f"{what} {', '.join(which)}" for what, which in (("lack", missing), ("have the unknown", unknown)) if which]
    return f"the weights {' and '.join(parts)}: this port reads {', '.join(NAMES)}; convert other files with bdh-convert"
