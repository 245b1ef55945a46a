"""A run on disk: weights, optimiser and progress in one safetensors file that knows whether it is whole.

The weights bear their usual names, so that every tool of this project reads such a file as the checkpoint that it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import safetensors

from bdh_spec import AdamW, BDHConfig, CheckpointError, Frequencies, OptimizerState, Params
from bdh_spec.checkpoint import FREQS, metadata
from bdh_spec.files import read_safetensors, write_safetensors
from bdh_spec.params import Array

PROGRESS, CHECKSUM = "training", "sha256"
MOMENTS = ("first", "second")


@dataclass
class Progress:
    """Where a run is. Data and dropout need no more than the step: both depend on it and the seed alone."""

    step: int = 0  # steps made
    best_loss: float | None = None  # on held-out text
    best_step: int = 0
    best_print: str = ""  # the fingerprint of the best weights
    misses: int = 0  # measures since the best
    has_given_up: bool = False  # getting better
    port: str = ""  # that made the last step, and on what
    data: str = ""  # the fingerprint of the text it learns from


@dataclass(frozen=True)
class Checkpoint:
    """What is saved: enough to go on as if nothing had happened."""

    params: Params  # not rounded, where the model's are
    optimizer: OptimizerState
    progress: Progress


def save(path: Path, checkpoint: Checkpoint, config: BDHConfig) -> None:
    """Write a checkpoint whole, with its checksum."""
    state = checkpoint.optimizer
    tensors = checkpoint.params._asdict()
    for which, five in zip(MOMENTS, (state.first, state.second), strict=True):
        tensors |= {f"optimizer.{which}.{name}": values for name, values in five._asdict().items()}
    if config.freqs is not None:
        tensors[FREQS] = config.freqs.array
    said = {"progress": asdict(checkpoint.progress), "optimizer": asdict(state.settings) | {"step": state.step}}
    about = metadata(config) | {PROGRESS: json.dumps(said)}
    write_safetensors(path, tensors, about | {CHECKSUM: checksum(tensors, about)})


def load(path: Path) -> tuple[Checkpoint, BDHConfig]:
    """A checkpoint that is whole; a CheckpointError of one that is not."""
    tensors, about = read_safetensors(path)
    if about.pop(CHECKSUM, None) != checksum(tensors, about):
        raise CheckpointError(f"{path} does not hold what was written (its checksum differs): use the one before it")
    said = json.loads(about[PROGRESS])
    settings, params = said["optimizer"], Params(*(tensors[name] for name in Params._fields))
    first, second = (Params(*(tensors[f"optimizer.{which}.{name}"] for name in Params._fields)) for which in MOMENTS)
    step = settings.pop("step")
    adamw = AdamW(**(settings | {name: tuple(settings[name]) for name in ("betas", "frozen")}))
    state = OptimizerState(adamw, step, first, second, masters=params)
    own = Frequencies(tensors[FREQS]) if FREQS in tensors else None
    config = replace(BDHConfig.from_dict(json.loads(about["config"])), freqs=own)
    return Checkpoint(params, state, Progress(**said["progress"])), config


def best_step(path: Path) -> int:
    """The step of the best weights, as a checkpoint knows it; 0 of one that cannot be read."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return int(json.loads(file.metadata()[PROGRESS])["progress"]["best_step"])
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError):
        return 0


def checksum(tensors: Mapping[str, Array], about: Mapping[str, str]) -> str:
    """The SHA-256 of all that a file says and holds."""
    digest = hashlib.sha256(json.dumps(dict(sorted(about.items()))).encode())
    for name in sorted(tensors):
        values = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(values.data)
    return digest.hexdigest()
