"""Weights in int8 (R17) that stay so: a token multiplies each weight once, and takes as long as reading them does.

A block of a weight is widened where the core keeps it near, multiplied, and forgotten; its scales are taken out of the sum.
What belongs to one neuron lies side by side, so that where few are active the others are not even read. Products are float32,
or float64 in a float64 model, whatever the type of what goes in and out.

Axes: B batch, T time, h head (nh of them), N neurons per head, D embedding width, V vocabulary; G = h*B groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bdh_spec import AdamW, BDHConfig
from bdh_spec.params import Array, Params
from bdh_spec.rope import Phase
from bdh_torch import decode
from bdh_torch.backend import TorchModel, assigned, full_precision, laid_out, to_numpy
from bdh_torch.decode import Chosen, Remember, count
from bdh_torch.forms import Kernel, is_copied, is_counted, rows_of_a_block
from bdh_torch.layer import layer_norm, residual, wide
from bdh_torch.model import BDH, RecurrentState, blank
from bdh_torch.optimizer import Optimizer
from bdh_torch.rope import Rotary


class Weight(NamedTuple):
    """One weight: what is multiplied with a number of D at once lies side by side."""

    values: Tensor  # h N D of the encoders, h N D of the decoder, 1 V D of the head and of the embedding; int8
    scale: Tensor  # h N of the encoders, D of the decoder, 1 V of the head and of the embedding; float32

    @classmethod
    def of(cls, values: Array, scale: Array) -> Weight:
        """A copy in PyTorch."""
        return cls(torch.tensor(np.ascontiguousarray(values)), torch.tensor(np.ascontiguousarray(scale)))


class Weights(NamedTuple):
    """All that a model has."""

    embed: Weight
    encoder: Weight
    encoder_v: Weight
    decoder: Weight
    lm_head: Weight

    @classmethod
    def of(cls, params: Params, config: BDHConfig) -> Weights:
        """Copies of five ``bdh_spec.int8.Int8``."""
        p, nh = params, config.n_head
        return cls(
            Weight.of(p.embed.values[None], p.embed.scale[None]),
            Weight.of(p.encoder.values.swapaxes(1, 2), p.encoder.scale),
            Weight.of(p.encoder_v.values.swapaxes(1, 2), p.encoder_v.scale),
            Weight.of(p.decoder.values.reshape(nh, -1, config.n_embd), p.decoder.scale),
            Weight.of(p.lm_head.values.T[None], p.lm_head.scale[None]),
        )

    def widened(self, dtype: torch.dtype) -> Params:
        """What they stand for, as a ``BDH`` holds it."""
        embed, encoder, encoder_v, head = (
            w.values.to(wide(dtype)).mul_(w.scale[..., None]).to(dtype)
            for w in (self.embed, self.encoder, self.encoder_v, self.lm_head)
        )
        decoder = self.decoder.values.to(wide(dtype)).mul_(self.decoder.scale).to(dtype)
        both = (encoder.mT.contiguous(), encoder_v.mT.contiguous())
        return Params(embed[0], *both, decoder.flatten(0, 1), head[0].T.contiguous())


def room_for(D: int, kind: torch.dtype) -> Tensor:
    """Where blocks of weights are widened (R, D): one place for all, which the core keeps near."""
    return torch.empty(rows_of_a_block(D * kind.itemsize), D, dtype=kind)


def gated(x: Tensor, weights: Weights, rotations: Tensor, remember: Remember, room: Tensor) -> Tensor:
    """x (B, D), a token of each text, to what the decoder returns, (B, D): ``decode.gated`` by weights in int8."""
    (B, D), (nh, N, _) = x.shape, weights.encoder.values.shape
    x_sparse = product(x.expand(nh, B, D), weights.encoder, room).relu_()  # h B N  R3
    active = x_sparse != 0 if is_counted(weights.encoder.values) else None  # h B N
    attention = remember(decode.turned(x_sparse, rotations), x[:, None], active)  # G 1 D  R4, R5, R13
    yKV = layer_norm(attention).view(nh, B, D)  # R6
    if active is None or not is_copied(count(active), nh * N):
        return decoded(product(yKV, weights.encoder_v, room).relu_().mul_(x_sparse), weights.decoder, room)  # R7, R9
    chosen = Chosen.of(active)
    xy_sparse = columns(yKV, weights.encoder_v, chosen).relu_().mul_(x_sparse.view(-1)[chosen.places])  # K  R7
    few = torch.from_numpy(np.flatnonzero((xy_sparse != 0).numpy()))
    return decoded_of(chosen.only(few), xy_sparse[few], weights.decoder, B)


def product(rows: Tensor, weight: Weight, room: Tensor) -> Tensor:
    """Rows (h, B, D) times a weight (h, D, N): (h, B, N)."""
    (nh, N), B = weight.scale.shape, rows.shape[1]
    found = room.new_empty(nh, N, B)
    for h, each in enumerate(rows.to(room.dtype)):
        for block, out in in_blocks(weight.values[h], found[h], room):
            if B == 1:  # which PyTorch multiplies faster as what it is
                torch.mv(block, each[0], out=out[:, 0])
            else:
                torch.mm(block, each.T, out=out)
    return found.mul_(weight.scale[..., None]).mT.contiguous()


def decoded(xy_sparse: Tensor, weight: Weight, room: Tensor) -> Tensor:
    """xy_sparse (h, B, N) times the decoder (h*N, D): (B, D)  R9."""
    total = xy_sparse.new_zeros(xy_sparse.shape[1], weight.values.shape[2])
    for h, each in enumerate(xy_sparse):
        for block, part in in_blocks(weight.values[h], each.T, room):
            if len(total) == 1:
                total[0].addmv_(block.T, part[:, 0])
            else:
                total.addmm_(part.T, block)
    return total.mul_(weight.scale)


def columns(yKV: Tensor, weight: Weight, chosen: Chosen) -> Tensor:
    """yKV (h, B, D) times the chosen columns of encoder_v (h, D, N): (K)."""
    (nh, B, D), found = yKV.shape, yKV.new_empty(len(chosen.places))
    values, rows, by_group = weight.values.view(-1, D), chosen.neurons(B), yKV.view(nh * B, D).unbind()
    for g, part in chosen.pieces(rows_of_a_block(D * yKV.element_size())):
        torch.mv(values.index_select(0, rows[part]).to(yKV.dtype), by_group[g], out=found[part])
    return found.mul_(weight.scale.view(-1)[rows])


def decoded_of(chosen: Chosen, xy_sparse: Tensor, weight: Weight, B: int) -> Tensor:
    """xy_sparse (K) at the chosen places of (h, B, N), times the decoder (h*N, D): (B, D)  R9."""
    D = weight.values.shape[2]
    values, rows, total = weight.values.view(-1, D), chosen.neurons(B), xy_sparse.new_zeros(B, D)
    for g, part in chosen.pieces(rows_of_a_block(D * xy_sparse.element_size())):
        total[g % B].addmv_(values.index_select(0, rows[part]).to(xy_sparse.dtype).T, xy_sparse[part])
    return total.mul_(weight.scale)


def in_blocks(values: Tensor, beside: Tensor, room: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of values (R, D) in blocks, widened one after the other, each with the same rows of another tensor."""
    for block, part in zip(torch.split(values, len(room)), torch.split(beside, len(room)), strict=True):
        yield room[: len(block)].copy_(block), part


