"""Draw the curves of all ports over one another: python examples/curves.py docs/curves.png"""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import click
import numpy as np
from matplotlib.figure import Figure

import bdh_spec
from bdh_spec import AdamW, Backend, BDHConfig
from bdh_train import TrainConfig
from bdh_train.batches import batches
from bdh_train.data import Text
from bdh_train.schedule import rate

PORTS = ("numpy", "torch", "jax", "mlx")
CONFIG = TrainConfig(data="topics", max_steps=200, learning_rate=4e-3, warmup_steps=20, block_size=24, batch_size=4, seed=1)
MODEL = BDHConfig(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=8, dropout=0.0)
ENGLISH = Text((np.frombuffer("\n".join(sorted(pydoc_data.topics.topics.values())).encode(), np.uint8),))


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
def main(path: Path) -> None:
    """Train on every port from one initialisation, and draw the losses and how far they are from the specification's."""
    steps = np.arange(1, CONFIG.max_steps + 1)
    wanted = curve(bdh_spec.get_backend("numpy"), "float64")
    figure = Figure(figsize=(8, 5.5), dpi=110, layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    for port in PORTS:
        losses = curve(bdh_spec.get_backend(port), "float32")
        above.plot(steps, losses, lw=1, label=port)
        below.semilogy(steps, np.maximum(np.abs(losses - wanted), 1e-9), lw=1, label=port)
        print(f"{port}: {np.abs(losses - wanted).max():.1e} nats from the specification at most")
    above.set(ylabel="loss, nats")
    below.set(xlabel="step", ylabel="distance from float64")
    above.legend()
    figure.savefig(path)


def curve(backend: Backend, dtype: str, config: TrainConfig = CONFIG) -> np.ndarray:
    """The losses of the steps."""
    params = bdh_spec.init(MODEL, np.random.default_rng(config.seed))
    model = backend.load(params, MODEL, device="cpu", dtype=dtype)
    optimizer = model.optimizer(AdamW(clip=0.5))
    steps = range(1, config.max_steps + 1)
    return np.array([model.train_on(optimizer, batches(config, ENGLISH, s), rate=rate(config, s)) for s in steps])


if __name__ == "__main__":
    main()
