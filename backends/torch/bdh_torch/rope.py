"""R4: rotary positions on the neuron axis. Phases come from whole-number arithmetic, so they are exact at every position."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bdh_spec import ParamsError
from bdh_spec import rope as spec
from bdh_spec.rope import Phase
from bdh_spec.stored_table import is_the_table


class Rotations(NamedTuple):
    """Phases as one complex number per pair of neurons: of the first chunk's positions, and how far each chunk is further on.

    Phases are relative: those of a position are those of its place in the chunk, turned on by the chunk's.
    """

    local: Tensor  # C N/2
    shifts: Tensor  # chunks N/2, the first of which is no turn


class Rotary(nn.Module):
    """The rotations of a model of N neurons per head, and the ``freqs`` that its checkpoints carry.

    ``freqs`` is there to be saved and loaded only. Casts of the model change it, and rotations must not change with it.
    """

    freqs: Tensor  # (1, 1, 1, N) float32, turns per token
    fixed: Tensor  # (N/2) int64, turns per token of a pair in units of 2^-64

    def __init__(self, n_neurons: int, phase: Phase) -> None:
        super().__init__()
        self.n_neurons, self.phase = n_neurons, phase
        self.register_buffer("freqs", frequencies(n_neurons).view(1, 1, 1, -1))
        self.register_buffer("fixed", fixed_point(n_neurons), persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        return rotation(positions, self.fixed, dtype, self.phase)

    def relative(self, start: int, T: int, chunk: int, dtype: torch.dtype) -> Rotations:
        """The phases of T positions from ``start`` on, as those of a chunk and how far each chunk is turned on."""
        places, starts = (
            torch.arange(min(chunk, T), device=self.fixed.device),
            torch.arange(0, T, chunk, device=self.fixed.device),
        )
        return Rotations(*(torch.view_as_complex(self(positions, dtype)) for positions in (start + places, starts)))

    def reset(self, device: torch.device) -> None:
        """Fill both tables, which are empty in a model that was built on the meta device."""
        self.freqs = frequencies(self.n_neurons).view(1, 1, 1, -1).to(device)
        self.restore(device)

    def restore(self, device: torch.device) -> None:
        """Fill the table that no checkpoint holds."""
        self.fixed = fixed_point(self.n_neurons).to(device)


def frequencies(n_neurons: int) -> Tensor:
    """Turns per token of each neuron, float32 (N): the normative table."""
    return torch.from_numpy(spec.frequencies(n_neurons))


def fixed_point(n_neurons: int) -> Tensor:
    """Turns per token of each pair of neurons in units of 2^-64, int64 (N/2): each f is a whole number of them."""
    turns = spec.frequencies(n_neurons)[::2].astype(np.float64)
    return torch.from_numpy((turns * 2.0**64).astype(np.int64))


def check_frequencies(freqs: Tensor) -> None:
    """Refuse frequencies that are not the table as rounded by whoever wrote them."""
    found, kind = freqs.detach().double().cpu().flatten(), torch.finfo(freqs.dtype)
    if not is_the_table(found.numpy(), kind.eps, kind.smallest_normal * kind.eps):
        table = frequencies(freqs.numel()).double()
        off = (found - table).abs() / table
        n = int(off.nan_to_num(torch.inf).argmax())
        raise ParamsError(
            f"attn.freqs[{n}] is {found[n]:.8g}, the table says {table[n]:.8g} ({off[n]:.1e} of it off): these are"
            " frequencies of another model, or trained by accident; bdh-convert --freqs reset puts the table back"
        )


def turns(positions: Tensor, fixed: Tensor, dtype: torch.dtype, phase: Phase) -> Tensor:
    """How far each pair has turned at each position: a fraction of a turn from -1/2 to 1/2, (..., T) to (..., T, N/2)."""
    positions = positions[..., None]  # ... T 1
    if phase == "float32":  # what the published models saw; its error grows with the position
        whole = positions.float() * (fixed.float() * 2.0**-64)
        return (whole - whole.round()).to(dtype)
    # The product counts 2^-64 turns and wraps at whole turns by itself, where the sign bit is half a turn.
    return (positions * fixed).to(dtype) * 2.0**-64


def rotation(positions: Tensor, fixed: Tensor, dtype: torch.dtype, phase: Phase) -> Tensor:
    """Cosine and sine of the phases of whole-number positions (..., T), as pairs (..., T, N/2, 2)."""
    angle = 2 * math.pi * turns(positions, fixed, dtype, phase)  # ... T N/2
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


def rope(v: Tensor, rotations: Tensor) -> Tensor:
    """Turn each pair of neurons of v (..., T, N) by its phase."""
    pairs = torch.unflatten(v.to(rotations.dtype), -1, (-1, 2))  # ... T N/2 2
    turned = _turn_compiled(pairs, rotations) if torch.compiler.is_compiling() else _turn(pairs, rotations)
    return turned.flatten(-2).to(v.dtype)


def _turn(pairs: Tensor, rotations: Tensor) -> Tensor:
    """One pass over memory: a rotation of a pair is a product of complex numbers."""
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotations))


def _turn_compiled(pairs: Tensor, rotations: Tensor) -> Tensor:
    """The same in real numbers: the compiler fuses these, and does not know complex ones."""
    a, b = pairs.unbind(-1)
    cos, sin = rotations.unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
