"""What the specification says in float64, where that fits, and how far an answer is from it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bdh_bench.counts import needed_flop, reference_memory
from bdh_bench.sides import Named, Task
from bdh_spec import Params, RecurrentState
from bdh_spec import model as spec
from bdh_spec.gradients import gradients
from bdh_spec.params import Array, cast

CHUNK = 128  # tokens at once: no (T, T) square, and no whole text of width N
COMPARED = ("forward", "prefill", "train", "decode")
SLOWER = 4  # than a float64 product: what the specification does beside products


def reference(task: Task) -> Named:
    """The answer of a row by the specification in float64: logits, or slopes."""
    params, config = cast(task.params(), np.float64), task.config
    if task.row.kind == "train":
        return gradients(task.tokens(), task.targets(), params, config)[1]._asdict()
    state = spec.init_state(task.row.batch, config, np.float64)
    logits, state = read(state, task.tokens(), params, task)
    if task.row.kind == "decode":
        logits, _ = read(replace(state, position=task.row.length), task.next(), params, task)
    return {"logits": logits}


def read(state: RecurrentState, tokens: Array, params: Params, task: Task) -> tuple[Array, RecurrentState]:
    """Logits of tokens (B, T), chunk by chunk, and the state after them."""
    logits = []
    for start in range(0, tokens.shape[1], CHUNK):
        part, state = spec.advance(state, tokens[:, start : start + CHUNK], params, task.config)
        logits.append(part)
    return np.concatenate(logits, axis=1), state


def cost(task: Task, speed: float) -> tuple[float, int]:
    """About the seconds and the bytes that the reference takes, at ``speed`` FLOP a second in float64 products."""
    flop = needed_flop(replace(task.row, kind="forward", length=task.tokens().shape[1]), task.config)
    if task.row.kind == "train":
        flop = needed_flop(task.row, task.config)
    return SLOWER * flop / speed, reference_memory(task.row, task.config, CHUNK)


def worst_error(answer: Named, expected: Named) -> float:
    """The largest relative error of a row: of one token's logits, or of all slopes of one weight. Infinite if not finite.

    An answer that holds fewer tokens is one about the last ones.
    """
    return max(_worst(answer[name], expected[name], name) for name in expected)


def _worst(answer: Array, expected: Array, name: str) -> float:
    if name == "logits":
        expected = expected[:, -answer.shape[1] :]
        axes: tuple[int, ...] | None = (-1,)
    else:
        axes = None
    if answer.shape != expected.shape:
        return float("inf")
    off = np.sqrt(np.sum((answer - expected) ** 2, axis=axes))
    error = float(np.max(off / np.sqrt(np.sum(expected**2, axis=axes))))
    return error if np.isfinite(error) else float("inf")
