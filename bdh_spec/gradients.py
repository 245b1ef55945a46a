"""R15: the gradient of the loss, derived by hand. Each function undoes one of model.py; ``d_x`` is the loss's slope in x."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bdh_spec.config import BDHConfig
from bdh_spec.model import EPS, IGNORE, Stages, frequencies_of, layer_norm, log_softmax, loss, merge_heads, readout, run
from bdh_spec.params import Array, Params
from bdh_spec.rope import Phase, rotation, swap


def gradients(
    tokens: Array,
    targets: Array,
    params: Params,
    config: BDHConfig,
    *,
    phase: Phase = "exact",
    keep: Sequence[Array] | None = None,
) -> tuple[float, Params]:
    """The loss and its slope in each weight.

    ``keep`` holds one dropout mask (B, nh, T, N) per layer, already divided by its probability; absent in evaluation.
    """
    looked_up = params.embed[tokens]  # B T D
    x, layers = run(tokens, params, config, phase=phase, keep=keep)
    logits = readout(x, params)
    cos, sin = rotation(0, tokens.shape[1], frequencies_of(config), params.encoder.dtype, phase)

    d = Params(*(np.zeros_like(weight) for weight in params))
    d_logits = loss_gradient(logits, targets)
    d.lm_head[...] = _rows(x).T @ _rows(d_logits)
    d_x = d_logits @ params.lm_head.T
    for i in reversed(range(config.n_layer)):
        x = layers[i - 1].x if i else layer_norm(looked_up)
        d_x = layer_gradient(d_x, x, layers[i], params, d, cos, sin, 1.0 if keep is None else keep[i])
    np.add.at(d.embed, tokens, layer_norm_gradient(d_x, looked_up))  # a token that occurs twice counts twice
    return loss(logits, targets), d


def loss_gradient(logits: Array, targets: Array) -> Array:
    """Softmax minus the target, over the number of targets that count (R12)."""
    counted = targets != IGNORE
    d_logits = np.where(counted[..., None], np.exp(log_softmax(logits)), 0)
    d_logits[(*np.nonzero(counted), targets[counted])] -= 1
    return d_logits / counted.sum().astype(logits.dtype)  # B T V


def layer_norm_gradient(d_y: Array, x: Array) -> Array:
    """Undo R2: the part of d_y along the mean and along the normalised x itself does not pass."""
    centred = x - x.mean(-1, keepdims=True)
    scale = 1 / np.sqrt((centred * centred).mean(-1, keepdims=True) + EPS)
    y = centred * scale
    return scale * (d_y - d_y.mean(-1, keepdims=True) - y * (d_y * y).mean(-1, keepdims=True))


def layer_gradient(
    d_out: Array, x: Array, s: Stages, params: Params, d: Params, cos: Array, sin: Array, keep: Array | float
) -> Array:
    """Undo one layer that read x and computed s: add to the weights' slopes in d, return the slope in x (B, T, D)."""
    d_sum = layer_norm_gradient(d_out, x + s.y)  # R10
    d_decoded = layer_norm_gradient(d_sum, s.decoded)  # R9
    d.decoder[...] += _rows(merge_heads(s.xy_sparse)).T @ _rows(d_decoded)
    d_xy = split_heads(d_decoded @ params.decoder.T, s.xy_sparse.shape[1]) * keep  # B h T N, R8

    d_y_before = d_xy * s.x_sparse * (s.y_sparse > 0)  # R7
    d.encoder_v[...] += np.sum(s.yKV.swapaxes(-1, -2) @ d_y_before, axis=0)
    d_attention = layer_norm_gradient(d_y_before @ params.encoder_v.swapaxes(-1, -2), s.attention)  # R6

    d_scores = np.tril(d_attention @ x[:, None].swapaxes(-1, -2), k=-1)  # R5
    d_rotated = (d_scores + d_scores.swapaxes(-1, -2)) @ s.rotated  # K is Q: a row counts as both
    d_x_sparse = d_xy * s.y_sparse + rope_gradient(d_rotated, cos, sin)  # R7, R4
    d_x_before = d_x_sparse * (s.x_sparse > 0)  # R3
    d.encoder[...] += np.sum(x[:, None].swapaxes(-1, -2) @ d_x_before, axis=0)

    from_values = np.sum(s.scores.swapaxes(-1, -2) @ d_attention, axis=1)  # V is x, for every head
    from_encoder = np.sum(d_x_before @ params.encoder.swapaxes(-1, -2), axis=1)
    return d_sum + from_values + from_encoder


def rope_gradient(d_rotated: Array, cos: Array, sin: Array) -> Array:
    """Undo R4: each part of a slope goes back to the neuron that it came from, by the factor that it came with.

    That turns a pair back where both of its neurons turn alike.
    """
    return d_rotated * cos - swap(d_rotated * sin)


def split_heads(merged: Array, nh: int) -> Array:
    """Undo ``merge_heads``."""
    B, T, width = merged.shape
    return merged.reshape(B, T, nh, width // nh).swapaxes(1, 2)  # B h T N


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])
