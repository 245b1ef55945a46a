"""Batches by number: step k reads the same bytes on every port, and after every resume."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bdh_spec.params import Array
from bdh_train.config import TrainConfig
from bdh_train.data import Text

Pair = tuple[Array, Array]  # tokens and targets, (B, T)


def lengths(config: TrainConfig) -> list[int]:
    """The lengths of windows that batches choose from: block_size, and its halves down to min_block_size.

    >>> lengths(TrainConfig(block_size=256, min_block_size=50))
    [256, 128, 64]
    """
    found, least = [config.block_size], config.min_block_size or config.block_size
    while found[-1] // 2 >= least:
        found.append(found[-1] // 2)
    return found


def batches(config: TrainConfig, text: Text, step: int) -> list[Pair]:
    """What a step reads, counted from 1: batches of windows, all of one length in a batch, and as many bytes in each."""
    return [windows(config, text, step, part) for part in range(config.accumulate)]


def windows(config: TrainConfig, text: Text, step: int, part: int) -> Pair:
    """One batch of a step: windows at random places, drawn by NumPy's Philox from the seed and the place of the batch."""
    rng = np.random.Generator(np.random.Philox(key=config.seed, counter=[0, 0, step, part]))
    choice = [config.longest] if config.is_long(step) else lengths(config)
    length = choice[int(rng.integers(len(choice)))]
    starts = rng.integers(len(text) - length, size=config.rows(length)).tolist()
    return shifted(np.stack([text.read(start, length + 1) for start in starts]))


def held_out(config: TrainConfig, text: Text) -> Iterator[Pair]:
    """What is measured: the longest windows one after the other or, of a long text, as far apart as they can be."""
    length, at_once = config.longest, config.rows(config.longest)
    many = min((len(text) - 1) // length, config.eval_batches * at_once)
    starts = np.linspace(0, (len(text) - 1) // length - 1, many).astype(np.int64) * length
    rows = min(at_once, many)  # batches of one shape, so that nothing is compiled twice
    for i in range(0, many - many % rows, rows):
        yield shifted(np.stack([text.read(start, length + 1) for start in starts[i : i + rows].tolist()]))


def shifted(rows: Array) -> Pair:
    """Rows (B, T + 1) as tokens and the byte after each."""
    ids = rows.astype(np.int64)
    return ids[:, :-1], ids[:, 1:]
