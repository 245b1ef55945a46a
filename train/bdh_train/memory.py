"""What a step takes of a device's memory, about."""

from __future__ import annotations

from dataclasses import replace

from bdh_spec.params import count
from bdh_train.config import TrainConfig

WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# Tensors as wide as the neurons (B, nh, T, N) that a port keeps of each layer for its gradient, and those it works on at once.
# Measured on a CPU with hatchling and 16 windows of 256 bytes: torch took 819 MB, jax 589, mlx 1176, numpy 1032.
KEPT = {"torch": (4.3, 4), "mlx": (7, 4), "numpy": (6, 5), "jax": (0, 14)}
OTHER = (6, 6)  # of ports that are not ours
BASE = 300 << 20  # of a process with its framework


def estimate(config: TrainConfig, port: str) -> int:
    """Bytes that training takes: weights, masters, slopes and moments, what is kept of a batch, and the framework."""
    model, width = config.model, WIDTHS.get(config.dtype, 4)
    wide = max(width, 4)
    weights = count(model) * (width + 3 * wide + (wide if width < 4 else 0))
    layers, working = KEPT.get(port, OTHER)
    tokens = max(config.batch_size * config.block_size, config.longest)
    rows = tokens * model.n_head
    neurons = rows * model.n_neurons * width * (layers * model.n_layer + working)
    scores = rows * min(config.longest, 1024) * wide * 2 * model.n_layer
    return int(weights + neurons + scores + tokens * model.vocab_size * wide * 3 + BASE)


def says(config: TrainConfig, port: str, device: str, has: int | None) -> str:
    """A line for the user: what training takes, against what the device has, and what to do where that is not enough."""
    takes = estimate(config, port)
    if has is None:
        return f"about {size(takes)} of memory"
    line = f"about {size(takes)} of the {size(has)} that {device} has"
    return line if takes <= has else f"{line}, which is too much: try {smaller(config, port, has)}"


def smaller(config: TrainConfig, port: str, has: int) -> str:
    """The same bytes in more batches, or else shorter windows."""
    batch, block, long = config.batch_size, config.block_size, config.long_block_size
    while batch > 1:
        batch //= 2
        if estimate(replace(config, batch_size=batch), port) <= has:
            return f"--batch-size {batch} --accumulate {-(-config.batch_size * config.accumulate // batch)}"
    while long is not None and long // 2 > block:
        long //= 2
        if estimate(replace(config, batch_size=1, long_block_size=long), port) <= has:
            return f"--batch-size 1 --long-block-size {long}"
    one = replace(config, batch_size=1, min_block_size=None, long_block_size=None, long_steps=None)
    alone = " and no --long-block-size" if long else ""
    while block > 32:
        if estimate(replace(one, block_size=block), port) <= has and (long or block < config.block_size):
            return f"--batch-size 1 --block-size {block}{alone}"
        block //= 2
    return "a smaller --size"


def size(count: int) -> str:
    """Bytes, for people."""
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.0f} MB"
