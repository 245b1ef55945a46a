"""The main job on the embedded checkpoint: convert it torch->mlx and back, run it on every port, compare, and write.

`make demo` runs this; it leaves the converted files in demo-output/.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import bdh_spec
from bdh_conformance import Expectation, expect
from bdh_conformance.yardstick.agreement import Comparison, compare
from bdh_spec import BackendUnavailable, BDHConfig, Params
from bdh_spec.checkpoint import EMBEDDED
from bdh_spec.model import forward

OUT = Path("demo-output")
SENTENCE = b"A dragon hatches: the text that every port reads, and on which each is compared with the specification."
PROMPT, SEED, NEW = "The ", 2, 300
WINDOW = 10_240  # bytes of the longest text that the embedded model has learned from
LONG, END = WINDOW + 512, 250  # bytes that the fastest port writes, and of those that are shown
DIALECTS = {"torch": "torch", "mlx": "mlx"}  # the ports that have a file format of their own read theirs
RUNS = [("numpy", "float32"), ("torch", "float32"), ("torch", "bfloat16"), ("jax", "float32"), ("mlx", "float32")]

say = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Row:
    """One line of the table, and the text that goes with it."""

    port: str
    device: str
    dtype: str
    compared: Comparison  # its logits with the specification's
    speed: float
    text: bytes


def main() -> int:
    """Convert, run, compare; 1 if anything disagrees."""
    files = convert_there_and_back()
    params, config = bdh_spec.read()
    with Progress(console=say, transient=True) as progress:
        rows = [
            run(port, dtype, files, params, config) for port, dtype in progress.track(RUNS, description="running every port")
        ]
    rows = [row for row in rows if row]
    show(rows)
    write_on(max(rows, key=lambda row: row.speed), files)
    return 0 if not any(row.compared.complaint for row in rows) else 1


def convert_there_and_back() -> dict[str, Path]:
    """The embedded checkpoint as a PyTorch and as an MLX file; the way back must give the same bytes."""
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    shutil.copy(EMBEDDED, OUT / "hatchling.safetensors")
    shell("bdh-convert numpy-to-torch hatchling.safetensors")
    shell("bdh-convert torch->mlx hatchling.torch.safetensors")  # unquoted, as people type it
    shell("bdh-convert mlx-to-torch hatchling.mlx.safetensors -o back.torch.safetensors")
    same = (OUT / "back.torch.safetensors").read_bytes() == (OUT / "hatchling.torch.safetensors").read_bytes()
    say.print(f"torch to mlx and back: {'the same file, byte for byte' if same else 'NOT the same file'}\n")
    if not same:
        sys.exit(1)
    return {name: OUT / f"hatchling.{name}.safetensors" for name in DIALECTS}


def shell(command: str) -> None:
    """Run a command in the output folder by the shell, as a user would."""
    say.print(f"$ {command}", style="bold", markup=False, soft_wrap=True)
    path = f"PATH={Path(sys.executable).parent.resolve()}:$PATH"
    finished = subprocess.run(f"{path} {command}", shell=True, cwd=OUT, text=True, capture_output=True)
    say.print((finished.stdout + finished.stderr).strip(), style="dim", markup=False, soft_wrap=True)
    if finished.returncode:
        sys.exit(finished.returncode)


def run(port: str, dtype: str, files: dict[str, Path], params: Params, config: BDHConfig) -> Row | None:
    """Load the port's own file, compare its logits with the specification, and let it write."""
    try:
        model = bdh_spec.load(files.get(port), backend=port, dtype=dtype)
    except BackendUnavailable as unavailable:
        say.print(f"{port}: {unavailable}", style="yellow")
        return None
    tokens = np.frombuffer(SENTENCE, np.uint8)[None]
    expected: Expectation = expect(lambda p: {"logits": forward(tokens, p, config)}, params, dtype)["logits"]
    compared = compare("logits", model.forward(tokens), expected)
    model.generate(PROMPT, 8, seed=SEED)  # compile and warm up
    start = time.perf_counter()
    text = model.generate(PROMPT, NEW, temperature=0.7, top_k=50, seed=SEED)
    return Row(port, model.device, dtype, compared, NEW / (time.perf_counter() - start), text)


def on_stdout() -> Console:
    """Where what the demo finds is printed."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 100)


def show(rows: list[Row]) -> None:
    """The table and the texts, on stdout."""
    out = on_stdout()
    out.print(tabled(rows))
    texts: dict[bytes, list[str]] = {}
    for row in rows:
        texts.setdefault(row.text, []).append(f"{row.port} {row.dtype}")
    for text, writers in texts.items():
        out.print(f"\n{', '.join(writers)}, from {PROMPT!r} with seed {SEED}:", style="bold")
        out.print(text.decode(errors="replace"), markup=False)


def write_on(fastest: Row, files: dict[str, Path]) -> None:
    """A text longer than any that the model has learned from, by the fastest port: the state does not grow with it."""
    model = bdh_spec.load(files.get(fastest.port), backend=fastest.port, dtype=fastest.dtype)
    start = time.perf_counter()
    with Progress(console=say, transient=True) as progress:
        steps = model.stream(PROMPT, LONG, temperature=0.7, top_k=50, seed=SEED)
        text = bytes(int(token[0]) for token, _ in progress.track(steps, total=LONG, description="a long text"))
    seconds = time.perf_counter() - start
    out = on_stdout()
    out.print(
        f"\n{fastest.port} {fastest.dtype} wrote on to {LONG:,} bytes in {seconds:.0f} s, where no text of its training was"
        f" longer than {WINDOW:,}. The end:",
        style="bold",
    )
    out.print(text[-END:].decode(errors="replace"), markup=False)


def tabled(rows: list[Row]) -> Table:
    """A line for each run."""
    names = "port", "device", "dtype", "worst error", "allowed", "agrees", "tokens/s"
    table = Table(*names, box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for row in rows:
        error, agrees = row.compared, "NO" if row.compared.complaint else "yes"
        table.add_row(row.port, row.device, row.dtype, f"{error.error:.1e}", f"{error.allowed:.1e}", agrees, f"{row.speed:.0f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
