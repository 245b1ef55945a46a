"""Checkpoints of training runs, as they lie on a disk."""

from __future__ import annotations

import re
from pathlib import Path


def checkpoints_in(path: Path) -> list[Path]:
    """A checkpoint itself; of the folder of a run (bdh-train's, or Trainer's) its checkpoints by step, and then its model."""
    saved = [*path.glob("checkpoints/*.safetensors"), *path.glob("checkpoint-*/")]
    by_step = {step: one for one in sorted(saved) if (step := step_in(one)) is not None}
    if not by_step:
        return [path]
    model = path / "model.safetensors"
    return [*(by_step[step] for step in sorted(by_step)), *([model] if model.is_file() else [])]


def step_in(checkpoint: Path) -> int | None:
    """The step that the name of a checkpoint tells: the last number in it."""
    numbers = re.findall(r"\d+", checkpoint.name.removesuffix(".safetensors"))
    return int(numbers[-1]) if numbers else None


def label(checkpoint: Path) -> str:
    """What a plot calls a checkpoint: its step, or else its name."""
    step = step_in(checkpoint)
    return checkpoint.name if step is None else f"{step:,}"
