"""One layer, R3 to R9, that never holds all neurons: heads one after the other, long texts in chunks.

The same function as ``layer.layer``, the form to read beside the specification. There a dozen arrays (B, nh, T, N) wait for
their gradient; here one head of some texts, or of a chunk of a text, lives at a time. A gradient keeps of a layer what has no
axis N, and computes the rest again.

Within a chunk tokens see one another by scores; what came before, they see through the state (R13). Rotations are those of
the tokens' own positions, so that frequencies which differ within a pair need no other form.

Axes: B batch, T time, N neurons per head, D embedding width; G texts that are read together, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx

from bdh_mlx import forms
from bdh_mlx.layer import layer_norm, read, relu, wide, widen
from bdh_mlx.rope import rope, rotation, swap, table_of
from bdh_spec.config import BDHConfig
from bdh_spec.params import Params
from bdh_spec.rope import Phase

Turn: TypeAlias = Callable[[], tuple[mx.array, mx.array]]  # makes cosine and sine of some tokens, each (C, N)


class Part(NamedTuple):
    """What is read at once: these texts, and of them these tokens."""

    texts: slice
    tokens: slice


class Seen(NamedTuple):
    """What a gradient keeps of one head of a part."""

    attention: mx.array  # G C D  R5
    scores: mx.array  # G C C  R5


def gated(x: mx.array, params: Params, config: BDHConfig, phase: Phase, key: mx.array | None = None) -> mx.array:
    """x (B, T, D) to what the decoder returns, (B, T, D): all of a layer but its last two norms.

    ``key`` switches dropout on.
    """
    reader = _Layer(x.shape[:2], config, phase, wide(x.dtype))

    @mx.custom_function
    def decode(x: mx.array, encoder: mx.array, encoder_v: mx.array, decoder: mx.array, *key: mx.array) -> list[mx.array]:
        decoded, seen = reader.read(x, encoder, encoder_v, decoder, *key)
        return [decoded, *(value for each in seen for value in each)]

    @decode.vjp
    def undo(primals: Any, cotangents: Any, outputs: Any) -> Any:
        seen = [Seen(*pair) for pair in zip(outputs[1::2], outputs[2::2], strict=True)]
        return reader.undo(*primals, seen=seen, d_decoded=cotangents[0])

    weights = (params.encoder, params.encoder_v, params.decoder)
    outputs: Any = decode(x, *weights) if key is None else decode(x, *weights, key)
    decoded: mx.array = outputs[0]
    return decoded


class _Layer:
    """How a layer is cut, and its two directions."""

    def __init__(self, shape: tuple[int, ...], config: BDHConfig, phase: Phase, dtype: mx.Dtype) -> None:
        (self.B, self.T), self.config = shape, config
        self.chunk = forms.chunk(self.T, config)
        self.kept = 1 - config.dropout
        self.rotation = partial(rotation, table=table_of(config), dtype=dtype, phase=phase)

    def groups(self) -> Iterator[list[Part]]:
        """The texts that are read together, each as the chunks that see one another."""
        texts = max(forms.TOGETHER // self.chunk, 1)
        for first in range(0, self.B, texts):
            group, starts = slice(first, min(first + texts, self.B)), range(0, self.T, self.chunk)
            yield [Part(group, slice(start, min(start + self.chunk, self.T))) for start in starts]

    def heads(self) -> Iterator[tuple[int, slice]]:
        """Each head, and its rows of the decoder."""
        N = self.config.n_neurons
        return ((h, slice(h * N, (h + 1) * N)) for h in range(self.config.n_head))

    def masks(self, key: tuple[mx.array, ...]) -> list[Any]:
        """Keys of the masks of all parts, in the order of ``read``; None where nothing drops."""
        n = self.config.n_head * sum(map(len, self.groups()))
        return list(mx.random.split(key[0], n)) if key else [None] * n

    def mask(self, key: mx.array, like: mx.array) -> mx.array:
        """0, or 1/(1-p) where a value is kept (R8)."""
        return mx.random.bernoulli(self.kept, like.shape, key=key).astype(like.dtype) / self.kept

    def read(
        self, x: mx.array, encoder: mx.array, encoder_v: mx.array, decoder: mx.array, *key: mx.array
    ) -> tuple[mx.array, list[Seen]]:
        """What the decoder returns, in at least float32, and what a gradient keeps of each head and part."""
        seen, whole, masks = [], list[mx.array](), iter(self.masks(key))
        for group in self.groups():
            decoded: list[Any] = [None] * len(group)
            for h, of_decoder in self.heads():
                head, memory = (encoder[h], encoder_v[h], decoder[of_decoder]), None
                for c, (texts, tokens) in enumerate(group):
                    part = after(decoded[c], x[texts, tokens])  # one head after the other, whatever order MLX would take
                    rotated, xy_sparse, kept = self.excite(part, head, tokens.start, memory, next(masks))
                    decoded[c] = add_product(decoded[c], xy_sparse, head[2])  # R9: heads add up
                    seen.append(kept)
                    if c + 1 < len(group):
                        memory = add_product(memory, widen(rotated).swapaxes(-1, -2), widen(part))  # G N D  R13
            whole.append(mx.concatenate(decoded, axis=1))
        return mx.concatenate(whole), seen

    def excite(
        self, x: mx.array, head: tuple[mx.array, ...], start: int, memory: mx.array | None, mask: mx.array | None
    ) -> tuple[mx.array, mx.array, Seen]:
        """One head of a part, x (G, C, D): its neurons as they were turned and as they pass the gate, each (G, C, N)."""
        encoder, encoder_v, _ = head
        x_sparse = relu(x @ encoder)  # G C N  R3
        rotated = rope(x_sparse, *self.rotation(start, x.shape[1]))  # R4
        similar, attention = attend(rotated, x)  # R5
        if memory is not None:
            attention = attention + read(memory, rotated)
        xy_sparse = x_sparse * relu(layer_norm(attention).astype(x.dtype) @ encoder_v)  # R6, R7
        if mask is not None:
            xy_sparse = xy_sparse * self.mask(mask, xy_sparse)  # R8
        return rotated, xy_sparse, Seen(attention, similar)

    def undo(
        self,
        x: mx.array,
        encoder: mx.array,
        encoder_v: mx.array,
        decoder: mx.array,
        *key: mx.array,
        seen: list[Seen],
        d_decoded: mx.array,
    ) -> list[mx.array]:
        """The slopes in x, in the three weights, and none in the key (R15)."""
        remembered, masks, nh = iter(seen), iter(self.masks(key)), self.config.n_head
        d_encoder, d_encoder_v, d_decoder = (list[Any]([None] * nh) for _ in range(3))
        d_whole, before = [], None
        for group in self.groups():
            d_x: list[Any] = [None] * len(group)
            for h, of_decoder in self.heads():
                head = _Head(encoder[h], encoder_v[h], decoder[of_decoder], (d_encoder[h], d_encoder_v[h], d_decoder[h]))
                parts = []
                for texts, tokens in group:
                    part = after(before, x[texts, tokens])
                    mask = next(masks)
                    drop = None if mask is None else partial(self.mask, mask)
                    turn = partial(self.rotation, tokens.start, part.shape[1])  # anew wherever it is used, for it is as large
                    parts.append(head.undo_gate(part, d_decoded[texts, tokens], next(remembered), drop, turn))
                    before = parts[-1].waiting
                by_this_head = head.undo_attention(parts)
                d_x = by_this_head if h == 0 else [a + b for a, b in zip(d_x, by_this_head, strict=True)]
                d_encoder[h], d_encoder_v[h], d_decoder[h] = head.slopes
                before = d_x[0]
            d_whole.append(mx.concatenate(d_x, axis=1))
        stacked = (mx.stack(d_encoder), mx.stack(d_encoder_v), mx.concatenate(d_decoder))
        slopes = (mx.concatenate(d_whole), *stacked)
        narrow = [slope.astype(value.dtype) for slope, value in zip(slopes, (x, encoder, encoder_v, decoder), strict=True)]
        return [*narrow, *(mx.zeros_like(k) for k in key)]


class _Undone(NamedTuple):
    """A part after its gate was undone."""

    x: mx.array  # G C D
    x_sparse: mx.array  # G C N
    waiting: mx.array  # G C N, the slope in x_sparse by way of the gate
    d_attention: mx.array  # G C D
    scores: mx.array  # G C C
    turn: Turn


class _Head:
    """The gradient of one head; ``slopes`` are those of its weights so far."""

    def __init__(self, encoder: mx.array, encoder_v: mx.array, decoder: mx.array, slopes: tuple[Any, Any, Any]) -> None:
        self.encoder, self.encoder_v, self.decoder, self.slopes = encoder, encoder_v, decoder, slopes

    def undo_gate(self, x: mx.array, d_decoded: mx.array, seen: Seen, drop: Any, turn: Turn) -> _Undone:
        """Undo R9 to R6."""
        d_encoder, d_encoder_v, d_decoder = self.slopes
        d_decoded = d_decoded.astype(x.dtype)
        x_sparse = relu(x @ self.encoder)
        yKV = layer_norm(seen.attention).astype(x.dtype)
        y_sparse = relu(yKV @ self.encoder_v)
        xy_sparse, d_xy = x_sparse * y_sparse, d_decoded @ self.decoder.T
        if drop is not None:
            mask = drop(xy_sparse)
            xy_sparse, d_xy = xy_sparse * mask, d_xy * mask
        d_y = mx.where(y_sparse > 0, d_xy * x_sparse, 0)  # before the relu
        d_decoder = add_product(d_decoder, flat(xy_sparse).T, flat(d_decoded))
        d_encoder_v = add_product(d_encoder_v, flat(yKV).T, flat(d_y))
        self.slopes = (d_encoder, d_encoder_v, d_decoder)
        _, (d_attention,) = mx.vjp(layer_norm, [seen.attention], [widen(d_y @ self.encoder_v.T)])
        return _Undone(x, x_sparse, d_xy * y_sparse, d_attention, seen.scores, turn)

    def undo_attention(self, parts: list[_Undone]) -> list[mx.array]:
        """Undo R5 to R3: the slope in x of each part, at least float32."""
        d_encoder, d_encoder_v, d_decoder = self.slopes
        memories = self.memories(parts)
        d_memory, found = None, []
        for part, memory in reversed(list(zip(parts, memories, strict=True))):
            x, d, turn = part.x, part.d_attention, part.turn()
            rotated = rope(part.x_sparse, *turn)
            d_x = widen(part.scores).swapaxes(-1, -2) @ d  # values
            one_side = mx.tril(d.astype(x.dtype) @ x.swapaxes(-1, -2), k=-1)
            d_rotated = (one_side + one_side.swapaxes(-1, -2)) @ rotated  # a row counts as query and as key
            if memory is not None:
                d_rotated = d_rotated + (d @ memory.swapaxes(-1, -2)).astype(x.dtype)
            if d_memory is not None:
                d_rotated = d_rotated + (widen(x) @ d_memory.swapaxes(-1, -2)).astype(x.dtype)
                d_x = d_x + read(d_memory, rotated)
            if memory is not None:  # there are earlier parts
                d_memory = add_product(d_memory, widen(rotated).swapaxes(-1, -2), d)
            d_before = mx.where(part.x_sparse > 0, turn_back(d_rotated, *turn) + part.waiting, 0)
            d_encoder = add_product(d_encoder, flat(x).T, flat(d_before))
            found.append(add_product(d_x, d_before, self.encoder.T))
        self.slopes = (d_encoder, d_encoder_v, d_decoder)
        return found[::-1]

    def memories(self, parts: list[_Undone]) -> list[mx.array | None]:
        """The state (G, N, D) before each part, None before the first."""
        memories = list[Any]([None])
        for part in parts[:-1]:
            rotated = widen(rope(part.x_sparse, *part.turn()))
            memories.append(add_product(memories[-1], rotated.swapaxes(-1, -2), widen(part.x)))
        return memories


def attend(rotated: mx.array, x: mx.array) -> tuple[mx.array, mx.array]:
    """Scores (G, C, C) and attention (G, C, D) of tokens beside one another, some rows at once up to their diagonal (R5)."""
    C, similar, attention = rotated.shape[1], [], []
    for first in range(0, C, forms.STEP):
        last = min(first + forms.STEP, C)
        product = mx.tril(rotated[:, first:last] @ rotated[:, :last].swapaxes(-1, -2), k=first - 1)
        attention.append(widen(product) @ widen(x[:, :last]))
        similar.append(mx.pad(product, [(0, 0), (0, 0), (0, C - last)]))
    return mx.concatenate(similar, axis=1), mx.concatenate(attention, axis=1)


def after(others: mx.array | None, x: mx.array) -> mx.array:
    """x, which is not to be read before the others are computed."""
    return x if others is None else mx.depends(x, others)


def turn_back(d_rotated: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """The slope in what was turned, by that in what it became (R4): swap's transpose is its opposite."""
    return (d_rotated * cos - swap(d_rotated * sin)).astype(d_rotated.dtype)


def add_product(total: mx.array | None, a: mx.array, b: mx.array) -> mx.array:
    """total + a @ b, summed in at least float32; None counts as nothing."""
    if total is None:
        return widen(a @ b)
    return mx.addmm(total, a, b) if total.dtype == a.dtype else total + widen(a @ b)


def flat(x: mx.array) -> mx.array:
    """(G, C, K) as (G*C, K)."""
    return x.reshape(-1, x.shape[-1])
