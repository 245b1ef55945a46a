"""The canonical checkpoint: one safetensors file that describes itself. And the recurrent state, likewise."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bdh_spec.checks import check_recurrent_state, check_tokens
from bdh_spec.config import BDHConfig
from bdh_spec.errors import CheckpointError
from bdh_spec.files import read_safetensors, reading, shown, write_safetensors
from bdh_spec.int8 import AXES, SCALE, Int8, are_int8, check_int8
from bdh_spec.model import RecurrentState
from bdh_spec.params import Array, Params, check_params
from bdh_spec.rope import Frequencies

SPEC_VERSION = "1.0"
FORMAT, INT8_FORMAT, STATE_FORMAT = "bdh", "bdh-int8", "bdh-state"
FREQS = "freqs"  # the tensor (N,) of a model that brings its own frequencies
EMBEDDED = Path(__file__).parent / "checkpoints" / "hatchling.safetensors"


def save(path: str | Path, params: Params, config: BDHConfig) -> None:
    """Write the five weights in the dtype they have, or in int8, and the model's own frequencies if it brings any.

    The whole configuration stands in the file's metadata.
    """
    check_int8(check_params(params, config))
    own = {} if config.freqs is None else {FREQS: config.freqs.array}
    weights = tensors_of(params) if are_int8(params) else params._asdict()
    write_safetensors(Path(path), {**weights, **own}, metadata(config, INT8_FORMAT if are_int8(params) else FORMAT))


def tensors_of(params: Params) -> dict[str, Array]:
    """The tensors of weights in int8 by their names in a file."""
    values = {name: weight.values for name, weight in params._asdict().items()}
    return values | {f"{name}{SCALE}": weight.scale for name, weight in params._asdict().items()}


def read(path: str | Path) -> tuple[Params, BDHConfig]:
    """The weights and the configuration of a canonical checkpoint: those in int8 (R17) as they are."""
    with reading(Path(path)):
        tensors, about = read_safetensors(Path(path))
        is_int8 = about.get("format") == INT8_FORMAT
        _demand_format(path, about, INT8_FORMAT if is_int8 else FORMAT)
        own = tensors.pop(FREQS, None)
        wanted = [*Params._fields, *(f"{name}{SCALE}" for name in Params._fields if is_int8)]
        if set(tensors) != set(wanted):
            names = shown(", ".join(sorted(tensors)), 200)
            raise CheckpointError(f"{path} holds {names}: a canonical file holds {', '.join(wanted)}")
        config = BDHConfig.from_dict(json.loads(about["config"]))
        if own is not None:
            config = replace(config, freqs=Frequencies(own))
        params = int8_of(tensors) if is_int8 else Params(**tensors)
        return check_int8(check_params(params, config)), config


def int8_of(tensors: Mapping[str, Array]) -> Params:
    """The weights in int8 of a file's tensors."""
    axes = AXES._asdict().items()
    return Params(*(Int8(tensors[name], tensors[f"{name}{SCALE}"], axis) for name, axis in axes))


def metadata(config: BDHConfig, kind: str = FORMAT) -> dict[str, str]:
    """What a canonical file says of itself."""
    return {"format": kind, "spec_version": SPEC_VERSION, "config": json.dumps(config.as_dict())}


def save_state(path: str | Path, state: RecurrentState, config: BDHConfig, model: str, pending: Array) -> None:
    """Write a state, the fingerprint of its model and the tokens (B, P) that are written but not yet read."""
    about = metadata(config, STATE_FORMAT) | {"model": model, "position": str(state.position)}
    layers = {f"layers.{i}.state": memory for i, memory in enumerate(state.layers)}
    write_safetensors(Path(path), {**layers, "pending": pending}, about)


def read_state(path: str | Path, config: BDHConfig, model: str) -> tuple[RecurrentState, Array]:
    """A saved state and its pending tokens, if it belongs to the model with this fingerprint."""
    with reading(Path(path)):
        tensors, about = read_safetensors(Path(path))
        _demand_format(path, about, STATE_FORMAT)
        theirs = about["model"]
        if theirs != model:
            raise CheckpointError(
                f"{path} is a state of model {theirs[:12]}, this is model {model[:12]}: load the weights it was saved with"
            )
        pending = tensors.pop("pending")
        state = RecurrentState(int(about["position"]), tuple(tensors[f"layers.{i}.state"] for i in range(len(tensors))))
        _demand_numbers(path, check_recurrent_state(state, config), pending, config)
        return state, pending


def _demand_numbers(path: str | Path, state: RecurrentState, pending: Array, config: BDHConfig) -> None:
    """What was saved is floating point memory, and tokens of as many texts."""
    for i, memory in enumerate(state.layers):
        if memory.dtype not in (np.float32, np.float64):
            raise CheckpointError(f"{path} holds layer {i} as {memory.dtype}: a state is float32 or float64, so save it again")
    if pending.shape != (state.batch, pending.shape[-1] if pending.ndim else 0):
        raise CheckpointError(f"{path} holds pending tokens of shape {pending.shape} for {state.batch} texts: save it again")
    if pending.size:
        check_tokens(pending, config)


def _demand_format(path: str | Path, about: dict[str, Any], wanted: str) -> None:
    found = about.get("format")
    if found != wanted:
        raise CheckpointError(f"{path} has format {shown(repr(found), 80)}, wanted {wanted!r}: {_advice(found, wanted)}")
    if about["spec_version"].split(".")[0] != SPEC_VERSION.split(".")[0]:
        raise CheckpointError(
            f"{path} follows specification {about['spec_version']}, this is {SPEC_VERSION}: use a release that reads it"
        )


def _advice(found: str | None, wanted: str) -> str:
    if wanted == STATE_FORMAT:
        return "a state is what --save-state wrote, and weights are named as the checkpoint"
    if found == STATE_FORMAT:
        return "it is a saved state, so name the weights that it was saved with"
    return "convert it with bdh-convert"
