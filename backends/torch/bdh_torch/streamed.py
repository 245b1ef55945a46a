"""One layer, R3 to R9, that never holds all neurons: heads one after the other, their neurons in blocks.

The same function as ``layer.layer``, the form to read beside the specification. There a dozen tensors (B, nh, T, N) pass
through memory; here what is that wide lives for one head, and is worked on while a block of it is in the cache. A gradient
keeps of a layer what has no axis N, and computes the rest again.

A text is cut into chunks. Within one, tokens see one another by scores; what came before, they see through the state (R13), of
which again one block is at hand. A text of one chunk is read in the parallel form; the cost of more grows by the chunk.

Axes: B batch, T time, N neurons per head, D embedding width; R rows, which are the tokens of G texts, one text after the other;
C rows of a text in a chunk; n neurons of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdh_torch.layer import Weights, layer_norm, wide
from bdh_torch.rope import Rotations

BLOCK = 2**21  # bytes of a block of neurons: what a core keeps near it
TOGETHER = 512  # rows of short texts that are read at once
PIECE = 2048  # rows of a long text whose neurons wait for the gate: their attention has to be known first
STEP = 128  # rows whose scores are computed at once, up to their own diagonal

_threshold = torch.ops.aten.threshold_backward  # the slope of a relu, given what it returned


@dataclass(frozen=True)
class Rows:
    """How rows are read: ``texts`` of them together, each in one chunk, or one text in chunks of ``chunk``."""

    texts: int
    time: int
    chunk: int

    def chunks(self, start: int, stop: int) -> list[tuple[int, slice]]:
        """The number and the rows of each chunk of a piece."""
        width = self.texts * self.chunk
        return [(first // width, slice(first, min(first + width, stop))) for first in range(start, stop, width)]

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Whole chunks whose neurons are held together."""
        rows, width = self.texts * self.time, self.texts * self.chunk
        length = max(PIECE // width, 1) * width
        return ((first, min(first + length, rows)) for first in range(0, rows, length))

    def all_chunks(self) -> list[tuple[int, slice]]:
        return self.chunks(0, self.texts * self.time)

    def by_text(self, values: Tensor) -> Tensor:
        """Rows (R, K) as (G, C, K)."""
        return torch.unflatten(values, 0, (self.texts, -1))


def groups(B: int, T: int, chunk: int) -> Iterator[tuple[slice, slice, Rows]]:
    """The texts that are read together, their rows, and how."""
    texts = max(TOGETHER // T, 1) if chunk >= T else 1
    for first in range(0, B, texts):
        last = min(first + texts, B)
        yield slice(first, last), slice(first * T, last * T), Rows(last - first, T, min(chunk, T))


def blocks(n_neurons: int, rows: int, itemsize: int) -> list[slice]:
    """Neurons that are worked on at once: as many as fit near a core, in whole vectors and pairs."""
    width = max(BLOCK // (rows * itemsize) // 64, 1) * 64
    return [slice(first, min(first + width, n_neurons)) for first in range(0, n_neurons, width)]


def gated(
    x: Tensor,
    weights: Weights,
    rotations: Rotations,
    chunk: int,
    memory: Tensor | None = None,
    *,
    blank: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """x (B, T, D) to what the decoder returns, (B, T, D): all of a layer but its last two norms.

    ``memory`` (h*B, N, D) is the layer's state, which is updated in place, and then no gradient is recorded; ``blank`` says
    that nothing was written to it yet.
    """
    drop = _Dropout(dropout, int(torch.randint(2**62, ()))) if dropout else None  # so that torch.manual_seed decides
    device = x.device.type
    if torch.is_autocast_enabled(device):
        narrow = torch.get_autocast_dtype(device)
        x, weights = x.to(narrow), Weights(*(weight.to(narrow) for weight in weights))
    with torch.autocast(device, enabled=False):
        if memory is None and torch.is_grad_enabled():
            # PyTorch has not typed apply.
            decoded: Tensor = _Gated.apply(x, *weights, rotations, chunk, drop)  # type: ignore[no-untyped-call]
            return decoded
        return _read(x, weights, rotations, chunk, drop, memory, blank=blank)[0]


@dataclass(frozen=True)
class _Dropout:
    """Masks that can be drawn again: each head and chunk has a seed of its own (R8)."""

    p: float
    seed: int

    def mask(self, shape: Sequence[int], like: Tensor, head: int, row: int) -> Tensor:
        """0, or 1/(1-p) where a value is kept."""
        (seed,) = np.random.SeedSequence((self.seed, head, row)).generate_state(1)  # all that a generator on a CPU reads of one
        generator = torch.Generator(like.device).manual_seed(int(seed))
        return like.new_empty(shape).bernoulli_(1 - self.p, generator=generator).div_(1 - self.p)


def _read(
    x: Tensor,
    weights: Weights,
    rotations: Rotations,
    chunk: int,
    dropout: _Dropout | None,
    memory: Tensor | None,
    *,
    blank: bool,
    keeps: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """What the decoder returns, and what a gradient keeps, if it does: attention and scores of each group of texts and head."""
    (B, T, D), nh = x.shape, len(weights.encoder)
    rows_of_x = x.reshape(B * T, D)
    decoded, kept = x.new_zeros(B * T, D, dtype=wide(x.dtype)), []
    for texts, span, rows in groups(B, T, chunk):
        for h in range(nh):
            head = _Head(rows_of_x[span], weights, h, rotations, rows, dropout, span.start)
            state = None if memory is None else torch.unflatten(memory, 0, (nh, B))[h, texts]  # G N D
            attention, scores = head.read(decoded[span], state, blank=blank)
            kept += [attention, scores] if keeps else []
    return decoded.view(B, T, D), kept


class _Head:
    """One head of texts that are read together, and what it computes of them."""

    def __init__(
        self, x: Tensor, weights: Weights, h: int, rotations: Rotations, rows: Rows, dropout: _Dropout | None, first: int
    ) -> None:
        self.N = weights.encoder.shape[2]
        self.x, self.h, self.rotations, self.rows, self.dropout, self.first = x, h, rotations, rows, dropout, first
        self.v = x.to(wide(x.dtype))  # R D
        self.encoder, self.encoder_v = weights.encoder[h], weights.encoder_v[h]  # D N
        self.decoder = weights.decoder[h * self.N : (h + 1) * self.N]  # N D
        self.blocks = blocks(self.N, rows.texts * rows.chunk, x.element_size())

    def read(self, decoded: Tensor, state: Tensor | None, *, blank: bool) -> tuple[Tensor, Tensor]:
        """Attention (R, D) and scores (chunks, G, C, C); what the decoder makes of this head is added to ``decoded``."""
        rows = self.rows
        if state is None and rows.time > rows.chunk:
            state, blank = self.v.new_zeros(1, self.N, self.v.shape[1]), True
        attention = torch.zeros_like(self.v)
        scores = self.v.new_zeros(len(rows.all_chunks()), rows.texts, rows.chunk, rows.chunk)
        for start, stop in rows.pieces():
            neurons = self.x.new_empty(stop - start, self.N)
            chunks = [
                (number, part, neurons[part.start - start : part.stop - start]) for number, part in rows.chunks(start, stop)
            ]
            for block in self.blocks:
                for number, part, own in chunks:
                    rotated = self.excite(part, own, number, block)
                    _add_scores(scores[number], rotated)
                    if state is not None:
                        seen = None if blank and not number else rows.by_text(attention[part])
                        _see_and_remember(state[:, block], rotated, rows.by_text(self.v[part]), seen)
            for number, part, own in chunks:
                C = (part.stop - part.start) // rows.texts
                similar = scores[number, :, :C, :C].tril_(-1).to(self.x.dtype)  # G C C  R5
                rows.by_text(attention[part]).add_(similar @ rows.by_text(self.x[part]))
                self.gate(part, own, attention[part])
                _add_product(decoded[part], own, self.decoder)  # R9
        return attention, scores.to(self.x.dtype)

    def excite(self, part: slice, own: Tensor, number: int, block: slice) -> Tensor:
        """The neurons of a block, written to ``own`` (R, N), and turned, (G, C, n) (R3, R4)."""
        neurons = torch.mm(self.x[part], self.encoder[:, block], out=own[:, block]).relu_()
        return rotate(neurons, self.rotations, number, block, self.rows.texts)

    def gate(self, part: slice, own: Tensor, attention: Tensor) -> None:
        """Multiply neurons ``own`` (R, N) by what the attention opens of them, and drop some (R6 to R8)."""
        yKV = layer_norm(attention).to(own.dtype)
        for block in self.blocks:
            own[:, block].mul_(torch.mm(yKV, self.encoder_v[:, block]).relu_())
        if self.dropout:
            own.mul_(self.dropout.mask(own.shape, own, self.h, self.first + part.start))


def rotate(neurons: Tensor, rotations: Rotations, number: int, block: slice, texts: int, *, back: bool = False) -> Tensor:
    """Neurons (R, n) or (G, C, n) of a chunk, each pair turned by its phase (R4) or turned back: (G, C, n)."""
    by_text = neurons if neurons.ndim == 3 else torch.unflatten(neurons, 0, (texts, -1))  # G C n
    pairs = torch.view_as_complex(torch.unflatten(by_text.to(wide(neurons.dtype)), -1, (-1, 2)))  # G C n/2
    half = slice(block.start // 2, block.stop // 2)
    table = rotations.local[: pairs.shape[1], half]
    turned = pairs * (table.conj() if back else table)
    if number:
        shift = rotations.shifts[number, half]
        turned *= shift.conj() if back else shift
    return torch.view_as_real(turned).flatten(-2).to(neurons.dtype)


def _add_scores(scores: Tensor, rotated: Tensor) -> None:
    """Add a block's similarities to (G, C, C), as far as the diagonal."""
    C = rotated.shape[1]
    for first in range(0, C, STEP):
        last = min(first + STEP, C)
        _add_product(scores[:, first:last, :last], rotated[:, first:last], rotated[:, :last].mT)


def _see_and_remember(state: Tensor, rotated: Tensor, v: Tensor, attention: Tensor | None) -> None:
    """Add to the attention what a block of the state, (G, n, D), holds for these tokens; then write them to it (R13)."""
    rotated = rotated.to(state.dtype)
    if attention is not None:
        _add_product(attention, rotated, state)
    _add_product(state, rotated.mT, v)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, which is rounded before if it is narrower."""
    if total.dtype != a.dtype:
        total.add_(a @ b)
    elif total.ndim == 2:
        total.addmm_(a, b)
    elif len(total) == 1:
        total[0].addmm_(a[0], b[0])
    else:
        total.baddbmm_(a, b)


class _Gated(torch.autograd.Function):
    """``gated`` from the start of a text on, with its gradient (R15)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        encoder: Tensor,
        encoder_v: Tensor,
        decoder: Tensor,
        rotations: Rotations,
        chunk: int,
        dropout: _Dropout | None,
    ) -> Tensor:
        weights, ctx.chunk, ctx.dropout = Weights(encoder, encoder_v, decoder), chunk, dropout
        decoded, kept = _read(x, weights, rotations, chunk, dropout, None, blank=True, keeps=True)
        ctx.save_for_backward(x, *weights, *rotations, *kept)
        return decoded

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_decoded: Tensor) -> tuple[Tensor | None, ...]:
        x, encoder, encoder_v, decoder, local, shifts, *kept = ctx.saved_tensors
        weights, rotations = Weights(encoder, encoder_v, decoder), Rotations(local, shifts)
        (B, T, D), remembered = x.shape, iter(kept)
        d_weights = Weights(*(torch.zeros_like(weight, dtype=wide(weight.dtype)) for weight in weights))
        d_x = x.new_zeros(B * T, D, dtype=wide(x.dtype))
        rows_of_x, rows_of_d = x.reshape(B * T, D), d_decoded.reshape(B * T, D).to(x.dtype)
        heads = [(h, span, rows) for _, span, rows in groups(B, T, ctx.chunk) for h in range(len(encoder))]
        with torch.autocast(x.device.type, enabled=False):
            for h, span, rows in heads:
                head = _Backward(rows_of_x[span], weights, h, rotations, rows, ctx.dropout, span.start).into(d_weights)
                d_attention = head.undo_gate(rows_of_d[span], next(remembered))
                head.undo_attention(d_attention, next(remembered), d_x[span])
        slopes = (slope.to(weight.dtype) for slope, weight in zip(d_weights, weights, strict=True))
        return d_x.view(B, T, D).to(x.dtype), *slopes, None, None, None


class _Backward(_Head):
    """The gradient of one head. ``neurons`` (R, N) are x_sparse once more, ``waiting`` their slopes by way of the gate."""

    def into(self, d_weights: Weights) -> _Backward:
        """Add the slopes of this head's weights to these."""
        self.d_encoder, self.d_encoder_v = d_weights.encoder[self.h], d_weights.encoder_v[self.h]
        self.d_decoder = d_weights.decoder[self.h * self.N : (self.h + 1) * self.N]
        self.neurons, self.waiting = self.x.new_empty(len(self.x), self.N), self.x.new_empty(len(self.x), self.N)
        return self

    def undo_gate(self, d_decoded: Tensor, attention: Tensor) -> Tensor:
        """Undo R9 to R6: the slope in the attention, (R, D)."""
        yKV, d_yKV = layer_norm(attention).to(self.x.dtype), torch.zeros_like(attention)
        for _, part in self.rows.all_chunks():
            neurons = self.neurons[part]
            mask = self.dropout.mask(neurons.shape, neurons, self.h, self.first + part.start) if self.dropout else None
            for block in self.blocks:
                x_sparse = torch.mm(self.x[part], self.encoder[:, block], out=neurons[:, block]).relu_()
                y_sparse = torch.mm(yKV[part], self.encoder_v[:, block]).relu_()
                xy_sparse = x_sparse * y_sparse
                d_xy = torch.mm(d_decoded[part], self.decoder[block].T)
                if mask is not None:
                    xy_sparse.mul_(mask[:, block])
                    d_xy.mul_(mask[:, block])
                _add_product(self.d_decoder[block], xy_sparse.T, d_decoded[part])
                torch.mul(d_xy, y_sparse, out=self.waiting[part, block])
                d_before = _threshold(d_xy.mul_(x_sparse), y_sparse, 0)  # before the relu
                _add_product(self.d_encoder_v[:, block], yKV[part].T, d_before)
                _add_product(d_yKV[part], d_before, self.encoder_v[:, block].T)
        return _undo_norm(attention, d_yKV)

    def undo_attention(self, d_attention: Tensor, scores: Tensor, d_x: Tensor) -> None:
        """Undo R5 to R3: add to the slope in x, (R, D)."""
        rows, chunks, dtype = self.rows, self.rows.all_chunks(), self.x.dtype
        sides = []
        for number, part in chunks:
            C = (part.stop - part.start) // rows.texts
            d, v = rows.by_text(d_attention[part]), rows.by_text(self.x[part])
            rows.by_text(d_x[part]).add_(scores[number, :, :C, :C].to(dtype).mT @ d.to(dtype))  # values
            one_side = (d.to(dtype) @ v.mT).tril_(-1)
            sides.append(one_side + one_side.mT)  # a row counts as query and as key
        for block in self.blocks:
            self._undo_block(block, chunks, sides, d_attention, d_x)

    def _undo_block(
        self, block: slice, chunks: list[tuple[int, slice]], sides: list[Tensor], d_attention: Tensor, d_x: Tensor
    ) -> None:
        rows, x = self.rows, self.v
        rotated = [rotate(self.neurons[part, block], self.rotations, number, block, rows.texts) for number, part in chunks]
        states = self._states(rotated, chunks, x)
        d_state = None
        for number, part in reversed(chunks):
            d_rotated = sides[number] @ rotated[number]  # G C n
            if states:
                queries, v, d = rotated[number][0].to(x.dtype), x[part], d_attention[part]
                if number:
                    d_rotated[0].add_(d @ states[number].T)
                if d_state is not None:
                    d_rotated[0].add_(v @ d_state.T)
                    _add_product(d_x[part], queries, d_state)
                d_state = queries.T @ d if d_state is None else d_state.addmm_(queries.T, d)
            turned = rotate(d_rotated, self.rotations, number, block, rows.texts, back=True).flatten(0, 1)  # R n
            d_before = _threshold(turned.add_(self.waiting[part, block]), self.neurons[part, block], 0)
            _add_product(self.d_encoder[:, block], self.x[part].T, d_before)
            _add_product(d_x[part], d_before, self.encoder[:, block].T)

    def _states(self, rotated: list[Tensor], chunks: list[tuple[int, slice]], x: Tensor) -> list[Tensor]:
        """A block of the state, (n, D), before each chunk; none for a text of one chunk."""
        if len(chunks) == 1:
            return []
        states = [x.new_zeros(rotated[0].shape[-1], x.shape[1])]
        for number, part in chunks[:-1]:
            states.append(torch.addmm(states[-1], rotated[number][0].to(x.dtype).T, x[part]))
        return states


def _undo_norm(values: Tensor, d_normed: Tensor) -> Tensor:
    """Undo R2."""
    with torch.enable_grad():
        leaf = values.detach().requires_grad_()
        (slope,) = torch.autograd.grad(layer_norm(leaf), leaf, d_normed)
    return slope
