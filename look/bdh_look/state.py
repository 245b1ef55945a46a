"""What a state holds: its size and rank while it reads on, how long a planted fact can be read from it, and two compared."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bdh_look.errors import LookError
from bdh_spec import Model, RecurrentState, State
from bdh_spec.model import log_softmax
from bdh_spec.params import Array

CHUNK = 256  # bytes read at once
CHANCE = 0.05
ALPHABET = list(string.ascii_lowercase)


def read_on(model: Model, state: State, text: bytes) -> State:
    """The state after a text; the one given is used up."""
    for start in range(0, len(text), CHUNK):
        _, state = model.advance(state, np.frombuffer(text[start : start + CHUNK], np.uint8)[None], donate=True)
    return state


def effective_rank(matrix: Array) -> float:
    """The exponential of the entropy of the singular values' shares: k for k equal ones.

    >>> round(effective_rank(np.diag([2.0, 2.0, 2.0, 0.0])), 6)
    3.0
    """
    values = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    if not values.any():
        return 0.0
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def course(model: Model, text: bytes, places: Sequence[int]) -> list[dict[str, Any]]:
    """At each place of a text, in bytes read: norm and effective rank of each layer's state, (L, h) each as lists."""
    rows, state, at = [], model.init_state(), 0
    for place in sorted(set(places)):
        if not 0 < place <= len(text):
            raise LookError(f"place {place} of a text of {len(text)} bytes: choose from 1 to its length")
        state, at = read_on(model, state, text[at:place]), place
        layers = [layer[0].astype(np.float64) for layer in model.export_state(state).layers]  # h N D each
        rows.append(
            {
                "bytes": place,
                "norm": [np.sqrt((layer**2).sum((1, 2))).tolist() for layer in layers],
                "rank": [[effective_rank(head) for head in layer] for layer in layers],
            }
        )
    return rows


@dataclass(frozen=True)
class Recall:
    """What a planted word is worth after so many other bytes."""

    distance: int  # bytes between the planted sentence and the question
    gain: float  # bits per byte that the word costs less where it was planted than where another was, the mean of all trials
    error: float  # standard error of the mean
    chance: float  # what the mean exceeds once in 20 times, were the two alike: by exchanging them at random
    trials: int

    @property
    def readable(self) -> bool:
        return self.gain > self.chance


def recall(
    model: Model,
    filler: bytes,
    distances: Sequence[int],
    rng: np.random.Generator,
    trials: int = 12,
    sentence: str = 'The name is "{}".\n',
    known: bool = False,
) -> list[Recall]:
    """How long a planted fact can be read: a sentence with a word drawn at random, other bytes, and the sentence again.

    Measured is what the word costs the second time, against what it costs where another word had been planted. The words are
    six letters at random, or, ``known``, words of the filler of 5 to 9 letters. Each trial has filler of its own.
    """
    furthest = max(distances)
    if len(filler) < furthest + trials:
        raise LookError(f"{len(filler)} bytes of filler for distances up to {furthest}: give a longer text")
    gains: dict[int, list[float]] = {distance: [] for distance in sorted(set(distances))}
    words_of_filler = vocabulary(filler)
    if known and len(words_of_filler) < 2:
        raise LookError("the filler has no two words of 5 to 9 letters to plant: give a text with words")
    head, _, tail = sentence.partition("{}")
    for _ in range(trials):
        words = (
            [str(word) for word in rng.choice(words_of_filler, 2, replace=False)]
            if known
            else ["".join(rng.choice(ALPHABET, 6)) for _ in "ab"]
        )
        start = int(rng.integers(0, len(filler) - furthest))
        between, costs = filler[start : start + furthest], {}
        for planted in words:
            state, at = read_on(model, model.init_state(), f"{head}{planted}{tail}".encode()), 0
            for distance in gains:
                state, at = read_on(model, state, between[at:distance]), distance
                costs[planted, distance] = cost(model, state, head.encode(), words[0].encode())
        for distance, found in gains.items():
            found.append((costs[words[1], distance] - costs[words[0], distance]) / len(words[0]) / np.log(2))
    signs = rng.choice([-1.0, 1.0], (2000, trials))
    return [
        Recall(
            distance,
            float(np.mean(found)),
            float(np.std(found, ddof=1) / np.sqrt(trials)),
            float(np.quantile(np.abs(signs @ found) / trials, 1 - CHANCE)),
            trials,
        )
        for distance, found in gains.items()
    ]


def vocabulary(text: bytes) -> list[str]:
    """The words of 5 to 9 small letters in a text.

    >>> vocabulary(b"The small, smooth dragon sleeps.")
    ['dragon', 'sleeps', 'small', 'smooth']
    """
    return sorted({word.decode() for word in re.findall(rb"\b[a-z]{5,9}\b", text)})


def cost(model: Model, state: State, head: bytes, word: bytes) -> float:
    """Nats of a word after what leads to it, from a state that stays as it is."""
    tokens = np.frombuffer(head + word, np.uint8).astype(np.int64)[None]
    log_p = log_softmax(model.advance(state, tokens)[0][0].astype(np.float64))
    at = np.arange(len(head) - 1, len(head) + len(word) - 1)
    return float(-log_p[at, tokens[0, at + 1]].sum())


def difference(one: RecurrentState, other: RecurrentState, most: int = 5) -> list[dict[str, Any]]:
    """Layer by layer: the norms of two states, of their difference, their cosine, and the entries that differ most."""
    if one.layers[0].shape != other.layers[0].shape:
        raise LookError(
            f"states of shape {one.layers[0].shape} and {other.layers[0].shape}: compare as many texts with as many"
        )
    rows = []
    for i, pair in enumerate(zip(one.layers, other.layers, strict=True)):
        a, b = (layer.astype(np.float64) for layer in pair)
        norms = [float(np.linalg.norm(values)) for values in (a, b, b - a)]
        flat = np.argsort(-np.abs(b - a), axis=None, kind="stable")[:most]
        places = np.stack(np.unravel_index(flat, a.shape), -1)
        rows.append(
            {
                "layer": i,
                "norms": norms,
                "cosine": float((a * b).sum() / (norms[0] * norms[1])) if norms[0] * norms[1] else None,
                "largest": [
                    {
                        "head": int(h),
                        "neuron": int(n),
                        "feature": int(d),
                        "from": float(a[t, h, n, d]),
                        "to": float(b[t, h, n, d]),
                    }
                    for t, h, n, d in places
                ],
            }
        )
    return rows
