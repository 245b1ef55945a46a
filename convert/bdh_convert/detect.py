"""What kind of file a path is, by its content and never by its name, and what its tensors are called without wrappings."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from bdh_convert import burn_file, hf_folder, npz_file, pickle_file, safetensors_file
from bdh_convert.tensors import Contents
from bdh_spec.errors import CheckpointError, ParamsError
from bdh_spec.files import check_readable

WRAPPINGS = {"_orig_mod", "module"}  # what torch.compile and DistributedDataParallel put into names
LIGHTNING = "model."  # what a training wrapper puts before all of them
FREQS = re.compile(r"(.*\.)?attns?\.(\d+\.)?freqs")
BOOKKEEPING = re.compile(r"step|loss|epoch|iteration|(optimizer|optim|opt_state|opt)[._].*")

# What the name of a tensor tells of another model.
OTHERS = (
    (re.compile(r".*alibi.*"), "alibi"),
    (re.compile(r"(.*\.)?(layers|blocks|encoders?|encoders?_v|decoders?)\.\d+(\..*)?"), "weights per layer"),
    (re.compile(r"(.*\.)?(ln|norm|layer_?norm)\w*\.(weight|bias|gamma|beta|scale)"), "affine norms"),
    (re.compile(r".*bias"), "biases"),
    (re.compile(r"(.*\.)?(wpe|pos_?emb\w*|position_emb\w*)(\..*)?"), "learned positions"),
)


def contents(path: Path) -> Contents:
    """What a file or folder holds, its tensors under plain names."""
    found = _container(path)
    kept = {name: tensor for name, tensor in found.tensors.items() if not BOOKKEEPING.fullmatch(name)}
    ignored = (*found.ignored, *(name for name in found.tensors if name not in kept))
    plain = plain_names(kept)
    return replace(found, tensors={plain[name]: tensor.named(plain[name]) for name, tensor in kept.items()}, ignored=ignored)


def _container(path: Path) -> Contents:
    if path.is_dir():
        return hf_folder.read(path)
    check_readable(path)
    with path.open("rb") as file:
        start = file.read(4)
    if safetensors_file.looks_like(path):
        return safetensors_file.read(path)
    if start == b"PK\x03\x04":
        return _zipped(path)
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04"):
        raise CheckpointError(f"{path} is a bare pickle, such as torch wrote before 1.6: torch.load it and torch.save it again")
    if burn_file.looks_like(path):
        return burn_file.read(path)
    raise CheckpointError(f"{path} is no checkpoint that anyone here reads: there are safetensors, .pt, .npz and burn's .bin")


def _zipped(path: Path) -> Contents:
    if pickle_file.looks_like(path):
        return pickle_file.read(path)
    if npz_file.looks_like(path):
        return npz_file.read(path)
    raise CheckpointError(f"{path} is a zip archive without tensors of torch or NumPy: name a checkpoint")


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Each name without what compilers, parallel wrappers and trainers put around it."""
    plain = {name: ".".join(part for part in name.split(".") if part not in WRAPPINGS) for name in names}
    while plain and all(name.startswith(LIGHTNING) for name in plain.values()):
        plain = {name: short.removeprefix(LIGHTNING) for name, short in plain.items()}
    if len(set(plain.values())) < len(plain):
        twice = next(short for short in plain.values() if list(plain.values()).count(short) > 1)
        raise ParamsError(f"the file holds {twice} more than once, in different wrappings: remove all but one")
    return plain


def complain(unknown: Iterable[str]) -> str:
    """Why tensors that no dialect has make a file another model's."""
    unknown = list(unknown)
    for pattern, switch in OTHERS:
        if named := [name for name in unknown if pattern.fullmatch(name)]:
            return f"the file holds {named[0]}, a sign of {switch}, which BDH has not: this is another model"
    return f"the file holds {', '.join(unknown[:8])}, which no dialect of BDH has: this is another model"
