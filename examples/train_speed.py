"""Tokens per second of bdh-train beside a plain loop over the plain form of the model: python examples/train_speed.py

Both train in processes of their own and in turns. What counts is a processor's own time, for steps beyond the first ones: what
a process needs before and after its steps is in both of two runs of different lengths, and not in their difference.
"""

from __future__ import annotations

import os
import pydoc_data.topics
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch

from bdh_bench import plain_torch
from bdh_spec.model import frequencies_of
from bdh_spec.params import shapes
from bdh_train import TrainConfig
from bdh_train.config import resolve

BATCH, WINDOW, FEW = 8, 256, 2


@click.command()
@click.option("--size", default="hatchling", show_default=True)
@click.option("--steps", default=10, show_default=True, help="Steps that are measured.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--plain", hidden=True, type=int)
def main(size: str, steps: int, rounds: int, plain: int | None) -> None:
    """Measure both, and say how they compare."""
    if plain is not None:
        plain_loop(size, plain)
        return
    ours, theirs = [], []
    with TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_bytes(english())
        for _ in range(rounds):
            ours.append(rate(lambda n: ["-m", "bdh_train", *words(size, text, n)], steps))
            theirs.append(rate(lambda n: [__file__, "--size", size, "--plain", str(n)], steps))
            print(f"bdh-train {ours[-1]:,.0f} tokens a second of one core, the plain loop {theirs[-1]:,.0f}", flush=True)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    of_medians = statistics.median(ours) / statistics.median(theirs)
    print(
        f"bdh-train / plain: {of_medians:.2f}, ratio of medians; of single rounds from {min(ratios):.2f} to {max(ratios):.2f}"
    )


def words(size: str, text: Path, steps: int) -> list[str]:
    """bdh-train for as many steps, with nothing but them, and what comes before and after."""
    out = text.with_name(f"run-{os.urandom(4).hex()}")
    rare = ["--eval-every", "1000", "--eval-batches", "1", "--checkpoint-every", "1000", "-q"]
    recipe = ["--size", size, "--batch-size", str(BATCH), "--block-size", str(WINDOW), "--max-steps", str(steps)]
    return ["--data", str(text), "--out", str(out), "--backend", "torch", "--device", "cpu", *recipe, *rare]


def rate(command: Callable[[int], list[str]], steps: int) -> float:
    """Tokens per second of processor time in ``steps`` steps."""
    few, many = (seconds([sys.executable, *command(n)]) for n in (FEW, FEW + steps))
    return steps * BATCH * WINDOW / (many - few)


def seconds(command: list[str]) -> float:
    """The time that a process keeps a core of its own."""
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"{' '.join(command)} left with {process.returncode}")
    return used.ru_utime + used.ru_stime


def plain_loop(size: str, steps: int) -> None:
    """What one writes first: the plain form, PyTorch's AdamW and its clipping, random windows."""
    config = resolve(TrainConfig(data="text", size=size)).model
    five = [torch.nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes(config)]
    weights = plain_torch.Weights(*five, torch.tensor(frequencies_of(config)))
    optimizer = torch.optim.AdamW(five, 1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    data = torch.frombuffer(bytearray(english()), dtype=torch.uint8).long()
    for _ in range(steps):
        rows = torch.stack([data[s : s + WINDOW + 1] for s in torch.randint(len(data) - WINDOW, (BATCH,)).tolist()])
        loss = plain_torch.loss(rows[:, :-1], rows[:, 1:], weights, config, config.dropout)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(five, 1.0)
        optimizer.step()


def english() -> bytes:
    """Text that every Python carries."""
    return "\n".join(sorted(pydoc_data.topics.topics.values())).encode()


if __name__ == "__main__":
    main()
