"""Conversions killed at random moments: is the old file or the new one whole, and does the next run clear the rest?

python examples/kill.py --times 100
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

import bdh_spec
from bdh_convert.checkpoint import open_checkpoint
from bdh_convert.convert import Settings, convert
from bdh_spec import BDHConfig, Params
from bdh_spec.params import init

CONFIG = BDHConfig(n_layer=1, n_embd=64, n_head=2, mlp_internal_dim_multiplier=32)
RUN = "import bdh_convert.command; print('ready', flush=True); from bdh_convert.cli import main; main()"
ENDED = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143}
TARGETS = {"torch": "m.pt", "mlx": "m.npz", "jax": "m.safetensors", "hf": "m"}


@click.command()
@click.option("--times", default=100, show_default=True, help="How many conversions are killed.")
def main(times: int) -> None:
    """Kill, look, run again, look; exit 1 if anything was lost or left."""
    chance, found, usual = random.Random(0), Counter(), 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        old, new = (Params(*(w * np.float32(s) for w in init(CONFIG, np.random.default_rng(0)))) for s in (1, 2))
        bdh_spec.save(folder / "old.safetensors", old, CONFIG)
        bdh_spec.save(folder / "new.safetensors", new, CONFIG)
        whole = {weights_in(folder / "old.safetensors"): "old", weights_in(folder / "new.safetensors"): "new"}
        for number in range(times):
            target = chance.choice(list(TARGETS))
            output = folder / TARGETS[target]
            convert(folder / "old.safetensors", target, output, Settings(force=True))
            blow = signal.SIGKILL if number % 2 else signal.SIGTERM
            words = ["--to", target, "-o", str(output), "--force", str(folder / "new.safetensors")]
            usual = usual or killed(words, blow, 60)[1]
            found["killed"] += killed(words, blow, chance.uniform(0, usual))[0]
            found[whole.get(weights_in(output), "LOST")] += 1
            found["left for the next run"] += bool(list(folder.glob(".*.part")))
            convert(folder / "new.safetensors", target, output, Settings(force=True))
            found["LEFT AFTER IT"] += bool(list(folder.glob(".*.part")))
    table = Table(
        "runs", "ended by the signal", "old is whole", "new is whole", "lost", "left for the next run", "left after it"
    )
    keys = ("killed", "old", "new", "LOST", "left for the next run", "LEFT AFTER IT")
    table.add_row(str(times), *(str(found[key]) for key in keys))
    Console(width=120).print(table)
    sys.exit(bool(found["LOST"] or found["LEFT AFTER IT"]))


def killed(words: list[str], blow: signal.Signals, wait: float) -> tuple[bool, float]:
    """Kill a conversion some time after it began to work: whether that ended it, and how long it worked."""
    with subprocess.Popen([sys.executable, "-c", RUN, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        child.stdout.readline()
        begun = time.monotonic()
        with suppress(subprocess.TimeoutExpired):
            child.wait(wait)
        child.send_signal(blow)
        child.wait(60)
    return child.returncode == ENDED[blow], time.monotonic() - begun


def weights_in(path: Path) -> bytes:
    """All numbers of a checkpoint."""
    return b"".join(weight.load().tobytes() for weight in open_checkpoint(path).weights)


if __name__ == "__main__":
    main()
