"""The folder of a run: its configuration, a line for each step, checkpoints, and what is made of them at the end."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bdh_spec
from bdh_spec import BDHConfig, BDHError, Params
from bdh_spec.files import clear_parts, held, whole_file
from bdh_train import checkpoint
from bdh_train.checkpoint import Checkpoint
from bdh_train.config import TrainConfig, TrainError, as_toml, read_toml

LOCK = ".lock"
MADE_FIRST = ("data", "val", "checkpoints")  # before the configuration, with which a run has begun
Say = Callable[[str], None]


@dataclass(frozen=True)
class RunFolder:
    """Where everything of a run is. Only ``working_in`` gives one out that may be written to, to one process at a time."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model.safetensors"

    def clear(self) -> None:
        """Remove what a run left that was killed before it had begun: it may have been another."""
        for made in MADE_FIRST:
            shutil.rmtree(self.path / made, ignore_errors=True)

    def clear_parts(self) -> None:
        """Remove what a checkpoint was when its writer was killed."""
        clear_parts(self.checkpoints)

    def begin(self, config: TrainConfig) -> None:
        """Make the folder of a new run."""
        self.checkpoints.mkdir(exist_ok=True)
        self.write(self.config, as_toml(config))

    def read_config(self) -> TrainConfig:
        """The configuration that the run was begun with."""
        return TrainConfig(**read_toml(self.config))

    def write(self, path: Path, text: str) -> None:
        """A small file, whole."""
        with whole_file(path) as part:
            part.write_text(text, encoding="utf-8")

    def save(self, found: Checkpoint, config: BDHConfig, keep: int) -> Path:
        """Save a checkpoint, and then let the oldest go."""
        if self.metrics.exists():
            sync(self.metrics)  # no checkpoint may be on the disk before the lines of its steps are
        path = self.checkpoint(found.progress.step)
        checkpoint.save(path, found, config)
        for old in self.saved()[keep:]:
            old.unlink(missing_ok=True)
        wanted = {self.best(checkpoint.best_step(kept)) for kept in self.saved()}  # the run may go on from any of them
        for old in set(self.checkpoints.glob("best-*.safetensors")) - wanted:
            old.unlink(missing_ok=True)
        return path

    def keep_best(self, step: int, params: Params, config: BDHConfig) -> None:
        """Save the weights of a step that is the best so far on held-out text."""
        bdh_spec.save(self.best(step), params, config)

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of a step."""
        return self.checkpoints / f"step-{step:08d}.safetensors"

    def best(self, step: int) -> Path:
        """The weights of a step that was the best on held-out text."""
        return self.checkpoints / f"best-{step:08d}.safetensors"

    def saved(self) -> list[Path]:
        """The checkpoints, the newest first."""
        return sorted(self.checkpoints.glob("step-*.safetensors"), reverse=True)

    def last(self, say: Say) -> tuple[Checkpoint, BDHConfig] | None:
        """The newest checkpoint that is whole. Of each that is not, a sentence."""
        self.clear_parts()
        for path in self.saved():
            try:
                return checkpoint.load(path)
            except (BDHError, KeyError, ValueError) as error:
                say(f"{path.name} is damaged and left out: {error}")
        return None

    def lines(self) -> list[dict[str, Any]]:
        """The steps so far; a last line that was cut short is none."""
        if not self.metrics.exists():
            return []
        found = []
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found

    def rewind(self, step: int) -> None:
        """Forget the lines of steps after this one, which will be made again."""
        kept = [line for line in self.lines() if line["step"] <= step]
        self.write(self.metrics, "".join(f"{json.dumps(line)}\n" for line in kept))

    def note(self, line: dict[str, Any]) -> None:
        """Add the line of a step."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line)}\n")


@contextmanager
def working_in(path: Path, resume: bool) -> Iterator[RunFolder]:
    """The folder of a run that is new, or that is to go on, while no other process works in it."""
    folder = RunFolder(path)
    if resume and not folder.config.is_file():
        raise TrainError(f"{path} holds no run: leave --resume out to begin one, or name its folder with --out")
    if not resume and path.exists() and not is_free(path):
        raise TrainError(f"{path} is not empty: give --resume to go on with the run in it, or another --out")
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    lock = path / LOCK
    lock.touch()
    try:
        with held(lock) as alone:
            if not alone and sys.platform != "win32":  # where nothing can be locked
                raise TrainError(f"another process trains in {path}: wait for it, or give another --out")
            clear_parts(path)
            yield folder
    except (BDHError, OSError):
        if not path.exists():
            raise TrainError(f"{path} was removed while the run was in it: begin another, with --out elsewhere") from None
        raise
    finally:
        if not folder.config.exists():  # no run has begun: leave nothing that looks like one
            folder.clear()
            lock.unlink(missing_ok=True)
            if is_new and path.exists():
                path.rmdir()


def is_free(path: Path) -> bool:
    """Whether a new run may begin here: in an empty folder, or where one was killed before it had begun."""
    if not path.is_dir():
        return False
    names = {entry.name for entry in path.iterdir() if not entry.name.endswith(".part")}
    return not names or (LOCK in names and names <= {LOCK, *MADE_FIRST})


def sync(path: Path) -> None:
    """Wait until the disk holds a file."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
