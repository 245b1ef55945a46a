"""The plain form in eager PyTorch: SPEC.md's rules one after another, whole tensors, nothing kept, nothing spared.

It computes phases in float32 and anew in each layer, forms all T*T scores and masks them, and lays the heads side by side by
a copy, as the paper's listing does. It is what a port is measured against, and nobody should use it for anything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from bdh_spec import BDHConfig
from bdh_spec.model import EPS, IGNORE

Attend: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # rotated (B, h, T, N) and values (B, 1, T, D) to (B, h, T, D)


class Weights(NamedTuple):
    """The five, and the table of R4, which is no weight."""

    embed: Tensor  # V D
    encoder: Tensor  # h D N
    encoder_v: Tensor  # h D N
    decoder: Tensor  # h*N D
    lm_head: Tensor  # D V
    freqs: Tensor  # N


def forward(tokens: Tensor, weights: Weights, config: BDHConfig, dropout: float = 0.0) -> Tensor:
    """Tokens (B, T) to logits (B, T, V)."""
    x = embed(tokens, weights)
    for _ in range(config.n_layer):
        x = layer(x, weights, 0, attend, dropout)
    return x @ weights.lm_head  # R11


def loss(tokens: Tensor, targets: Tensor, weights: Weights, config: BDHConfig, dropout: float = 0.0) -> Tensor:
    """Mean cross entropy in nats (R12)."""
    logits = forward(tokens, weights, config, dropout)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


def prefill(tokens: Tensor, weights: Weights, config: BDHConfig) -> tuple[Tensor, list[Tensor]]:
    """Logits of a text (B, T), and the state after it: one (B, h, N, D) per layer (R13)."""
    x, memories = embed(tokens, weights), []

    def attend_and_write(rotated: Tensor, v: Tensor) -> Tensor:
        memories.append(write(torch.zeros((), device=v.device), rotated, v))
        return attend(rotated, v)

    for _ in range(config.n_layer):
        x = layer(x, weights, 0, attend_and_write)
    return x @ weights.lm_head, memories


def step(
    tokens: Tensor, memories: list[Tensor], position: int, weights: Weights, config: BDHConfig
) -> tuple[Tensor, list[Tensor]]:
    """One token (B, 1) of each text: its logits, and a new state (R13)."""
    x, after = embed(tokens, weights), list[Tensor]()

    def read_and_write(rotated: Tensor, v: Tensor) -> Tensor:
        memory = memories[len(after)]
        after.append(write(memory, rotated, v))
        with torch.autocast(v.device.type, enabled=False):
            return rotated.to(memory.dtype) @ memory

    for _ in range(config.n_layer):
        x = layer(x, weights, position, read_and_write)
    return x @ weights.lm_head, after


def embed(tokens: Tensor, weights: Weights) -> Tensor:
    """R1."""
    return layer_norm(F.embedding(tokens, weights.embed))


def layer_norm(x: Tensor) -> Tensor:
    """R2."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def layer(x: Tensor, weights: Weights, start: int, attend: Attend, dropout: float = 0.0) -> Tensor:
    """R3 to R10 on x (B, T, D)."""
    B, T, _ = x.shape
    x_sparse = F.relu(x[:, None] @ weights.encoder)  # B h T N  R3
    rotated = rope(x_sparse, weights.freqs, start)  # R4
    yKV = layer_norm(attend(rotated, x[:, None]))  # B h T D  R5, R6
    y_sparse = F.relu(yKV @ weights.encoder_v)  # B h T N  R7
    xy_sparse = F.dropout(x_sparse * y_sparse, dropout, training=dropout > 0)  # R7, R8
    merged = xy_sparse.transpose(1, 2).reshape(B, T, -1)  # B T h*N
    return layer_norm(x + layer_norm(merged @ weights.decoder))  # R9, R10


def rope(v: Tensor, freqs: Tensor, start: int) -> Tensor:
    """R4, phases as float32."""
    positions = torch.arange(start, start + v.shape[-2], device=v.device).float()
    angle = 2 * math.pi * (positions[:, None] * freqs % 1)  # T N
    swapped = torch.stack((-v[..., 1::2], v[..., 0::2]), dim=-1).flatten(-2)
    return (v * angle.cos()).to(v.dtype) + (swapped * angle.sin()).to(v.dtype)


def attend(rotated: Tensor, v: Tensor) -> Tensor:
    """R5: all scores, then the mask."""
    return (rotated @ rotated.mT).tril(diagonal=-1) @ v


def write(memory: Tensor, rotated: Tensor, v: Tensor) -> Tensor:
    """A new state, in float32 (R13)."""
    with torch.autocast(v.device.type, enabled=False):
        return memory + rotated.float().mT @ v.float()
