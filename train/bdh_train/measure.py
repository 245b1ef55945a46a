"""How well a model knows a text: in all, and by the position in a window."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from bdh_spec import Model
from bdh_spec.model import log_softmax
from bdh_spec.params import Array
from bdh_train.batches import Pair
from bdh_train.data import Text

BITS = 1 / math.log(2)
PIECE = 512  # tokens that are read at once
BORDERS = (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def mean_loss(model: Model, pairs: Iterable[Pair]) -> float:
    """The mean cross entropy, in nats, over batches of one shape."""
    return float(np.mean([model.loss(tokens, targets) for tokens, targets in pairs]))


def by_position(model: Model, text: Text, longest: int, windows: int = 8) -> dict[str, float]:
    """Bits per byte between positions, in windows as long as the text allows, each read from an empty state."""
    length = min(longest, len(text) - 1)
    starts = np.unique(np.linspace(0, len(text) - 1 - length, windows).astype(np.int64)).tolist()
    losses = np.mean([surprises(model, text.read(start, length + 1)) for start in starts], axis=0)
    ranges = [(low, min(high, length)) for low, high in pairwise(BORDERS) if low < length]
    return {f"{low}-{high}": float(losses[low:high].mean()) * BITS for low, high in ranges}


def surprises(model: Model, window: Array) -> Array:
    """The cross entropy of every byte but the first."""
    ids = window.astype(np.int64)
    state, found = model.init_state(1), []
    for start in range(0, len(ids) - 1, PIECE):
        piece = ids[start : min(start + PIECE, len(ids) - 1)]
        logits, state = model.advance(state, piece[None], donate=True)
        targets = ids[start + 1 : start + 1 + len(piece)]
        found.append(-log_softmax(logits[0].astype(np.float64))[np.arange(len(piece)), targets])
    return np.concatenate(found)
