"""The streamed kernel on a GPU: what is done to a neuron is done where its product was computed, before it is written.

The same function as ``streamed.gated`` with its arguments. Products with something done to their elements are kernels of
``fused_kernels``; those without are PyTorch's. All heads of as many texts as fill ROOM are worked on at once. A gradient keeps
of a layer x, attention and scores, and computes the rest again.

What it costs at the default size in bfloat16, for a layer of 16,384 tokens (B = 32, T = 512) and all heads, on an H100 that
copies at 3.0 TB/s and whose products of 8,192 reach 773 TFLOP/s (``bench/gpu_check.py``). A product of rows with a weight is
275 GFLOP, 0.36 ms at that peak; 16,384 rows of neurons of all heads are 1.07 GB, 0.36 ms too.

====================  =====  ==========  ============  ===========
step                  GFLOP  rows moved  ms at either  ms measured
====================  =====  ==========  ============  ===========
excite                275    2           0.7           1.8
compare               410    1           0.5           0.8
gate                  275    2           0.7           1.4
decoder               275    1           0.4           0.5
excite, again         275    2           0.7           1.8
undo_gate             550    4           1.4           3.5
decoder's slope       275    1           0.4           0.5
encoder_v's slope     275    1           0.4           0.5
yKV's slope           275    1           0.4           0.5
undo_turn             550    4           1.4           3.0
encoder's slope       275    1           0.4           0.5
x's slope             275    1           0.4           0.5
====================  =====  ==========  ============  ===========

That is 15 ms, and of six layers 92; sums, norms and casts in between are 9 more. PyTorch's products come near to what a count
allows, and kernels with something to do after theirs take two and a half times as long. That left operands are held, which
halves what passes through the cache, takes a seventh off a step and not the half that the cache alone would have explained; so
what is left is in what is done to elements: pairs that change lanes to be turned, and tiles that are written by short rows.

A kernel that computed y_sparse and the decoder's product without writing anything between would compute x_sparse again, and at
256 columns a product costs as long as its result takes to be written and read: nothing is won by it. Nor by PyTorch's products
with kernels between them, which would move rows 17 times, 6 ms a layer. So rows of all neurons do pass through memory, but once
where the plain form moves them a dozen times, and no more of them are held than fill ROOM.

Texts longer than a chunk see what came before by the state (R13), summed in float32; queries read it rounded to their own type.

Axes: B batch, T time, h head, N neurons per head, D embedding width; R rows, which are C tokens of each of G texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from bdh_torch import fused_kernels as kernels
from bdh_torch.layer import Weights, layer_norm, refuse_second_derivatives, undo_norm
from bdh_torch.rope import Rotations

ROOM = 2**28  # bytes of the neurons of all heads that are worked on at once; some five times as many are held
PROGRAMS = 512  # of a launch, where there is as much to do: some four for each multiprocessor, that all end at the same time
# Scores of at least so many texts of all heads are PyTorch's products, of so many rows at once up to their own diagonal.
MANY, STRIP = 32, 256


class Tiles(NamedTuple):
    """What a program computes, in which steps, and by how many warps; how many steps are loaded ahead.

    Where the axis that is summed over is no longer than ``depth``, there is one step, and the left operand is read once.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def options(self, K: int) -> dict[str, Any]:
        """What a kernel takes that sums over an axis of K."""
        holds = self.depth >= K
        depth = max(triton.next_power_of_2(K), LEAST) if holds else self.depth
        tile = {"HELD": holds, "ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": depth}
        return {**tile, "num_warps": self.warps, "num_stages": self.stages}


LEAST = 16  # the smallest side of a product
# The fastest of four or five of each, measured on an H100.
NARROW = {
    "excite": Tiles(64, 32, 256, 4, 3),
    "compare": Tiles(128, 128, 64, 8, 3),
    "gate": Tiles(128, 32, 256, 8, 2),
    "undo_gate": Tiles(64, 64, 256, 4, 2),
    "undo_turn": Tiles(128, 128, 64, 8, 3),
}
# The same where a left operand is too long to be held, D above 256, chosen by what the compiler reports of registers and shared
# memory for compute capability 9.0.
STEPPED = {
    "excite": Tiles(128, 64, 64, 8, 3),
    "compare": Tiles(128, 128, 64, 8, 3),
    "gate": Tiles(128, 64, 64, 8, 3),
    "undo_gate": Tiles(128, 32, 64, 8, 3),
    "undo_turn": Tiles(128, 128, 64, 8, 3),
}
WIDE = dict.fromkeys(NARROW, Tiles(64, 64, 32, 4, 2))  # of float32
SPANNING = ("excite", "gate", "undo_gate", "undo_turn")  # kernels whose programs work on several tiles of a row


