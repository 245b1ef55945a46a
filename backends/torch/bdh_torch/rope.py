"""R4: rotary positions on the neuron axis. Phases come from whole-number arithmetic, so they are exact at every position."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bdh_spec import BDHConfig, ParamsError
from bdh_spec import rope as spec
from bdh_spec.model import frequencies_of
from bdh_spec.params import Array
from bdh_spec.rope import Phase
from bdh_spec.stored_table import TABLE_ROUNDING, is_stored, is_the_table


class Rotations(NamedTuple):
    """Phases as one complex number per pair of neurons: of the first chunk's positions, and how far each chunk is further on.

    Phases are relative: those of a position are those of its place in the chunk, turned on by the chunk's.
    """

    local: Tensor  # C N/2
    shifts: Tensor  # chunks N/2, the first of which is no turn


class Rotary(nn.Module):
    """The rotations of a model, and the ``freqs`` that its checkpoints carry.

    ``freqs`` is there to be saved and loaded only. Casts of the model change it, and rotations must not change with it.
    """

    freqs: Tensor  # (1, 1, 1, N) float32, turns per token
    fixed: Tensor  # (N/2), or (N) where the two neurons of a pair differ: turns per token as whole numbers

    def __init__(self, config: BDHConfig, phase: Phase) -> None:
        super().__init__()
        self.table, self.phase = frequencies_of(config), phase
        self.register_buffer("freqs", stored(self.table))
        self.register_buffer("fixed", whole_numbers(self.table, phase), persistent=False)

    @property
    def in_pairs(self) -> bool:
        """Whether both neurons of every pair turn alike, so that positions may be counted from anywhere."""
        return len(self.fixed) < len(self.table)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        return rotation(positions, self.fixed, dtype, self.phase)

    def reset(self, device: torch.device) -> None:
        """Fill both tables, which are empty in a model that was built on the meta device."""
        self.freqs = stored(self.table).to(device)
        self.restore(device)

    def restore(self, device: torch.device) -> None:
        """Fill the table that no checkpoint holds."""
        self.fixed = whole_numbers(self.table, self.phase).to(device)


def stored(table: Array) -> Tensor:
    """Turns per token of each neuron as checkpoints carry them, float32 (1, 1, 1, N)."""
    return torch.tensor(table).view(1, 1, 1, -1)


def whole_numbers(table: Array, phase: Phase) -> Tensor:
    """A table (N) as whole numbers, which no cast of a model changes: once per pair, (N/2), unless the two neurons differ.

    For exact phases they are units of 2^-64 turns, int64; for phases in float32 the bits of the table itself, int32.
    """
    each = table[::2] if (table[::2] == table[1::2]).all() else table
    if phase == "float32":
        return torch.tensor(each).view(torch.int32)
    return torch.from_numpy(spec.fixed_point(each).view(np.int64))  # signed: from minus half a turn to half a turn


def fixed_point(n_neurons: int) -> Tensor:
    """BDH's turns per token of each pair of neurons in units of 2^-64, int64 (N/2)."""
    return whole_numbers(spec.frequencies(n_neurons), "exact")


def check_frequencies(freqs: Tensor, table: Array) -> None:
    """Refuse frequencies that are not the model's table as rounded by whoever wrote them."""
    found, kind = freqs.detach().double().cpu().flatten(), torch.finfo(freqs.dtype)
    if found.numel() != table.size:
        raise ParamsError(
            f"attn.freqs has {found.numel()} values, the model {table.size} neurons: load another model's weights"
        )
    eps = max(kind.eps, torch.finfo(torch.float32).eps)
    is_normative = is_the_table(table)
    rounding = TABLE_ROUNDING + eps if is_normative else eps
    if not is_stored(table, found.numpy(), rounding, kind.smallest_normal * kind.eps):
        wanted = torch.tensor(table).double()
        off = ((found - wanted) / wanted).abs()
        n = int(off.nan_to_num(torch.inf).argmax())
        raise ParamsError(
            f"attn.freqs[{n}] is {found[n]:.8g}, the {'table' if is_normative else 'model'} says {wanted[n]:.8g}"
            f" ({off[n]:.1e} of it off): these are frequencies of another model, or trained by accident; a model that computes"
            " by them is BDH(BDHConfig(..., freqs=bdh_spec.Frequencies(state['attn.freqs']))), and bdh-convert --freqs reset"
            " puts BDH's table back"
        )


def turns(positions: Tensor, fixed: Tensor, dtype: torch.dtype, phase: Phase) -> Tensor:
    """How far each has turned at each position: a fraction of a turn from -1/2 to 1/2, (..., T) to (..., T, K)."""
    positions = positions[..., None]  # ... T 1
    if phase == "float32":  # what the published models saw; its error grows with the position
        whole = positions.float() * fixed.view(torch.float32)
        return (whole - whole.round()).to(dtype)
    # The product counts 2^-64 turns and wraps at whole turns by itself, where the sign bit is half a turn.
    return (positions * fixed).to(dtype) * 2.0**-64


def rotation(positions: Tensor, fixed: Tensor, dtype: torch.dtype, phase: Phase) -> Tensor:
    """Cosine and sine of the phases of whole-number positions (..., T): (..., T, N/2, 2), or (..., T, N, 2) of each neuron."""
    angle = 2 * math.pi * turns(positions, fixed, dtype, phase)  # ... T K
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


def relative(start: int | Tensor, T: int, chunk: int, fixed: Tensor, dtype: torch.dtype, phase: Phase) -> Rotations:
    """The phases of T positions from ``start`` on, as those of a chunk and how far each chunk is turned on."""
    places = torch.arange(min(chunk, T), device=fixed.device)
    starts = torch.arange(0, T, chunk, device=fixed.device)
    return Rotations(
        *(torch.view_as_complex(rotation(positions, fixed, dtype, phase)) for positions in (start + places, starts))
    )


def rope(v: Tensor, rotations: Tensor) -> Tensor:
    """Turn each pair of neurons of v (..., T, N) by its phase, or each neuron by its own."""
    wide = v.to(rotations.dtype)
    if rotations.shape[-2] == v.shape[-1]:  # no rotation, so that nothing shorter than the equation will do
        cos, sin = rotations.unbind(-1)
        return (wide * cos + swap(wide) * sin).to(v.dtype)
    pairs = torch.unflatten(wide, -1, (-1, 2))  # ... T N/2 2
    turned = _turn_compiled(pairs, rotations) if torch.compiler.is_compiling() else _turn(pairs, rotations)
    return turned.flatten(-2).to(v.dtype)


def swap(v: Tensor) -> Tensor:
    """A quarter turn: (a, b) becomes (-b, a) in every pair."""
    a, b = torch.unflatten(v, -1, (-1, 2)).unbind(-1)
    return torch.stack((-b, a), dim=-1).flatten(-2)


def _turn(pairs: Tensor, rotations: Tensor) -> Tensor:
    """One pass over memory: a rotation of a pair is a product of complex numbers."""
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotations))


def _turn_compiled(pairs: Tensor, rotations: Tensor) -> Tensor:
    """The same in real numbers: the compiler fuses these, and does not know complex ones."""
    a, b = pairs.unbind(-1)
    cos, sin = rotations.unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
