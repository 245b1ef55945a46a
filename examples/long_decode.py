"""A million tokens, one at a time: is memory flat, is every number finite, and are the logits still right? Prints a table.

python examples/long_decode.py --ports torch,jax

Texts of a small model are read token by token. After each leg the state is saved, loaded, and its position moved on, up to
2^40. At every 500th token the logits are held against an exact replay in float64, in chunks, by the suite's rule: they may be
eight times as far off as the specification in float32 is, which reads the same tokens one at a time.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from bdh_conformance.yardstick.tolerances import allowed, row_errors
from bdh_spec import BDHConfig, Model, Params, RecurrentState, checkpoint
from bdh_spec.params import Array, fingerprint, init
from bdh_spec.registry import choose

CONFIG = BDHConfig(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=64)
LEGS = (0, 10**6, 2**24 - 1000, 2**31 - 1000, 2**40 - 1000)  # the position at which each begins
EVERY = 500
GROWTH = 8 << 20  # bytes that a process may take from the second leg to the last: allocators keep a little


@click.command()
@click.option("--tokens", default=10**6, show_default=True, help="How many each port reads in all.")
@click.option("--batch", default=50, show_default=True, help="Texts at a time.")
@click.option("--ports", default="torch,jax", show_default=True)
def main(tokens: int, batch: int, ports: str) -> None:
    """Decode, and exit 1 if memory grows, a number is not finite, or logits are off."""
    rng = np.random.default_rng(0)
    params = Params(*(weight * np.float32(20) for weight in init(CONFIG, rng)))
    steps = tokens // batch // len(LEGS) // EVERY * EVERY
    texts = rng.integers(0, CONFIG.vocab_size, (len(LEGS), batch, steps))
    exact = replay(texts, params)
    own = np.stack([found for found, _ in decoded("numpy", params, texts)])
    limit = float(allowed(row_errors(own, exact).max(), "float32"))
    table = Table("port", "tokens", "states saved", "worst error", "allowed", "memory grew, MB", "right")
    failed = False
    for port in ports.split(","):
        points, sizes = zip(*decoded(port, params, texts), strict=True)
        worst, grown = row_errors(np.stack(points), exact).max(), max(sizes) - sizes[len(sizes) // len(LEGS)]
        right = bool(worst <= limit) and grown <= GROWTH  # NaN is not right
        failed = failed or not right
        row = (
            f"{texts.size:,}",
            str(len(LEGS)),
            f"{worst:.1e}",
            f"{limit:.1e}",
            f"{grown / 2**20:.1f}",
            "yes" if right else "NO",
        )
        table.add_row(port, *row)
    Console(width=110).print(table)
    sys.exit(failed)


def replay(texts: Array, params: Params) -> Array:
    """The exact logits (points, B, V), in chunks."""
    model = choose("numpy").load(params, CONFIG, device=None, dtype="float64", phase="exact")
    points, state = [], model.init_state(texts.shape[1])
    for start, leg in zip(LEGS, texts, strict=True):
        state = model.import_state(moved(model.export_state(state), start))
        for piece in np.split(leg, leg.shape[1] // EVERY, axis=1):
            logits, state = model.advance(state, piece)
            points.append(logits[:, -1])
    return np.stack(points)


def decoded(port: str, params: Params, texts: Array) -> Iterator[tuple[Array, int]]:
    """A port's logits at every point, token by token, and the memory that its process has there."""
    model = choose(port).load(params, CONFIG, device="cpu", dtype="float32", phase="exact")
    process = psutil.Process()
    state = model.init_state(texts.shape[1])
    for start, leg in zip(LEGS, texts, strict=True):
        state = model.import_state(moved(saved_and_loaded(model, state, params), start))
        for t in range(leg.shape[1]):
            logits, state = model.advance(state, leg[:, t : t + 1], donate=True)
            if not np.isfinite(logits).all():
                raise ArithmeticError(f"{port} gives logits that are not finite at position {start + t:,}")
            if t % EVERY == EVERY - 1:
                yield logits[:, -1], process.memory_info().rss


def saved_and_loaded(model: Model, state: object, params: Params) -> RecurrentState:
    """A state by way of the disk."""
    with tempfile.TemporaryDirectory() as folder:
        path, mark = Path(folder) / "s.safetensors", fingerprint(params)
        exported = model.export_state(state)
        checkpoint.save_state(path, exported, CONFIG, mark, np.zeros((exported.batch, 0), np.int64))
        return checkpoint.read_state(path, CONFIG, mark)[0]


def moved(state: RecurrentState, position: int) -> RecurrentState:
    """The same memory at a later position: all that was read before seems further away, to every port alike."""
    return RecurrentState(position, state.layers)


if __name__ == "__main__":
    main()
