"""Folders that trainers leave behind: DeepSpeed's, and any that holds one checkpoint among other things."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from bdh_convert import pickle_file
from bdh_convert.find import has_weights
from bdh_convert.tensors import Contents
from bdh_spec.errors import BDHError, CheckpointError
from bdh_spec.files import shown

STATES = "mp_rank_*_model_states.pt"  # of DeepSpeed, one for each part of a model that was split
PARTITIONED = "zero_pp_rank_*_model_states.pt"  # of its third stage, where no file holds a whole tensor
ADVICE = "make one file with `python zero_to_fp32.py {folder} {folder}/whole`, a script that DeepSpeed saves beside it"
MOST = 64  # entries of a folder that are looked into
DEEPEST = 2  # folders in folders

Read = Callable[[Path], Contents]


def is_deepspeed(path: Path) -> bool:
    """Whether DeepSpeed wrote a folder, or the one that it calls its latest."""
    return _latest(path) is not None


def is_adapter(path: Path) -> bool:
    """Whether PEFT wrote a folder, without the model."""
    return (path / "adapter_config.json").is_file()


def read_deepspeed(path: Path) -> Contents:
    """The weights of a run whose every process held all of them."""
    folder = _latest(path) or path
    states = sorted(folder.glob(STATES))
    if len(states) != 1 or any(folder.glob(PARTITIONED)):
        raise CheckpointError(f"{path} holds a model in parts, by DeepSpeed: {ADVICE.format(folder=path)}")
    return replace(pickle_file.read(states[0]), path=states[0])


def _latest(path: Path) -> Path | None:
    named = path / "latest"
    folders = [path, path / named.read_text(errors="replace")[:200].strip()] if named.is_file() else [path]
    inside = (folder for folder in folders if folder.parent in (path, path.parent) and folder.is_dir())
    return next((folder for folder in inside if any(folder.glob("*_model_states.pt"))), None)


def read_only_one(path: Path, read: Read) -> Contents:
    """The one checkpoint in a folder, or in folders in it; where there are several the user has to name one."""
    found = list(_checkpoints(path, read, DEEPEST))
    if len(found) == 1:
        return found[0]
    if not found:
        raise CheckpointError(
            f"{path} is a folder without model.safetensors or another checkpoint: name a file in it, or a folder that a trainer"
            " saved"
        )
    names = ", ".join(shown(contents.path.relative_to(path), 60) for contents in found[:8])
    raise CheckpointError(f"{path} holds {len(found)} checkpoints, {names}: name one of them")


def _checkpoints(path: Path, read: Read, depth: int) -> Iterator[Contents]:
    for entry in sorted(path.iterdir())[:MOST]:
        try:
            contents = read(entry)
        except BDHError:
            if entry.is_dir() and depth:
                yield from _checkpoints(entry, read, depth - 1)
            continue
        if has_weights(contents.tree):
            yield contents
