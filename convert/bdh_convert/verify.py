"""Whether a written checkpoint is the one that should have been written: by its bits, and by running it."""

from __future__ import annotations

import hashlib

import numpy as np

from bdh_convert.checkpoint import Checkpoint
from bdh_convert.raw import raw_bytes
from bdh_convert.scaled import Scaled
from bdh_convert.tensors import F32, F64, Tensor
from bdh_spec import model
from bdh_spec.errors import BDHError
from bdh_spec.int8 import AXES
from bdh_spec.params import Array, Params
from bdh_spec.rope import rotation

SENTENCE = b"The dragon hatches."
MOST_LAYERS = 100  # that are run: layers share weights, so a small file may claim any number of them


class DisagreementError(BDHError):
    """A file that does not hold what was written to it."""


def compare(written: Checkpoint, wanted: Checkpoint) -> None:
    """Refuse a file that differs in a single bit of a weight or in its configuration."""
    if written.config.as_dict() != wanted.config.as_dict():
        raise DisagreementError(f"the file read back has {written.config}, wanted {wanted.config}: nothing was left there")
    if written.config != wanted.config:
        raise DisagreementError(
            "the frequencies read back differ from what was written: nothing was left there, check the disk"
        )
    for actual, expected in zip(written.weights, wanted.weights, strict=True):
        if not same_bits(actual, expected):
            raise DisagreementError(
                f"{expected.name} read back differs from what was written: nothing was left there, check the disk"
            )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and every bit, NaNs included; weights in int8 in their values and scales."""
    if isinstance(a, Scaled) and isinstance(b, Scaled):
        return same_bits(a.values, b.values) and same_bits(a.scale, b.scale)
    return (a.shape, a.dtype) == (b.shape, b.dtype) and _digest(a) == _digest(b)


def _digest(tensor: Tensor) -> bytes:
    """The SHA-256 of the values, so that only one of two tensors need be in memory."""
    return hashlib.sha256(raw_bytes(tensor.load())).digest()


def rounding(before: Checkpoint, after: Checkpoint) -> dict[str, float]:
    """How far each weight is off: the 2-norm of the difference over that of the weight, in the worst of its columns (R17)."""
    return {b.name: _worst_column(b, a) for b, a in zip(before.weights, after.weights, strict=True)}


def _worst_column(before: Tensor, after: Tensor) -> float:
    was = before.load().astype(np.float64)
    difference, axis = after.load() - was, getattr(AXES, before.name)
    off, size = (np.sqrt(np.square(values).sum(axis)) for values in (difference, was))
    return float(np.divide(off, size, out=np.zeros_like(off), where=size > 0).max())


def traffic(checkpoint: Checkpoint) -> int:
    """How many bytes of weights are read for one loss."""
    weights = checkpoint.weights
    layer = sum(weight.nbytes for weight in (weights.encoder, weights.encoder_v, weights.decoder))
    layers = min(checkpoint.config.n_layer, MOST_LAYERS)
    return int(weights.embed.nbytes + layers * layer + weights.lm_head.nbytes)


def loss(checkpoint: Checkpoint, table: Array | None = None) -> float:
    """The specification's loss on one sentence, in nats per byte, of a model of at most ``MOST_LAYERS`` layers.

    It computes by the frequencies of its configuration, or by a ``table`` that its file holds instead.
    """
    config = checkpoint.config
    table = model.frequencies_of(config) if table is None else table
    if not np.isfinite(table).all():
        return float("nan")
    dtype = F64 if any(weight.dtype == F64 for weight in checkpoint.weights) else F32
    weights = Params(*(Operand(weight.cast(dtype)) for weight in checkpoint.weights))
    text = np.frombuffer(SENTENCE, np.uint8).astype(np.int64)[None] % config.vocab_size
    tokens, targets = text[:, :-1], text[:, 1:]
    cos, sin = rotation(0, tokens.shape[1], table, dtype, "exact")
    with np.errstate(all="ignore"):  # weights that are not finite were let through on purpose
        x = model.embed(tokens, weights)
        for _ in range(min(config.n_layer, MOST_LAYERS)):
            x = model.layer(x, weights, cos, sin).x  # one layer at a time, of which nothing else is kept
        return model.loss(model.readout(x, weights), targets)


class Operand:
    """A weight that is in memory only while the specification uses it."""

    __array_ufunc__ = None  # so that NumPy leaves ``x @ operand`` to __rmatmul__

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self.dtype = tensor, tensor.dtype

    def __rmatmul__(self, x: Array) -> Array:
        return x @ self._tensor.load()

    def __getitem__(self, tokens: Array) -> Array:
        return self._tensor.load()[tokens]
