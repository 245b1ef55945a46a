"""How well a model knows held-out text after ever more of other text: python examples/hatchling_positions.py [CHECKPOINT]

The same windows of 256 bytes are read after each number of bytes of the training text, so that only their position differs.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from hatchling_data import corpus

import bdh_spec
from bdh_spec import Model, State
from bdh_spec.model import log_softmax
from bdh_spec.params import Array

BEFORE = (0, 128, 256, 512, 1024, 2048, 4096, 8192)
WINDOW, PIECE, STARTS = 256, 256, (1_000, 200_000)  # of the text before, which is another for each


@click.command()
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
def main(checkpoint: Path | None) -> None:
    """Print a line for each number of bytes that come before."""
    training, held_out = (np.frombuffer(text, np.uint8) for text in corpus())
    model = bdh_spec.load(checkpoint, backend="torch", device="cpu")
    for before in BEFORE:
        texts = [training[start : start + before] for start in STARTS[: 2 if before else 1]]
        bits = [surprise(model, after(model, text), held_out) for text in texts]
        print(f"{before:>5} bytes before: {np.mean(bits):.3f} bits per byte", flush=True)


def after(model: Model, text: Array) -> State:
    """The state after a text."""
    state = model.init_state()
    for start in range(0, len(text), PIECE):
        _, state = model.advance(state, text[None, start : start + PIECE], donate=True)
    return state


def surprise(model: Model, state: State, text: Array) -> float:
    """Bits per byte in all whole windows of a text, each read after the same state."""
    rows = text[: (len(text) - 1) // WINDOW * WINDOW + 1]
    losses = []
    for start in range(0, len(rows) - 1, WINDOW):
        logits, _ = model.advance(state, rows[None, start : start + WINDOW])
        targets = rows[start + 1 : start + WINDOW + 1].astype(int)
        losses.append(-log_softmax(logits[0].astype(np.float64))[np.arange(WINDOW), targets].mean())
    return float(np.mean(losses) / np.log(2))


if __name__ == "__main__":
    main()
