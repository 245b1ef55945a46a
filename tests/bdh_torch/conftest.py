"""The plain listing: the rules in the eager PyTorch form that the port's users come from, to compare with and to time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdh_spec import BDHConfig
from bdh_spec.rope import frequencies


class PlainBDH(nn.Module):
    """R1 to R12 with nothing done for speed: heads on the second axis, float32 phases anew in each layer, whole tensors."""

    def __init__(self, config: BDHConfig) -> None:
        super().__init__()
        V, D, nh, N = config.vocab_size, config.n_embd, config.n_head, config.n_neurons
        self.config = config
        self.embed = nn.Embedding(V, D)
        self.encoder = nn.Parameter(torch.empty(nh, D, N).normal_(std=0.02))
        self.encoder_v = nn.Parameter(torch.empty(nh, D, N).normal_(std=0.02))
        self.decoder = nn.Parameter(torch.empty(nh * N, D).normal_(std=0.02))
        self.lm_head = nn.Parameter(torch.empty(D, V).normal_(std=0.02))
        self.attn = PlainAttention(N)
        self.drop = nn.Dropout(config.dropout)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        B, T = idx.shape
        x = norm(self.embed(idx).unsqueeze(1))  # B 1 T D
        for _ in range(self.config.n_layer):
            x_sparse = F.relu(x @ self.encoder)  # B h T N
            y_sparse = F.relu(norm(self.attn(x_sparse, x)) @ self.encoder_v)  # B h T N
            merged = self.drop(x_sparse * y_sparse).transpose(1, 2).reshape(B, 1, T, -1)
            x = norm(x + norm(merged @ self.decoder))  # B 1 T D
        logits = x.view(B, T, -1) @ self.lm_head
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class PlainAttention(nn.Module):
    def __init__(self, n_neurons: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.from_numpy(frequencies(n_neurons)).view(1, 1, 1, -1))

    def forward(self, q: Tensor, v: Tensor) -> Tensor:
        positions = torch.arange(q.shape[-2], device=q.device, dtype=self.freqs.dtype).view(1, 1, -1, 1)
        angle = (positions * self.freqs) % 1 * (2 * torch.pi)  # 1 1 T N
        swapped = torch.stack((-q[..., 1::2], q[..., ::2]), dim=-1).view(q.shape)
        rotated = (q * angle.cos()).to(q.dtype) + (swapped * angle.sin()).to(q.dtype)
        return (rotated @ rotated.mT).tril(diagonal=-1) @ v


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


@pytest.fixture
def plain() -> type[PlainBDH]:
    """The plain listing's class."""
    return PlainBDH
