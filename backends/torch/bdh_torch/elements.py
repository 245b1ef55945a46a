"""What is done to every neuron between two products, and undone for a gradient: R3, R4, R7 and R8 on a block of them.

Each is a few of PyTorch's operations, which pass over memory once each, or one pass in C where a machine has a compiler:
``native``. All write to what they are given.

Axes: R rows, which are the C places of each of G texts, one text after the other; n neurons of a block.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bdh_torch.layer import wide
from bdh_torch.rope import Rotations

_threshold = torch.ops.aten.threshold_backward.grad_input  # the slope of a relu, given what it returned


class Phases(NamedTuple):
    """How far the pairs of a block turn, as complex numbers: at each place of a chunk, and all of them further on."""

    local: Tensor  # C n/2
    shift: Tensor | None  # n/2; none in the first chunk of a text


def phases(rotations: Rotations, number: int, block: slice, C: int) -> Phases:
    """Those of a block of neurons in a chunk of C places, by its number."""
    half = slice(block.start // 2, block.stop // 2)
    return Phases(rotations.local[:C, half], rotations.shifts[number, half] if number else None)


def relu_and_turn(neurons: Tensor, by: Phases, out: Tensor) -> None:
    """Neurons (R, n) become their relu (R3); what these are when each pair is turned goes to ``out`` (R4)."""
    if compiled := _compiled(neurons):
        compiled.relu_and_turn(neurons, by, out)
    else:
        _turn(neurons.relu_(), by, out)


def gate(neurons: Tensor, opened: Tensor) -> None:
    """Neurons (R, n) are multiplied by the relu of what opens them (R7), which may be lost."""
    if compiled := _compiled(neurons):
        compiled.gate(neurons, opened)
    else:
        neurons.mul_(opened.relu_())


def undo_gate(neurons: Tensor, opened: Tensor, slopes: Tensor, waiting: Tensor, mask: Tensor | None) -> None:
    """Undo R8, R7 and the relu of R3, all (R, n).

    Neurons become their relu, ``opened`` the product of its own with that and the mask. ``slopes``, of that product, become
    those of what opened; those of the neurons by way of it go to ``waiting``.
    """
    if compiled := _compiled(neurons):
        compiled.undo_gate(neurons, opened, slopes, waiting, mask)
        return
    x_sparse, y_sparse = neurons.relu_(), opened.relu_()
    if mask is not None:
        slopes.mul_(mask)
    torch.mul(slopes, y_sparse, out=waiting)
    _threshold(slopes.mul_(x_sparse), y_sparse, 0, grad_input=slopes)
    xy_sparse = y_sparse.mul_(x_sparse)
    if mask is not None:
        xy_sparse.mul_(mask)


def undo_turn(slopes: Tensor, by: Phases, waiting: Tensor, neurons: Tensor) -> None:
    """Undo R4 and R3: slopes (R, n) of turned neurons, with those that waited, become those before the relu."""
    if compiled := _compiled(slopes):
        compiled.undo_turn(slopes, by, waiting, neurons)
        return
    _turn(slopes, by, slopes)
    _threshold(slopes.add_(waiting), neurons, 0, grad_input=slopes)


def _turn(neurons: Tensor, by: Phases, out: Tensor) -> None:
    """One pass where nothing is narrow: turning a pair is a product of complex numbers.

    That takes a third of the time of four passes over pairs that lie apart.
    """
    kind, C = wide(neurons.dtype), len(by.local)
    source = neurons.to(kind)
    target = out if out.dtype == kind else source
    pairs, turned = (
        torch.view_as_complex(torch.unflatten(torch.unflatten(values, -1, (-1, 2)), 0, (-1, C))) for values in (source, target)
    )  # G C n/2
    torch.mul(pairs, by.local, out=turned)
    if by.shift is not None:
        turned.mul_(by.shift)
    if target is not out:
        out.copy_(target)


def _compiled(values: Tensor) -> Any:
    """The same in C, or None. By name: code that is saved beside weights does without it."""
    if __name__ != "bdh_torch.elements" or values.device.type != "cpu":
        return None
    return import_module("bdh_torch.native").compiled(values.dtype)
