"""A run killed at random instants, again and again, until it is done: python tests/bdh_train/killing.py --times 50

Prints how often it was killed, how many steps that cost, and whether its losses are those of the run that nobody killed.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import click

TRAIN = str(Path(sys.executable).parent / "bdh-train")
EVERY = 2  # steps between checkpoints
SMALL = ["--n-layer", "2", "--n-embd", "16", "--n-head", "2", "--mlp-internal-dim-multiplier", "8", "--dropout", "0.2"]
RECIPE = ["--block-size", "48", "--min-block-size", "12", "--batch-size", "4", "--accumulate", "2", "--eval-batches", "2"]


@dataclass
class Killed:
    """What became of a run that was killed."""

    times: int
    lost: int  # steps made more than once, at most, by one killing
    lines: list[str]


def command(out: Path, data: Path, port: str, steps: int) -> list[str]:
    often = ["--max-steps", str(steps), "--eval-every", "5", "--checkpoint-every", str(EVERY)]
    return [TRAIN, "--data", str(data), "--out", str(out), "--backend", port, "-q", *SMALL, *RECIPE, *often]


def undisturbed(out: Path, data: Path, port: str, steps: int) -> tuple[list[str], float]:
    """The lines of a run that nobody kills, and the seconds it takes."""
    start = time.perf_counter()
    subprocess.run(command(out, data, port, steps), check=True, capture_output=True)
    return lines(out), time.perf_counter() - start


def killed(out: Path, data: Path, port: str, steps: int, times: int, seconds: float, seed: int) -> Killed:
    """Kill a run ``times`` times, each after a random part of the ``seconds`` that a whole one takes; then let it finish."""
    rng, lost, killings = random.Random(seed), 0, 0
    while killings < times:
        run = subprocess.Popen(again(out, data, port, steps), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            run.wait(rng.uniform(0.2, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            killings += 1
        _, said = run.communicate()
        if run.returncode not in (0, -signal.SIGKILL):
            raise RuntimeError(said.decode())
        lost = max(lost, len(lines(out)) - saved(out))
        if run.returncode == 0:
            break
    subprocess.run(again(out, data, port, steps), check=True, capture_output=True)
    return Killed(killings, lost, lines(out))


def again(out: Path, data: Path, port: str, steps: int) -> list[str]:
    """The command that begins the run or, once it is begun, goes on with it."""
    if (out / "config.toml").exists():
        return [TRAIN, "--resume", "--out", str(out), "-q"]
    return command(out, data, port, steps)


def saved(out: Path) -> int:
    """The step of the newest checkpoint."""
    return max((int(path.stem.split("-")[1]) for path in (out / "checkpoints").glob("step-*.safetensors")), default=0)


def lines(out: Path) -> list[str]:
    """What was noted of each step; not a last line that was cut short."""
    path = out / "metrics.jsonl"
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []


@click.command()
@click.option("--times", default=50, show_default=True)
@click.option("--port", default="numpy", show_default=True)
@click.option("--steps", default=200, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(times: int, port: str, steps: int, seed: int) -> None:
    """Kill a run and compare it with its twin."""
    with TemporaryDirectory() as folder:
        data = Path(folder) / "text.txt"
        data.write_bytes(b"".join(b"%d times %d is %d.\n" % (i, j, i * j) for i in range(60) for j in range(60)))
        whole, seconds = undisturbed(Path(folder) / "whole", data, port, steps)
        kills, most, runs = 0, 0, 0
        while kills < times:
            found = killed(Path(folder) / f"killed{runs}", data, port, steps, times - kills, seconds, seed + runs)
            kills, most, runs = kills + found.times, max(most, found.lost), runs + 1
            losses = [[json.loads(line)["loss"] for line in some] for some in (found.lines, whole)]
            if losses[0] != losses[1] or found.lines != whole:
                sys.exit(f"after {kills} killings the losses are others")
        click.echo(f"killed {kills} times in {runs} runs of {steps} steps: every line as in the run that nobody killed")
        click.echo(f"at most {most} steps were made again after one killing, {EVERY} between checkpoints")
        sys.exit(most > EVERY)


if __name__ == "__main__":
    main()
