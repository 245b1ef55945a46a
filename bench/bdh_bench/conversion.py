"""bdh-convert beside ``cp`` of the same file: time and memory beyond what starting the program takes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import bdh_spec
from bdh_bench.results import RowResult, SideResult
from bdh_bench.rows import Row
from bdh_bench.sides import OURS
from bdh_spec import BDHConfig
from bdh_spec.params import count

COPY = "cp"
# The command by its entry point: packages of this house meet without importing one another.
COMMAND = "from importlib.metadata import entry_points as e; (p,) = e(group='console_scripts', name='bdh-convert'); p.load()()"
TOO_SHORT = 0.01  # seconds beyond start-up that no clock of processes tells
KILOBYTE = 1 if sys.platform == "darwin" else 1024


def conversion(row: Row, config: BDHConfig, rounds: int, seed: int, folder: Path) -> RowResult:
    """A fresh checkpoint, converted to another dialect and copied, in turns."""
    source, empty = folder / "source.safetensors", folder / "empty"
    bdh_spec.save(source, bdh_spec.init(config, np.random.default_rng(seed)), config)
    empty.touch()
    options = ["--no-verify"] if row.variant == "unverified" else []
    convert = [sys.executable, "-c", COMMAND, "numpy-to-mlx", str(source), "-o", str(folder / "out.safetensors"), "--force"]
    commands = {OURS: [*convert, *options], COPY: ["cp", str(source), str(folder / "copy")]}
    starts = {OURS: [*convert[:3], "--version"], COPY: ["cp", str(empty), str(folder / "copy-of-empty")]}
    result = RowResult(row, "bdh-convert", "float32", "cpu", needed_bytes=None)
    result.sides = [SideResult(side) for side in commands]
    for side in [side for _ in range(rounds) for side in result.sides]:
        try:
            start, least = spent(starts[side.side])
            taken, peak = spent(commands[side.side])
        except OSError as error:
            side.notes, side.failed = [str(error)], True
            continue
        side.seconds.append(max(taken - start, TOO_SHORT))
        side.memory = max(side.memory or 0, peak - least)
    for side in result.sides:
        if TOO_SHORT in side.seconds:
            side.notes.append(f"less than {TOO_SHORT} s beyond start-up, taken as that")
    largest = max(int(np.prod(shape)) for shape in bdh_spec.params.shapes(config)) * 4
    result.note = f"{count(config) * 4 / 2**20:.0f} MB, largest tensor {largest / 2**20:.0f} MB, numpy to mlx"
    return result


def spent(command: list[str]) -> tuple[float, int]:
    """Seconds and peak bytes of a command. OSError where it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    taken = time.perf_counter() - start
    process.stderr.close()
    if process.returncode:
        raise OSError(f"{command[0]} ended with status {process.returncode}: {' '.join(said.split())[:300]}")
    return taken, used.ru_maxrss * KILOBYTE