def tiles_of(name: str, dtype: torch.dtype, K: int) -> Tiles:
    """Those of a kernel that sums over an axis of K."""
    if dtype.itemsize == 4:
        return WIDE[name]
    return NARROW[name] if NARROW[name].depth >= K else STEPPED[name]


@dataclass(frozen=True)
class Dropout:
    """Which neurons are dropped: a seed gives the same mask each time it is drawn (R8). It is not the mask of a CPU."""

    p: float = 0.0
    seed: int = 0

    @property
    def scale(self) -> float:
        """What is kept is multiplied by it."""
        return 1 / (1 - self.p) if self.p < 1 else 0.0


def read(
    x: Tensor,
    weights: Weights,
    kept: Tensor | None,
    rotations: Rotations,
    chunk: int,
    dropout: Dropout,
    memory: Tensor | None = None,
    *,
    blank: bool = False,
    found: list[Tensor] | None = None,
) -> Tensor:
    """x (B, T, D) to what the decoder returns, (B, T, D) in float32. Arguments are those of ``streamed.gated``.

    To ``found`` is added what a gradient keeps: attention and scores of each piece.
    """
    (B, _, D), (nh, _, N) = x.shape, weights.encoder.shape
    v, decoded = _values(x, kept), torch.empty_like(x, dtype=torch.float32)
    weights = _contiguous(weights, x.dtype)
    for pieces in _pieces(x, v, weights, rotations, chunk, dropout):
        state = None
        if memory is not None:
            state = torch.unflatten(memory, 0, (nh, B))[:, pieces[0].texts]  # h G N D
        elif len(pieces) > 1:
            state, blank = x.new_zeros(nh, pieces[0].G, N, D, dtype=torch.float32), True
        for piece in pieces:
            neurons, rotated = piece.excite()
            scores = piece.compare(rotated)
            attention = piece.attend(scores)
            if state is not None:
                if piece.number or not blank:
                    piece.see(state, rotated, attention)
                piece.remember(state, rotated)
            xy_sparse = piece.gate(neurons, attention)
            decoded[piece.texts, piece.tokens] = piece.by_text(product(xy_sparse, piece.weights.decoder).sum(0))  # R9
            if found is not None:
                found += [attention, scores]
    return decoded