class Int8Model(TorchModel):
    """A model that holds its weights in int8, and decodes by them, for as long as nobody trains it.

    For whatever else it is asked it widens them all, and lets go of that again. Who asks for slopes, or for an optimizer, makes
    it a model of floating point numbers from then on.
    """

    def __init__(
        self, params: Params, config: BDHConfig, *, device: str, dtype: str, phase: Phase, kernel: Kernel | None = None
    ) -> None:
        self._held: Weights | None = Weights.of(params, config)
        self._rotary, self._settling, self._kernel = Rotary(config, phase), Lock(), kernel
        super().__init__(params, config, device=device, dtype=dtype, phase=phase, kernel=kernel)

    @property
    def module(self) -> BDH:
        held = self._held
        return super().module if held is None else self._made(held)

    def _module(self, params: Params, kernel: Kernel | None) -> BDH | None:
        return None  # not before somebody trains it

    def _made(self, held: Weights) -> BDH:
        weights = held.widened(getattr(torch, self.dtype))
        return assigned(lambda: BDH(self.config, phase=self.phase, kernel=self._kernel), weights, self.device)

    @torch.no_grad()
    def _init_state(self, batch: int) -> RecurrentState:
        return blank(self.config, batch, torch.empty(0, dtype=getattr(torch, self.dtype)), keeps_rows=self._kernel is None)

    @full_precision()
    @torch.no_grad()
    def _advance(self, native: Any, position: int, tokens: Array, donate: bool) -> tuple[Array, Any]:
        held = self._held
        if held is None or tokens.shape[1] > 1 or self._kernel is not None or not self._rotary.in_pairs:
            return super()._advance(native, position, tokens, donate)
        logits, after = self._read_token(held, native, self._to_device(tokens)[:, 0], donate=donate)
        return to_numpy(logits), after

    def _read_token(self, held: Weights, state: RecurrentState, idx: Tensor, *, donate: bool) -> tuple[Tensor, RecurrentState]:
        """``BDH.advance`` by one token (B) of each text."""
        kind = getattr(torch, self.dtype)
        embedded = held.embed.values[0, idx].to(wide(kind)).mul_(held.embed.scale[0, idx, None])
        x = layer_norm(embedded).to(kind)  # B D  R1
        rotations = torch.view_as_complex(self._rotary(torch.tensor([state.position]), wide(kind)))  # 1 N/2
        memories, room = decode.memories(state.layers, 1, donate=donate), room_for(self.config.n_embd, wide(kind))
        for memory in memories:
            x = residual(x, gated(x, held, rotations, memory.through, room))
        logits = product(x[None], held.lm_head, room).to(kind)  # 1 B V  R11
        return logits[0][:, None], RecurrentState(state.position + 1, decode.Memories(memories))  # B 1 V

    def _slopes(self, tokens: Array, targets: Array) -> tuple[float, tuple[Tensor, ...]]:
        self._settle()
        return super()._slopes(tokens, targets)

    def _optimizer(self, settings: AdamW) -> Optimizer:
        self._settle()
        return super()._optimizer(settings)

    def _settle(self) -> None:
        """Hold floating point numbers from now on."""
        with self._settling:
            if self._held is not None:
                self._native = laid_out(self._made(self._held), self.device)
                self._held = None
