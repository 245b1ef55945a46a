"""One token of each text, R3 to R9 and R13, without gradients: what is done again for every token that is written.

A token multiplies each weight and each number of the state once or twice, and so takes as long as reading them does. A state
is therefore read and written in place, a block of it at a time, which is near the core from the one to the other. Where few
neurons are active, the silent ones are left out: their rows of the state, their columns of ``encoder_v``, their rows of the
decoder. Whether they are few is counted, for each token and layer; C, where a machine compiles ``token.c``, passes over silent
rows without counting. A short text is remembered by its rows as they are, as
long as the state that they add up to would be larger.

Weights are read where they are: nothing is repacked that an edit could leave stale. In the usual order of memory a column of
``encoder_v`` lies scattered; a model may hold it in the other order, see ``neurons_first``, and only then are columns chosen.

Axes: B batch, T time, h head (nh of them), N neurons per head, D embedding width; G = h*B groups, each one head of one text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from typing import Any, NamedTuple, TypeAlias, overload

import numpy as np
import torch
from torch import Tensor

from bdh_torch.forms import is_copied, is_counted, is_summed, rows_kept, rows_of_a_block
from bdh_torch.layer import Weights, layer_norm, wide

# Rotated neurons (G, 1, N), values (B, 1, D) and which neurons are active, if somebody counts, to attention (G, 1, D).
Remember: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def gated(x: Tensor, v: Tensor, weights: Weights, rotations: Tensor, remember: Remember) -> Tensor:
    """x (B, D), a token of each text, to what the decoder returns, (B, D): all of a layer but its last two norms.

    ``v`` (B, D) is what later tokens see of this one: x, or zeros in the place of padding. ``rotations`` are complex numbers,
    (N/2), or (B, N/2) where texts differ in their positions. ``remember`` reads what was written before, then writes.
    """
    (B, D), (nh, _, N) = x.shape, weights.encoder.shape
    x_sparse = product(x.expand(nh, B, D), weights.encoder).relu_()  # h B N  R3
    active = x_sparse != 0 if is_counted(weights.encoder) else None  # h B N
    attention = remember(turned(x_sparse, rotations), v[:, None], active)  # G 1 D  R4, R5, R13
    yKV = layer_norm(attention).to(x.dtype).view(nh, B, D)  # R6
    if active is None:
        xy_sparse = product(yKV, weights.encoder_v).relu_().mul_(x_sparse)  # h B N  R7
    elif is_neurons_first(weights.encoder_v) and is_copied(count(active), nh * N):
        chosen = Chosen.of(active)
        y_sparse = _columns(yKV, weights.encoder_v, chosen).relu_()  # K  R7
        xy_sparse = y_sparse.mul_(x_sparse.view(-1)[chosen.places])
        few = torch.from_numpy(np.flatnonzero((xy_sparse != 0).numpy()))
        return _decoded(chosen.only(few), xy_sparse[few], weights.decoder, B)
    else:
        xy_sparse = product(yKV, weights.encoder_v).relu_().mul_(x_sparse)
        if B == 1 and (by_rows := _in_c(weights.decoder)):
            return by_rows.weighted_sum(weights.decoder, xy_sparse.view(-1)).to(x.dtype)[None]  # R9
        active = xy_sparse != 0
        if is_summed(count(active), nh * N):
            chosen = Chosen.of(active)
            return _decoded(chosen, xy_sparse.view(-1)[chosen.places], weights.decoder, B)
    if B == 1:  # heads lie side by side as they are
        return torch.mm(xy_sparse.view(1, nh * N), weights.decoder)  # R9
    return torch.bmm(xy_sparse, weights.decoder.view(nh, N, D)).sum(0)


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """Rows (h, B, D) times a weight (h, D, N): (h, B, N)."""
    nh, D, N = weight.shape
    if rows.shape[1] > 1 or weight.dtype != torch.bfloat16 or not is_counted(weight):
        return torch.bmm(rows, weight)
    if not is_neurons_first(weight) and (by_rows := _in_c(weight)):
        sums = [by_rows.weighted_sum(of_a_head, row) for of_a_head, row in zip(weight, rows[:, 0], strict=True)]
        return torch.stack(sums)[:, None].to(weight.dtype)
    # PyTorch takes longer to multiply a row by a large matrix of bfloat16 than by one of float32, and half as long for these.
    if is_neurons_first(weight):
        return torch.stack([torch.mv(by_neuron, row) for by_neuron, row in zip(weight.mT, rows[:, 0], strict=True)])[:, None]
    return weighted_sums(weight.reshape(nh * D, N), torch.arange(nh * D), rows.reshape(-1), range(0, nh * D, D))[:, None]


def _in_c(memory: Tensor) -> Any:
    """What reads a weight or a state by rows and leaves out what is multiplied by zero, or None. By name: see ``elements``."""
    if __name__ != "bdh_torch.decode" or memory.device.type != "cpu" or not memory.is_contiguous():
        return None
    return import_module("bdh_torch.native").token(memory.dtype)


def neurons_first(weight: Tensor) -> Tensor:
    """The same weight (h, D, N) with what belongs to one neuron side by side in memory, so that few neurons are read fast."""
    return weight.mT.contiguous().mT


def is_neurons_first(weight: Tensor) -> bool:
    """Whether a weight (h, D, N) lies in that order."""
    return weight.mT.is_contiguous()


def count(active: Tensor) -> int:
    """How many are true. NumPy counts, and finds, several times as fast as PyTorch does on a CPU."""
    return int(np.count_nonzero(active.numpy()))


class Chosen(NamedTuple):
    """The places, among those of all groups, of what is active; and where in that list each group's begin, and the last end."""

    places: Tensor  # K, int64
    bounds: list[int]  # G + 1
    size: int  # places of a group

    @classmethod
    def of(cls, active: Tensor) -> Chosen:
        """Those where ``active`` (..., N) is true, a group for each row of N."""
        size = active.shape[-1]
        places = np.flatnonzero(active.numpy())
        bounds = np.searchsorted(places, np.arange(0, active.numel() + 1, size))
        return cls(torch.from_numpy(places), bounds.tolist(), size)

    def only(self, few: Tensor) -> Chosen:
        """Of these, those whose numbers in the list are given, in order."""
        return Chosen(self.places[few], np.searchsorted(few.numpy(), self.bounds).tolist(), self.size)

    def neurons(self, B: int) -> Tensor:
        """The number of each place's neuron among those of all heads (h*N), where groups are heads of B texts."""
        return self.places if B == 1 else self.places // (B * self.size) * self.size + self.places % self.size

    def pieces(self, most: int) -> Iterator[tuple[int, slice]]:
        """The number of a group and a slice of its places, at most so many at once."""
        for g in range(len(self.bounds) - 1):
            for first in range(self.bounds[g], self.bounds[g + 1], most):
                yield g, slice(first, min(first + most, self.bounds[g + 1]))


