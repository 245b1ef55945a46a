"""One layer, R3 to R9, that never holds all neurons: heads one after the other, their neurons in blocks.

The same function as ``layer.layer``, the form to read beside the specification. There a dozen tensors (B, nh, T, N) pass
through memory; here what is that wide lives for one head of a chunk, and is worked on while a block of it is in the cache. A
gradient keeps of a layer what has no axis N, and computes the rest again.

Weights are read where they are, in the order that they have: nothing is repacked that an edit could leave stale. What is done
to neurons between products is in ``elements``.

A text is cut into chunks. Within one, tokens see one another by scores; what came before, they see through the state (R13), of
which again one block is at hand. A text of one chunk is read in the parallel form; the cost of more grows by the chunk.

Axes: B batch, T time, N neurons per head, D embedding width; R rows, which are the tokens of G texts, one text after the other;
C rows of a text in a chunk; n neurons of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bdh_torch.attention import of_products
from bdh_torch.elements import Phases, gate, phases, relu_and_turn, undo_gate, undo_turn
from bdh_torch.forms import fuses
from bdh_torch.layer import Weights, layer_norm, refuse_second_derivatives, undo_norm, wide
from bdh_torch.rope import Rotations

BLOCK = 2**21  # bytes of a block of neurons: what a core keeps near it
TOGETHER = 512  # rows of short texts that are read at once
STEP = 128  # rows whose scores are computed at once, up to their own diagonal


class Sizes(NamedTuple):
    """The same three."""

    block: int
    together: int
    step: int


# On a GPU without Triton: blocks that its cache of tens of megabytes holds, and few launches. Counted and not measured.
ON_GPU = Sizes(2**25, 4096, 512)


def sizes(x: Tensor) -> Sizes:
    """What is worked on at once on the device of x."""
    return ON_GPU if x.is_cuda else Sizes(BLOCK, TOGETHER, STEP)


@dataclass(frozen=True)
class Rows:
    """How rows are read: ``texts`` of them together, each in one chunk, or one text in chunks of ``chunk``."""

    texts: int
    time: int
    chunk: int

    def chunks(self) -> list[tuple[int, slice]]:
        """The number and the rows of each chunk."""
        rows, width = self.texts * self.time, self.texts * self.chunk
        return [(first // width, slice(first, min(first + width, rows))) for first in range(0, rows, width)]

    def by_text(self, values: Tensor) -> Tensor:
        """Rows (R, K) as (G, C, K)."""
        return torch.unflatten(values, 0, (self.texts, -1))


def groups(B: int, T: int, chunk: int, together: int) -> Iterator[tuple[slice, slice, Rows]]:
    """The texts that are read together, some ``together`` rows, their rows, and how."""
    texts = max(together // T, 1) if chunk >= T else 1
    for first in range(0, B, texts):
        last = min(first + texts, B)
        yield slice(first, last), slice(first * T, last * T), Rows(last - first, T, min(chunk, T))


def blocks(n_neurons: int, rows: int, itemsize: int, block: int) -> list[slice]:
    """Neurons that are worked on at once: as many as fit into ``block`` bytes, in whole vectors and pairs."""
    width = max(block // (rows * itemsize) // 64, 1) * 64
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
    kept: Tensor | None = None,
) -> Tensor:
    """x (B, T, D) to what the decoder returns, (B, T, D): all of a layer but its last two norms.

    ``memory`` (h*B, N, D) is the layer's state, which is updated in place, and then no gradient is recorded; ``blank`` says
    that nothing was written to it yet. Where ``kept`` (B, T) is 0 there is padding, which nobody sees.
    """
    seed = int(torch.randint(2**62, ())) if dropout else 0  # so that torch.manual_seed decides
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        if fuses(x):
            return _fuse(x, weights, kept, rotations, chunk, (dropout, seed), memory, blank=blank)
        drop = _Dropout(dropout, seed) if dropout else None
        if memory is None and torch.is_grad_enabled():
            decoded: Tensor = _Gated.apply(  # type: ignore[no-untyped-call]  # PyTorch has not typed it
                x, *weights, kept, rotations, chunk, drop
            )
            return decoded
        return _read(x, weights, kept, rotations, chunk, drop, memory, blank=blank)[0]


def _fuse(
    x: Tensor,
    weights: Weights,
    kept: Tensor | None,
    rotations: Rotations,
    chunk: int,
    dropout: tuple[float, int],
    memory: Tensor | None,
    *,
    blank: bool,
) -> Tensor:
    """The same by the kernels of a GPU."""
    fused = import_module("bdh_torch.fused")  # by name: code that is saved beside weights does without it and without Triton
    drop = fused.Dropout(*dropout)
    if memory is None and torch.is_grad_enabled():
        return fused.Gated.apply(x, *weights, kept, rotations, chunk, drop)
    return fused.read(x, weights, kept, rotations, chunk, drop, memory, blank=blank)


@dataclass(frozen=True)
class _Dropout:
    """Masks that can be drawn again: each head and chunk has a seed of its own (R8)."""

    p: float
    seed: int

    def mask(self, shape: Sequence[int], like: Tensor, head: int, row: int) -> Tensor:
        """0, or 1/(1-p) where a value is kept."""
        if self.p == 1:
            return like.new_zeros(shape)
        (seed,) = np.random.SeedSequence((self.seed, head, row)).generate_state(1)  # all that a generator on a CPU reads of one
        generator = torch.Generator(like.device).manual_seed(int(seed))
        return like.new_empty(shape).bernoulli_(1 - self.p, generator=generator).div_(1 - self.p)


def _read(
    x: Tensor,
    weights: Weights,
    kept: Tensor | None,
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
    rows_of_x, rows_of_v = x.reshape(B * T, D), _values(x, kept)
    decoded, found = x.new_zeros(B * T, D, dtype=wide(x.dtype)), list[Tensor]()
    room = x.new_empty(0)
    for texts, span, rows in groups(B, T, chunk, sizes(x).together):
        if room.numel() == 0:  # the first group is the largest
            room = x.new_empty(2, rows.texts * rows.chunk, weights.encoder.shape[2])
        for h in range(nh):
            head = _Head(rows_of_x[span], rows_of_v[span], weights, h, rotations, rows, dropout, span.start)
            state = None if memory is None else torch.unflatten(memory, 0, (nh, B))[h, texts]  # G N D
            attention, scores = head.read(decoded[span], state, room, blank=blank, keeps=keeps)
            found += [attention, scores] if keeps else []
    return decoded.view(B, T, D), found


def _values(x: Tensor, kept: Tensor | None) -> Tensor:
    """What tokens see of one another: x (B, T, D) as rows (R, D), those of padding zero."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if kept is None else rows * kept.reshape(-1, 1).to(x.dtype)


