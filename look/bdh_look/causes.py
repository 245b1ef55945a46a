"""What a prediction came from: what would have been expected had one earlier byte not been written to the state.

Scores say what was read. This says what it was good for: the state is a sum of what each byte wrote, so the part of one byte
can be taken out of it, in all layers, and the byte at hand be read again. All other bytes stay as they were, those too that
read it before. The same by the protocol: ``export_state``, subtract, ``import_state``, ``advance``.
"""

from __future__ import annotations

import numpy as np

from bdh_look.record import Record
from bdh_spec import Model, Params
from bdh_spec.model import frequencies_of, layer_norm, log_softmax, relu
from bdh_spec.params import Array, cast
from bdh_spec.rope import rope, rotation

BLOCK = 16  # bytes read again at once: larger products are quicker ones


def logits_without(seen: Record, params: Params, turn: tuple[Array, Array], times: Array, earlier: Array) -> Array:
    """The logits (K, V) after the bytes at ``times`` (K), each without what one ``earlier`` byte (K) wrote.

    ``turn`` is the cosine and the sine of their positions, each (K, N).
    """
    K, end = np.arange(len(times)), int(times.max())
    x = seen.x.values[0, times]  # K D
    is_read = np.arange(end) < times[:, None]  # K t
    is_read[K, earlier] = False
    for rotated, values in zip(seen.rotated.values[:, :, :end], seen.x.values[:, :end], strict=True):
        x_sparse = relu(x @ params.encoder)  # h K N
        scores = rope(x_sparse, *turn) @ rotated.swapaxes(-1, -2) * is_read  # h K t
        y_sparse = relu(layer_norm(scores @ values) @ params.encoder_v)  # h K N
        merged = (x_sparse * y_sparse).swapaxes(0, 1).reshape(len(K), -1)
        x = layer_norm(x + layer_norm(merged @ params.decoder))
    return x @ params.lm_head


def causes(model: Model, seen: Record, k: int) -> tuple[Array, Array, Array]:
    """For each byte the ``k`` earlier ones that it read most, the one that mattered most first, and what they mattered.

    Returns three arrays (T, k): the earlier bytes; the log-probability that each gave to the likeliest next byte, in nats,
    which is negative where that byte was likelier without it; and the probability that was left. Where fewer bytes stand
    before, the rest is zero.
    """
    params = cast(model.params(), seen.x.values.dtype)
    T = len(seen)
    cos, sin = rotation(0, T, frequencies_of(model.config), params.encoder.dtype, model.phase)
    likeliest = seen.next_byte.values.argmax(-1)  # T
    before = np.log(seen.next_byte.values[np.arange(T), likeliest])
    found, gave, left = np.zeros((T, k), np.int64), np.zeros((T, k)), np.zeros((T, k))
    for start in range(1, T, BLOCK):
        block = np.arange(start, min(T, start + BLOCK))
        tried = [candidates(seen, int(t), k) for t in block]
        times = np.repeat(block, [len(some) for some in tried])
        logits = logits_without(seen, params, (cos[times], sin[times]), times, np.concatenate(tried))
        after = log_softmax(logits.astype(np.float64))[np.arange(len(times)), likeliest[times]]
        for t, some in zip(block, tried, strict=True):
            rest = after[times == t]
            given = before[t] - rest
            order = np.argsort(-np.abs(given), kind="stable")
            here = slice(0, len(some))
            found[t, here], gave[t, here], left[t, here] = some[order], given[order], np.exp(rest[order])
    return found, gave, left


def candidates(seen: Record, time: int, k: int) -> Array:
    """The earlier bytes that were read most, over all layers and heads, or by any of them."""
    scores = np.abs(seen.scores.values[:, :, time, :time])  # L h t
    shares = scores / np.maximum(scores.sum(-1, keepdims=True), 1e-30)
    mean, peak = shares.mean((0, 1)), shares.max((0, 1))
    by_mean = np.argsort(-mean, kind="stable")[: (k + 1) // 2]
    by_peak = np.argsort(-np.where(np.isin(np.arange(time), by_mean), -1, peak), kind="stable")
    return np.concatenate([by_mean, by_peak[: min(k, time) - len(by_mean)]])