def through(state: Tensor, rotated: Tensor, v: Tensor, active: Tensor | None = None) -> Tensor:
    """Attention (G, 1, D) of a token by way of a state (G, N, D); then the state, in place, remembers the token too (R13).

    Rotated neurons (G, 1, N) and values (B, 1, D) of the token; neurons that are not ``active`` (h, B, N) are zero.
    """
    if state.dtype == rotated.dtype == torch.float32 and (by_rows := _in_c(state)):
        return by_rows.through(state, rotated, v)
    if active is not None:
        pairs = active.view(-1).view(torch.int16) != 0  # one that is active turns into the other
        if is_copied(count(pairs), pairs.numel()):
            return _through_pairs(state, rotated, v, Chosen.of(pairs.view(len(state), -1)))
    (G, N, D), B = state.shape, len(v)
    rotated, v = rotated.to(state.dtype), v.to(state.dtype).expand(G // B, B, 1, D).flatten(0, 1)
    rows = rows_of_a_block(D * state.element_size())
    if rows >= G * N:
        attention = torch.bmm(rotated, state)
        state.baddbmm_(rotated.mT, v)
        return attention
    attention, many = torch.zeros_like(v), max(rows // N, 1)
    for each in zip(*(torch.split(values, many) for values in (state, rotated, v, attention)), strict=True):
        _through_blocks(*each, rows=rows)
    return attention


def _through_blocks(state: Tensor, rotated: Tensor, v: Tensor, attention: Tensor, *, rows: int) -> None:
    """``through`` some groups, so many neurons at once; attention is added."""
    for block, q in zip(torch.split(state, rows, dim=1), torch.split(rotated, rows, dim=2), strict=True):
        attention.baddbmm_(q, block)
        block.baddbmm_(q.mT, v)


def _through_pairs(state: Tensor, rotated: Tensor, v: Tensor, chosen: Chosen) -> Tensor:
    """``through``, by the rows of the chosen pairs of neurons alone."""
    (G, _, D), B = state.shape, len(v)
    turned = rotated.to(state.dtype).view(-1, 2)[chosen.places]  # K 2
    both = (2 * chosen.places[:, None] + torch.arange(2)).view(-1)
    attention = weighted_sums(state.view(-1, D), both, turned.view(-1), [2 * first for first in chosen.bounds[:-1]])
    of_pairs, v = state.view(-1, 2 * D), v.to(state.dtype)
    most = rows_of_a_block(4 * D * state.element_size())  # pairs of rows, and what is added to them
    for places, factors in zip(torch.split(chosen.places, most), torch.split(turned, most), strict=True):
        seen = v if B == 1 else v[places // chosen.size % B]  # K 1 D
        of_pairs.index_add_(0, places, (factors[..., None] * seen).view(-1, 2 * D))
    return attention.view(G, 1, D)


def weighted_sums(rows: Tensor, places: Tensor, factors: Tensor, starts: Iterable[int]) -> Tensor:
    """Sums (G, D) of the rows (R, D) at these places, each by its factor, one for the places from each start on."""
    return torch.embedding_bag(rows, places, torch.tensor(list(starts)), False, 0, False, factors)[0]


def turned(x_sparse: Tensor, rotations: Tensor) -> Tensor:
    """x_sparse (h, B, N), each pair turned by its phase, as (G, 1, N), never narrower than float32."""
    nh, B, N = x_sparse.shape
    pairs = torch.view_as_complex(x_sparse.to(wide(x_sparse.dtype)).view(nh, B, N // 2, 2))
    return torch.view_as_real(pairs * rotations).view(nh * B, 1, N)


def _columns(yKV: Tensor, encoder_v: Tensor, chosen: Chosen) -> Tensor:
    """yKV (h, B, D) times the chosen columns of encoder_v (h, D, N): (K)."""
    (nh, B, D), found = yKV.shape, yKV.new_empty(len(chosen.places))
    by_neuron, rows, by_group = encoder_v.mT.view(-1, D), chosen.neurons(B), yKV.view(nh * B, D).unbind()
    for g, part in chosen.pieces(rows_of_a_block(D * encoder_v.element_size())):
        torch.mv(by_neuron.index_select(0, rows[part]), by_group[g], out=found[part])
    return found


def _decoded(chosen: Chosen, xy_sparse: Tensor, decoder: Tensor, B: int) -> Tensor:
    """xy_sparse (K) at the chosen places of (h, B, N), times the decoder (h*N, D): (B, D)  R9."""
    if B == 1:  # one sum is that of all heads
        return weighted_sums(decoder, chosen.places, xy_sparse, [0])
    sums = weighted_sums(decoder, chosen.neurons(B), xy_sparse, chosen.bounds[:-1])
    return sums.view(-1, B, decoder.shape[1]).sum(0)


class Rows:
    """What a layer remembers of short texts: the rotated neurons and the values of their tokens, as they are (R5)."""

    def __init__(self, keys: Tensor, values: Tensor, length: int = 0) -> None:
        self.keys, self.values = keys, values  # G C N and B C D, of which the first ``length`` are written
        self.length = length

    def has_room(self, T: int) -> bool:
        """Whether so many tokens more are still remembered by rows."""
        return self.length + T <= self.keys.shape[1]

    def copy(self) -> Rows:
        """The same in memory of its own."""
        keys, values = torch.empty_like(self.keys), torch.empty_like(self.values)
        keys[:, : self.length], values[:, : self.length] = self.keys[:, : self.length], self.values[:, : self.length]
        return Rows(keys, values, self.length)

    def through(self, rotated: Tensor, v: Tensor, active: Tensor | None = None) -> Tensor:
        """Attention (G, T, D) of tokens to one another and to earlier ones; then these are remembered too.

        Rotated neurons (G, T, N) and values (B, T, D), or (G, T, D), the same for all heads.
        """
        T, now = rotated.shape[1], slice(self.length, self.length + rotated.shape[1])
        self.keys[:, now], self.values[:, now] = rotated, v[: len(self.values)]
        self.length += T
        seen = self.length - 1  # nobody sees the last token
        scores = torch.bmm(self.keys[:, now], self.keys[:, :seen].mT)  # G T S
        if T > 1:
            scores.tril_(now.start - 1)
        return self._weighted(scores, self.values[:, :seen])

    def matrix(self) -> Tensor:
        """The state (G, N, D) that these rows add up to (R13)."""
        G, B = len(self.keys), len(self.values)
        v = self.values[:, : self.length].expand(G // B, -1, -1, -1).flatten(0, 1)
        return torch.bmm(self.keys[:, : self.length].mT, v)

    def _weighted(self, scores: Tensor, v: Tensor) -> Tensor:
        """Scores (G, T, S) times values (B, S, D), which all heads share: (G, T, D)."""
        (G, T, S), (B, _, D) = scores.shape, v.shape
        by_text = scores.view(G // B, B, T, S).transpose(0, 1).reshape(B, G // B * T, S)  # B h*T S
        return torch.bmm(by_text, v).view(B, G // B, T, D).transpose(0, 1).reshape(G, T, D)


class Memory:
    """What a layer remembers: ``held`` are rows while texts are short, and the state (G, N, D) from then on."""

    def __init__(self, held: Rows | Tensor) -> None:
        self.held = held

    @classmethod
    def blank(cls, G: int, B: int, N: int, D: int, like: Tensor, *, keeps_rows: bool = True) -> Memory:
        """Nothing yet, of B texts and G groups, in the dtype of states of a model with weights ``like`` this one."""
        kind, device = wide(like.dtype), like.device
        if capacity := rows_kept(G * N * D * kind.itemsize, D, device.type) if keeps_rows else 0:
            keys, values = (torch.empty(k, capacity, n, dtype=kind, device=device) for k, n in ((G, N), (B, D)))
            return cls(Rows(keys, values))
        return cls(torch.zeros(G, N, D, dtype=kind, device=device))

    @property
    def groups(self) -> int:
        """Heads of texts, G."""
        held = self.held
        return len(held.keys if isinstance(held, Rows) else held)

    def state(self) -> Tensor:
        """The state (G, N, D), which is what is held from now on."""
        held = self.held
        if isinstance(held, Rows):
            self.held = held = held.matrix()
        return held

    def through(self, rotated: Tensor, v: Tensor, active: Tensor | None = None) -> Tensor:
        """``through`` what is held."""
        held = self.held
        return held.through(rotated, v, active) if isinstance(held, Rows) else through(held, rotated, v, active)

    def for_writing(self, T: int, *, donate: bool) -> Memory:
        """What T tokens more may be written to in place: this, if it is donated, or else a copy."""
        held = self.held
        if isinstance(held, Rows):
            held = held.matrix() if not held.has_room(T) else held if donate else held.copy()
        elif not donate:
            held = held.clone()
        return Memory(held)


class Memories(Sequence[Tensor]):
    """What all layers remember: to those who look, their states (G, N, D), however they are held."""

    def __init__(self, each: Sequence[Memory]) -> None:
        self.each = each

    def __len__(self) -> int:
        return len(self.each)

    @overload
    def __getitem__(self, i: int) -> Tensor: ...

    @overload
    def __getitem__(self, i: slice) -> tuple[Tensor, ...]: ...

    def __getitem__(self, i: int | slice) -> Tensor | tuple[Tensor, ...]:
        return tuple(memory.state() for memory in self.each[i]) if isinstance(i, slice) else self.each[i].state()


def memories(layers: Sequence[Tensor], T: int, *, donate: bool) -> list[Memory]:
    """What T tokens more may be written to in place: what these layers hold, if it is donated, or else copies."""
    each = layers.each if isinstance(layers, Memories) else map(Memory, layers)
    return [memory.for_writing(T, donate=donate) for memory in each]


def keeps_rows() -> bool:
    """Whether rows may be remembered at all: not where gradients or a compiler would have to follow, or types are cast."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))


def has_room(layers: Sequence[Tensor], T: int) -> bool:
    """Whether these layers remember rows, and T tokens more would be remembered so."""
    held = layers.each[0].held if isinstance(layers, Memories) else None
    return isinstance(held, Rows) and held.has_room(T) and keeps_rows()
