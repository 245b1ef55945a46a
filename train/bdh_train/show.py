"""What a run shows of itself while it goes: a bar, lines, samples, a curve, and TensorBoard where it is installed."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from bdh_spec.files import shown, whole_file
from bdh_train.measure import BITS

EVERY = 5.0  # seconds between lines where no bar can move


class Talk:
    """Says on stderr what goes on: by a bar on a terminal, by a line now and then elsewhere."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False, markup=False, soft_wrap=True)
        self.bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(20), TextColumn("{task.description}"), console=self.console
        )
        self.val, self.tokens, self.begun, self.said = "", 0, time.perf_counter(), 0.0

    def say(self, sentence: str) -> None:
        """A sentence of its own."""
        self.console.print(shown(sentence, 2000))

    def page(self, text: str) -> None:
        """Lines of our own making."""
        self.console.print(text, style="dim")

    def sample(self, text: bytes) -> None:
        """A sample, line breaks and all."""
        self.console.print(text.decode(errors="replace"), style="dim")

    @contextmanager
    def steps(self, done: int, total: int) -> Iterator[None]:
        """A bar from ``done`` to ``total``."""
        self.begun = time.perf_counter()
        if not self.console.is_terminal or self.console.quiet:
            yield
            return
        with self.bar:
            self.bar.add_task("", total=total, completed=done)
            yield

    def step(self, line: dict[str, Any], total: int, tokens: int, tokens_left: int) -> None:
        """One more step, of so many tokens, and how many those that are left will read."""
        if "val_bits_per_byte" in line:
            self.val = f", held out {line['val_bits_per_byte']:.3f} bits per byte"
        self.tokens += tokens
        spent = time.perf_counter() - self.begun
        left = timedelta(seconds=int(spent / self.tokens * tokens_left))
        words = f"loss {line['loss']:.3f}{self.val}, {self.tokens / spent:,.0f} tokens/s, {left} left"
        if self.bar.tasks:
            self.bar.update(self.bar.tasks[0].id, completed=line["step"], description=words)
        elif "val_loss" in line or spent - self.said > EVERY:
            self.said = spent
            self.console.print(f"step {line['step']} of {total}: {words}")


class Board:
    """TensorBoard's files, where there is a folder for them and it is installed and does what it should; else nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.writer: Any = None
        if folder is not None and find_spec("tensorboard") is not None:
            with self.trying():
                self.writer = importlib.import_module("tensorboard.summary").Writer(str(folder))

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            with self.trying():
                self.writer.close()

    def add(self, line: dict[str, Any]) -> None:
        """The numbers of a step."""
        for name in ("loss", "rate", "val_loss", "val_bits_per_byte"):
            if self.writer is not None and name in line:
                with self.trying():
                    self.writer.add_scalar(name, line[name], line["step"])

    @contextmanager
    def trying(self) -> Iterator[None]:
        """Do without it from the first failure on: its thread may fail at any time, and a decoration must not end a run."""
        try:
            yield
        except Exception:  # noqa: BLE001  # TensorBoard's own errors are of any type, and none may end a run
            self.writer = None


def draw(path: Path, lines: list[dict[str, Any]]) -> bool:
    """The curve of a run as a picture, if matplotlib is installed."""
    if find_spec("matplotlib") is None or not lines:
        return False
    figure: Any = importlib.import_module("matplotlib.figure").Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="bits per byte")
    axes.plot([line["step"] for line in lines], [line["loss"] * BITS for line in lines], lw=0.8, alpha=0.6, label="training")
    measured = [(line["step"], line["val_bits_per_byte"]) for line in lines if "val_bits_per_byte" in line]
    if measured:
        axes.plot(*zip(*measured, strict=True), marker=".", label="held out")
    axes.legend()
    axes.grid(alpha=0.3)
    with whole_file(path) as part:
        figure.savefig(part, format="png")
    return True
