"""Every kind of file and folder that a checkpoint comes in: read it like a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from bdh_convert import burn_file, dcp_folder, hf_folder, npz_file, pickle_file, run_folder, safetensors_file
from bdh_convert.raw import is_zip
from bdh_convert.tensors import Contents, Tensor
from bdh_spec.errors import CheckpointError
from bdh_spec.files import check_readable, reading, whole_file

Write: TypeAlias = Callable[[Path, Iterable[Tensor], Mapping[str, str]], None]


class Whole(Protocol):
    """Something to fill beside a path, which it becomes as a whole or not at all."""

    def __call__(self, path: Path, *, replace: bool) -> AbstractContextManager[Path]: ...


@dataclass(frozen=True)
class Container:
    """One way to keep tensors on a disk."""

    name: str
    looks_like: Callable[[Path], bool]  # by its content and never by its name
    read: Callable[[Path], Contents]
    suffixes: tuple[str, ...] = ()  # of those that we write, the default first
    write: Write | None = None
    whole: Whole = whole_file

    @property
    def writer(self) -> Write:
        """How to write one, of those that we write."""
        assert self.write is not None
        return self.write


def refused(reason: str) -> Callable[[Path], Contents]:
    """A reader of what nobody here reads."""

    def read(path: Path) -> Contents:
        raise CheckpointError(f"{path} is {reason}")

    return read


def is_of_old_torch(path: Path) -> bool:
    """Whether a file starts with the number by which torch knew its own before 1.6."""
    if not is_bare_pickle(path):
        return False
    with path.open("rb") as file:
        return OLD_TORCH in file.read(32)


def is_bare_pickle(path: Path) -> bool:
    """Whether a file starts as pickles do that are in no archive."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(2)
    return start[:1] == b"\x80" and start[1:] in (b"\x02", b"\x03", b"\x04", b"\x05")


OLD_TORCH = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
BARE = "a bare pickle, such as torch wrote before 1.6: torch.load it and torch.save it again"
PICKLED = "a bare pickle by another than torch: load it where you trust it, and torch.save a dict of torch tensors"
ADAPTER = "a LoRA adapter without the weights that it changes: merge_and_unload() it and save_pretrained the model"
OTHER_ZIP = "a zip archive without tensors of torch or NumPy: name a checkpoint"
OTHER = "no checkpoint that anyone here reads: there are safetensors, .pt, .npz and burn's .bin"

# The first that a path looks like is the one it is.
CONTAINERS = (
    Container("safetensors", safetensors_file.looks_like, safetensors_file.read, (".safetensors",), safetensors_file.write),
    Container("pt", pickle_file.looks_like, pickle_file.read, (".pt", ".pth"), pickle_file.write),
    Container("npz", npz_file.looks_like, npz_file.read, (".npz",), npz_file.write),
    Container("zip", is_zip, refused(OTHER_ZIP)),
    Container("old-pt", is_of_old_torch, refused(BARE)),
    Container("pickle", is_bare_pickle, refused(PICKLED)),
    Container("burn", burn_file.looks_like, burn_file.read),
    Container("file", Path.is_file, refused(OTHER)),
    Container("dcp", dcp_folder.looks_like, dcp_folder.read),
    Container("hf", hf_folder.looks_like, hf_folder.read, ("",), hf_folder.write, hf_folder.whole_folder),
    Container("deepspeed", run_folder.is_deepspeed, run_folder.read_deepspeed),
    Container("adapter", run_folder.is_adapter, refused(ADAPTER)),
)
WRITTEN = {container.name: container for container in CONTAINERS if container.write}


def read(path: Path) -> Contents:
    """What a file holds, or a folder, or the one checkpoint in a folder of other things."""
    with reading(path):
        if not path.is_dir():
            check_readable(path)
        found = _row(path)
        return found.read(path) if found else run_folder.read_only_one(path, _read_entry)


def _read_entry(path: Path) -> Contents:
    """An entry of a folder, in which no further one is looked for."""
    with reading(path):
        found = _row(path)
        if found is None or (path.is_file() and not path.stat().st_size):
            raise CheckpointError(f"{path} is no checkpoint: name another")
        return found.read(path)


def _row(path: Path) -> Container | None:
    return next((container for container in CONTAINERS if container.looks_like(path)), None)