class Gated(torch.autograd.Function):
    """``read`` from the start of a text on, with its gradient (R15)."""

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
        dropout: Dropout,
    ) -> Tensor:
        weights, ctx.chunk, ctx.dropout, found = Weights(encoder, encoder_v, decoder), chunk, dropout, list[Tensor]()
        decoded = read(x, weights, kept, rotations, chunk, dropout, found=found)
        ctx.save_for_backward(x, *weights, kept, *rotations, *found)
        return decoded

    @staticmethod
    def backward(ctx: Any, d_decoded: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        x, encoder, encoder_v, decoder, kept, local, shifts, *found = ctx.saved_tensors
        given, rotations = Weights(encoder, encoder_v, decoder), Rotations(local, shifts)
        remembered = iter(found)
        with torch.autocast(x.device.type, enabled=False):
            weights = _contiguous(given, x.dtype)
            slopes = _Slopes.zeros(x, weights)
            d_decoded = d_decoded.to(x.dtype)
            for pieces in _pieces(x, _values(x, kept), weights, rotations, ctx.chunk, ctx.dropout):
                _undo(pieces, d_decoded, [(next(remembered), next(remembered)) for _ in pieces], slopes)
            d_x = slopes.x.add_(slopes.v if kept is None else slopes.v * kept[..., None].to(slopes.v.dtype))
        shaped = (slope.view_as(weight).to(weight.dtype) for slope, weight in zip(slopes.weights, given, strict=True))
        return d_x.to(x.dtype), *shaped, None, None, None, None


class _Slopes(NamedTuple):
    """Sums of slopes, in float32."""

    x: Tensor  # B T D
    v: Tensor  # B T D
    weights: Weights  # of (h, D, N) twice, and (h, N, D)

    @classmethod
    def zeros(cls, x: Tensor, weights: Weights) -> _Slopes:
        x, v, *rest = (torch.zeros_like(value, dtype=torch.float32) for value in (x, x, *weights))
        return cls(x, v, Weights(*rest))


class _Piece:
    """C tokens of each of G texts, and what is computed of them."""

    def __init__(
        self,
        x: Tensor,
        v: Tensor,
        weights: Weights,
        rotations: Rotations,
        number: int,
        texts: slice,
        tokens: slice,
        dropout: Dropout,
    ) -> None:
        self.x, self.v = (values[texts, tokens].contiguous() for values in (x, v))  # G C D
        self.texts, self.tokens, self.number, self.weights, self.dropout = texts, tokens, number, weights, dropout
        self.h, self.N, self.T = len(weights.encoder), weights.encoder.shape[2], x.shape[1]
        self.G, self.C, self.D = self.x.shape
        self.phases = torch.view_as_real(rotations.local), torch.view_as_real(rotations.shifts[number])

    @property
    def rows(self) -> Tensor:
        """x as (R, D)."""
        return self.x.view(-1, self.D)

    def excite(self) -> tuple[Tensor, Tensor]:
        """Neurons, and the same turned, (h, R, N) each (R3, R4)."""
        R = self.G * self.C
        neurons, rotated = self.x.new_empty(2, self.h, R, self.N)
        operands = self.rows, self.weights.encoder, *self.phases, neurons, rotated, self.h, R, self.C, self.D, self.N
        self._run("excite", self.D, R, self.N, 1, *operands)
        return neurons, rotated

    def compare(self, rotated: Tensor) -> Tensor:
        """Scores (h*G, C, C), zero on the diagonal and above it (R5)."""
        many, C = self.h * self.G, self.C
        scores = self.x.new_empty(many, C, C)
        if many < MANY:
            self._run("compare", self.N, C, C, many, rotated, scores, C, self.N)
            return scores
        texts = rotated.view(many, C, self.N)
        for first in range(0, C, STRIP):
            rows, seen = slice(first, first + STRIP), slice(min(first + STRIP, C))
            torch.bmm(texts[:, rows], texts[:, seen].mT, out=scores[:, rows, seen])
        return scores.tril_(-1)

    def attend(self, scores: Tensor) -> Tensor:
        """What the tokens at hand show one another, (h, R, D) in float32 (R5)."""
        return product(scores, self._for_each_head(self.v)).view(self.h, -1, self.D)

    def see(self, state: Tensor, rotated: Tensor, attention: Tensor) -> None:
        """Add to the attention what the state (h, G, N, D) holds for these tokens (R13)."""
        for memory, total, queries in _heads(state, self._by_text(attention), self._by_text(rotated)):
            add_product(total, queries, memory.to(queries.dtype))

    def remember(self, state: Tensor, rotated: Tensor) -> None:
        """Add these tokens to the state (R13)."""
        for memory, keys, v in _heads(state, self._by_text(rotated), self.v.expand(self.h, *self.v.shape)):
            add_product(memory, keys.mT, v)

    def gate(self, neurons: Tensor, attention: Tensor) -> Tensor:
        """What is left of the neurons when the attention has opened some of them, in their place (R6 to R8)."""
        R = self.G * self.C
        self._run("gate", self.D, R, self.N, self.h, self._normed(attention), self.weights.encoder_v, neurons, **self._drawn(R))
        return neurons

    def undo_gate(self, d_decoded: Tensor, neurons: Tensor, attention: Tensor, d_weights: Weights) -> tuple[Tensor, Tensor]:
        """Undo R9 to R6: slopes in the neurons by way of the gate (h, R, N), and in the attention (h, R, D) in float32."""
        R, yKV = self.G * self.C, self._normed(attention)
        xy_sparse, d_opened, d_neurons = neurons.new_empty(3, *neurons.shape)
        operands = yKV, self.weights.encoder_v, d_decoded, self.weights.decoder, neurons, xy_sparse, d_opened, d_neurons
        self._run("undo_gate", self.D, R, self.N, self.h, *operands, **self._drawn(R))
        add_product(d_weights.decoder, xy_sparse.mT, d_decoded.expand(self.h, -1, -1))
        add_product(d_weights.encoder_v, yKV.mT, d_opened)
        return d_neurons, undo_norm(attention, product(d_opened, self.weights.encoder_v.mT))

    def undo_attend(self, scores: Tensor, d_attention: Tensor) -> tuple[Tensor, Tensor]:
        """Undo R5: slopes in the values (h, G, C, D) in float32, and in the scores, a row counting as query and as key."""
        d = d_attention.view(-1, self.C, self.D)
        one_side = torch.bmm(d, self._for_each_head(self.v).mT).tril_(-1)
        return product(scores.mT, d).view(self.h, self.G, self.C, self.D), one_side + one_side.mT

    def undo_turn(
        self, sides: Tensor, rotated: Tensor, d_rotated: Tensor | None, neurons: Tensor, d_neurons: Tensor, slopes: _Slopes
    ) -> None:
        """Undo R5 to R3, in the place of ``d_neurons``."""
        extra = rotated if d_rotated is None else d_rotated
        operands = sides, rotated, extra, *self.phases, neurons, d_neurons, self.C, self.N
        self._run("undo_turn", self.C, self.C, self.N, self.h * self.G, *operands, ADDS=d_rotated is not None)
        add_product(slopes.weights.encoder, self.rows.mT.expand(self.h, -1, -1), d_neurons)
        d_x = product(d_neurons, self.weights.encoder.mT).sum(0)
        slopes.x[self.texts, self.tokens] += self.by_text(d_x)

    def by_text(self, values: Tensor) -> Tensor:
        """Rows (R, K) as (G, C, K)."""
        return values.view(self.G, self.C, -1)

    def _by_text(self, values: Tensor) -> Tensor:
        """Rows of each head (h, R, K) as (h, G, C, K)."""
        return values.view(self.h, self.G, self.C, -1)

    def _for_each_head(self, values: Tensor) -> Tensor:
        """(G, C, K) to (h*G, C, K)."""
        return values.expand(self.h, *values.shape).flatten(0, 1)

    def _normed(self, attention: Tensor) -> Tensor:
        """yKV (R6)."""
        return layer_norm(attention).to(self.x.dtype)

    def _drawn(self, R: int) -> dict[str, Any]:
        """What kernels that drop want to know."""
        first = self.texts.start * self.T + self.tokens.start
        p, seed, scale = self.dropout.p, self.dropout.seed, self.dropout.scale
        sizes = {"R": R, "C": self.C, "D": self.D, "N": self.N, "T": self.T, "first": first}
        return {**sizes, "seed": seed, "p": float(p), "scale": scale, "DROPS": p > 0}

    def _run(self, name: str, K: int, R: int, N: int, batch: int, /, *operands: Any, **options: Any) -> None:
        """Run a kernel that writes ``batch`` matrices of R rows and N columns, and sums over an axis of K."""
        tiles = tiles_of(name, self.x.dtype, K)
        down, across = batch * triton.cdiv(R, tiles.rows), triton.cdiv(N, tiles.columns)
        if name in SPANNING:
            many = max(down * across // PROGRAMS, 1)
            options["span"], across = many * tiles.columns, triton.cdiv(across, many)
        with torch.cuda.device_of(self.x):  # type: ignore[no-untyped-call]  # Triton launches on the current device
            getattr(kernels, name)[(down * across,)](*operands, **options, **tiles.options(K))


def _heads(state: Tensor, *values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A state (h, G, N, D) and values (h, G, C, K) as batches (b, N, D) and (b, C, K), of all heads at once if it may be."""
    if state.is_contiguous():
        yield tuple(each.flatten(0, 1) for each in (state, *values))
    else:  # flattened it would be a copy, and what is written to that is lost
        yield from zip(state, *values, strict=True)


def _pieces(
    x: Tensor, v: Tensor, weights: Weights, rotations: Rotations, chunk: int, dropout: Dropout
) -> Iterator[list[_Piece]]:
    """The pieces of as many texts as are read together, in the order of their tokens."""
    (B, T, _), (nh, _, N) = x.shape, weights.encoder.shape
    texts = max(ROOM // (nh * N * x.element_size() * min(chunk, T)), 1)
    for first in range(0, B, texts):
        together = slice(first, min(first + texts, B))
        starts = range(0, T, chunk)
        yield [
            _Piece(x, v, weights, rotations, number, together, slice(start, min(start + chunk, T)), dropout)
            for number, start in enumerate(starts)
        ]


def _undo(pieces: list[_Piece], d_decoded: Tensor, found: list[tuple[Tensor, Tensor]], slopes: _Slopes) -> None:
    """Add the slopes of some texts, by their pieces from the last to the first."""
    states: list[Tensor | None] = [None] if len(pieces) == 1 else [*_states(pieces)]
    d_state = None
    for piece, (attention, scores), state in reversed(list(zip(pieces, found, states, strict=True))):
        where = piece.texts, piece.tokens
        neurons, rotated = piece.excite()
        d = d_decoded[where].contiguous().view(-1, piece.D)  # that of a sum is one number, expanded
        d_neurons, d_attention = piece.undo_gate(d, neurons, attention, slopes.weights)
        d_attention = d_attention.to(piece.x.dtype)
        d_v, sides = piece.undo_attend(scores, d_attention)
        d_rotated = None
        if state is not None:
            d_rotated, d_state = _undo_state(piece, rotated, state, d_state, d_attention, d_v)
        piece.undo_turn(sides, rotated, d_rotated, neurons, d_neurons, slopes)
        slopes.v[where] += d_v.sum(0)


def _states(pieces: list[_Piece]) -> list[Tensor]:
    """The state before each piece (h, G, N, D), as its queries read it."""
    first = pieces[0]
    state, states = first.x.new_zeros(first.h, first.G, first.N, first.D, dtype=torch.float32), []
    for piece in pieces:
        states.append(state.to(first.x.dtype, copy=True))
        if piece is not pieces[-1]:
            piece.remember(state, piece.excite()[1])
    return states


def _undo_state(
    piece: _Piece, rotated: Tensor, state: Tensor, d_state: Tensor | None, d_attention: Tensor, d_v: Tensor
) -> tuple[Tensor, Tensor]:
    """Undo R13: slopes in the rotated neurons by way of the state, (h, R, N), and in the state before the piece.

    ``d_state`` are those in the state after it. Those in the values are added to ``d_v`` (h, G, C, D).
    """
    kind = rotated.dtype
    before = torch.zeros_like(state, dtype=torch.float32) if d_state is None else d_state
    d_rotated = torch.empty_like(rotated)
    for h in range(piece.h):
        turned, d, slopes = (piece._by_text(values)[h] for values in (rotated, d_attention, d_rotated))  # G C N, D, N
        found = torch.bmm(d, state[h].mT)
        if d_state is not None:
            after = d_state[h].to(kind)
            found.baddbmm_(piece.v, after.mT)
            add_product(d_v[h], turned, after)
        slopes.copy_(found)
        add_product(before[h], turned.mT, d)
    return d_rotated, before


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of a batch, summed and returned in float32."""
    if a.dtype == torch.float32:
        return torch.bmm(a, b)
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.bmm(a.float(), b.float())


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b of a batch, all of it in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.baddbmm(total, a, b, out_dtype=torch.float32, out=total)
    else:  # a CPU, where Triton's interpreter runs the kernels, has no products that widen
        total.baddbmm_(a.float(), b.float())


def _values(x: Tensor, kept: Tensor | None) -> Tensor:
    """What tokens see of one another: x (B, T, D), that of padding zero."""
    return x if kept is None else x * kept[..., None].to(x.dtype)


def _contiguous(weights: Weights, dtype: torch.dtype) -> Weights:
    """Weights as kernels read them, in the type of x; the decoder by heads, (h, N, D)."""
    encoder, encoder_v, decoder = (weight.to(dtype).contiguous() for weight in weights)
    return Weights(encoder, encoder_v, torch.unflatten(decoder, 0, (len(encoder), -1)))