class _Head:
    """One head of texts that are read together, and what it computes of them."""

    def __init__(
        self,
        x: Tensor,
        v: Tensor,
        weights: Weights,
        h: int,
        rotations: Rotations,
        rows: Rows,
        dropout: _Dropout | None,
        first: int,
    ) -> None:
        self.N = weights.encoder.shape[2]
        self.x, self.v, self.h, self.rotations, self.rows, self.dropout, self.first = x, v, h, rotations, rows, dropout, first
        self.encoder, self.encoder_v = weights.encoder[h].to(x.dtype), weights.encoder_v[h].to(x.dtype)  # D N
        self.decoder = weights.decoder[h * self.N : (h + 1) * self.N].to(x.dtype)  # N D
        self.blocks = blocks(self.N, rows.texts * rows.chunk, x.element_size(), sizes(x).block)

    def read(self, decoded: Tensor, state: Tensor | None, room: Tensor, *, blank: bool, keeps: bool) -> tuple[Tensor, Tensor]:
        """Attention (R, D) and scores (chunks, G, C, C), the last chunk's unless it ``keeps`` all.

        What the decoder makes of this head is added to ``decoded``. ``room`` (2, G*C, N) is overwritten.
        """
        rows, chunks = self.rows, self.rows.chunks()
        if state is None and len(chunks) > 1:
            state, blank = self.v.new_zeros(1, self.N, self.v.shape[1], dtype=wide(self.v.dtype)), True
        attention = torch.empty_like(self.v, dtype=wide(self.v.dtype))
        scores = self.x.new_zeros(len(chunks) if keeps else 1, rows.texts, rows.chunk, rows.chunk)
        for number, part in chunks:
            neurons, rotated = room[:, : part.stop - part.start]
            for block in self.blocks:
                self.excite(part, block, neurons[:, block])
                relu_and_turn(neurons[:, block], self.phases(self.rotations, number, block, part), rotated[:, block])
            queries, v, seen = (rows.by_text(values) for values in (rotated, self.v[part], attention[part]))  # G C K
            C = queries.shape[1]
            similar = _similarities(queries, scores[number if keeps else 0, :, :C, :C])
            _product(similar, v, seen)  # R5
            if state is not None:
                _see_and_remember(state, queries, v, None if blank and not number else seen)
            self.gate(part, neurons, rotated, attention[part])
            _add_product(decoded[part], neurons, self.decoder)  # R9
        return attention, scores

    def excite(self, part: slice, block: slice, out: Tensor) -> Tensor:
        """Write the neurons of a block before their relu, (R, n), to ``out`` (R3)."""
        return torch.mm(self.x[part], self.encoder[:, block], out=out)

    def phases(self, rotations: Rotations, number: int, block: slice, part: slice) -> Phases:
        """How far a block of the rows of a chunk turns."""
        return phases(rotations, number, block, (part.stop - part.start) // self.rows.texts)

    def gate(self, part: slice, neurons: Tensor, room: Tensor, attention: Tensor) -> None:
        """Multiply neurons (R, N) by what the attention opens of them, and drop some (R6 to R8)."""
        yKV = layer_norm(attention).to(neurons.dtype)
        for block in self.blocks:
            gate(neurons[:, block], torch.mm(yKV, self.encoder_v[:, block], out=room[:, block]))
        if self.dropout:
            neurons.mul_(self.dropout.mask(neurons.shape, neurons, self.h, self.first + part.start))


def _similarities(rotated: Tensor, out: Tensor) -> Tensor:
    """Write the scores of rows (G, C, N) to (G, C, C), in which what is above the diagonal is zero already (R5)."""
    if len(out) > 1:
        torch.bmm(rotated, rotated.mT, out=out)
    else:
        step = sizes(out).step
        for first in range(0, out.shape[1], step):
            rows = slice(first, min(first + step, out.shape[1]))
            torch.mm(rotated[0, rows], rotated[0, : rows.stop].T, out=out[0, rows, : rows.stop])
    return out.tril_(-1)


def _see_and_remember(state: Tensor, rotated: Tensor, v: Tensor, attention: Tensor | None) -> None:
    """Add to the attention what the state, (G, N, D), holds for these tokens; then write them to it (R13)."""
    kind = of_products(rotated, state.dtype)
    rotated, v = rotated.to(kind), v.to(kind)
    if attention is not None:
        _add_product(attention, rotated, state.to(kind))
    _add_product(state, rotated.mT, v)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, one text after the other."""
    if out.dtype != a.dtype or len(out) > 1:
        out.copy_(a @ b)
    else:
        torch.mm(a[0], b[0], out=out[0])


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
        kept: Tensor | None,
        rotations: Rotations,
        chunk: int,
        dropout: _Dropout | None,
    ) -> Tensor:
        weights, ctx.chunk, ctx.dropout = Weights(encoder, encoder_v, decoder), chunk, dropout
        decoded, found = _read(x, weights, kept, rotations, chunk, dropout, None, blank=True, keeps=True)
        ctx.save_for_backward(x, *weights, kept, *rotations, *found)
        return decoded

    @staticmethod
    def backward(ctx: Any, d_decoded: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        x, encoder, encoder_v, decoder, kept, local, shifts, *found = ctx.saved_tensors
        weights, rotations = Weights(encoder, encoder_v, decoder), Rotations(local, shifts)
        (B, T, D), remembered = x.shape, iter(found)
        d_weights = Weights(*(weight.new_zeros(weight.shape, dtype=wide(weight.dtype)) for weight in weights))
        d_x, rows_of_x, rows_of_v = x.new_zeros(B * T, D, dtype=wide(x.dtype)), x.reshape(B * T, D), _values(x, kept)
        d_v = d_x if kept is None else torch.zeros_like(d_x)
        rows_of_d = d_decoded.reshape(B * T, D).to(x.dtype)
        heads = [(h, span, rows) for _, span, rows in groups(B, T, ctx.chunk, sizes(x).together) for h in range(len(encoder))]
        with torch.autocast(x.device.type, enabled=False):
            back = Rotations(*(table.conj().resolve_conj() for table in rotations))
            for h, span, rows in heads:
                head = _Backward(rows_of_x[span], rows_of_v[span], weights, h, rotations, rows, ctx.dropout, span.start)
                head.into(d_weights, d_x[span], d_v[span])
                d_attention = head.undo_gate(rows_of_d[span], next(remembered))
                head.undo_attention(d_attention, next(remembered), back)
        if kept is not None:
            d_x.addcmul_(d_v, kept.reshape(-1, 1).to(d_v.dtype))
        slopes = (slope.to(weight.dtype) for slope, weight in zip(d_weights, weights, strict=True))
        return d_x.view(B, T, D).to(x.dtype), *slopes, None, None, None, None


class _Backward(_Head):
    """The gradient of one head. ``neurons`` (R, N) are x_sparse once more, ``waiting`` their slopes by way of the gate."""

    def into(self, d_weights: Weights, d_x: Tensor, d_v: Tensor) -> None:
        """Add the slopes of this head's weights, of its rows and of its values to these."""
        self.d_encoder, self.d_encoder_v = d_weights.encoder[self.h], d_weights.encoder_v[self.h]
        self.d_decoder = d_weights.decoder[self.h * self.N : (self.h + 1) * self.N]
        self.d_x, self.d_v = d_x, d_v
        self.neurons, self.waiting = self.x.new_empty(2, len(self.x), self.N)

    def undo_gate(self, d_decoded: Tensor, attention: Tensor) -> Tensor:
        """Undo R9 to R6: the slope in the attention, (R, D)."""
        yKV, d_yKV = layer_norm(attention).to(self.x.dtype), torch.zeros_like(attention)
        largest = max(block.stop - block.start for block in self.blocks) * self.rows.texts * self.rows.chunk
        room = self.x.new_empty(2, largest)  # which two blocks have after one another: memory that is new is slow
        for _, part in self.rows.chunks():
            neurons = self.neurons[part]
            mask = self.dropout.mask(neurons.shape, neurons, self.h, self.first + part.start) if self.dropout else None
            for block in self.blocks:
                x_sparse = self.excite(part, block, neurons[:, block])
                width = x_sparse.shape[1]
                xy_sparse, d_before = (one[: len(x_sparse) * width].view(-1, width) for one in room)
                torch.mm(yKV[part], self.encoder_v[:, block], out=xy_sparse)
                torch.mm(d_decoded[part], self.decoder[block].T, out=d_before)
                undo_gate(x_sparse, xy_sparse, d_before, self.waiting[part, block], None if mask is None else mask[:, block])
                _add_product(self.d_decoder[block], xy_sparse.T, d_decoded[part])
                _add_product(self.d_encoder_v[:, block], yKV[part].T, d_before)
                _add_product(d_yKV[part], d_before, self.encoder_v[:, block].T)
        return undo_norm(attention, d_yKV)

    def undo_attention(self, d_attention: Tensor, scores: Tensor, back: Rotations) -> None:
        """Undo R5 to R3: add to the slopes in x and in values, (R, D)."""
        rows, chunks, dtype = self.rows, self.rows.chunks(), self.x.dtype
        sides = []
        for number, part in chunks:
            C = (part.stop - part.start) // rows.texts
            d, v = rows.by_text(d_attention[part]), rows.by_text(self.v[part])
            rows.by_text(self.d_v[part]).add_(scores[number, :, :C, :C].mT @ d.to(dtype))
            one_side = (d.to(dtype) @ v.mT).tril_(-1)
            sides.append(one_side + one_side.mT)  # a row counts as query and as key
        kind = of_products(self.x, wide(dtype))
        d_attention, values = d_attention.to(kind), self.v.to(kind)
        for block in self.blocks:
            self._undo_block(block, chunks, sides, d_attention, values, back)

    def _undo_block(
        self,
        block: slice,
        chunks: list[tuple[int, slice]],
        sides: list[Tensor],
        d_attention: Tensor,
        values: Tensor,
        back: Rotations,
    ) -> None:
        rotated = [self._rotated(part, number, block) for number, part in chunks]  # G C n
        states = self._states(rotated, chunks, values)
        d_state = torch.zeros_like(states[0]) if states else self.d_v.new_empty(0)
        for number, part in reversed(chunks):
            d_rotated = sides[number] @ rotated[number]  # G C n
            if states:
                queries, v, d = rotated[number][0].to(values.dtype), values[part], d_attention[part]
                if number:
                    d_rotated[0].add_(d @ states[number].to(d.dtype).T)
                if number + 1 < len(chunks):
                    slope = d_state.to(v.dtype)
                    d_rotated[0].add_(v @ slope.T)
                    _add_product(self.d_v[part], queries, slope)
                _add_product(d_state, queries.T, d)
            d_before = d_rotated.flatten(0, 1)  # R n
            undo_turn(d_before, self.phases(back, number, block, part), self.waiting[part, block], self.neurons[part, block])
            _add_product(self.d_encoder[:, block], self.x[part].T, d_before)
            _add_product(self.d_x[part], d_before, self.encoder[:, block].T)

    def _rotated(self, part: slice, number: int, block: slice) -> Tensor:
        """The rotated neurons of a block, (G, C, n)."""
        neurons = self.neurons[part, block]  # which their relu leaves as they are
        out = neurons.new_empty(neurons.shape)
        relu_and_turn(neurons, self.phases(self.rotations, number, block, part), out)
        return self.rows.by_text(out)

    def _states(self, rotated: list[Tensor], chunks: list[tuple[int, slice]], values: Tensor) -> list[Tensor]:
        """A block of the state, (n, D), before each chunk; none for a text of one chunk."""
        if len(chunks) == 1:
            return []
        states = [self.d_v.new_zeros(rotated[0].shape[-1], values.shape[1])]
        for number, part in chunks[:-1]:
            states.append(states[-1].clone())
            _add_product(states[-1], rotated[number][0].to(values.dtype).T, values[part])
        return states
