"""R14 across ports: do they write one text from one seed, and where they do not, was the draw too close to call?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bdh_spec.numpy_backend import NumpyBackend
from bdh_spec.params import Array
from bdh_spec.protocol import Model
from bdh_spec.sampling import probabilities, uniform


@dataclass(frozen=True)
class Difference:
    """The first token at which a port's text leaves the specification's."""

    row: int
    position: int
    gap: float  # from the draw to the nearest edge between two candidates, in probability
    rounding: float  # how far float32 rounding of the specification moves those edges there


def differences(port: Model, reference: Model, prompts: Array, new: int, temperature: float, seed: int) -> list[Difference]:
    """Where texts of ``port`` part from those of ``reference``, the float64 specification; prompts (B, T)."""
    written, expected = (model.generate(prompts, new, temperature, seed=seed) for model in (port, reference))
    rows = np.flatnonzero((written != expected).any(axis=1))
    return [part(reference, expected[row], written[row], int(row), temperature, seed) for row in rows]


def part(reference: Model, expected: Array, written: Array, row: int, temperature: float, seed: int) -> Difference:
    """The first difference between two texts, and how close the draw that made it was."""
    position = int(np.argmax(expected != written))
    before = expected[None, :position]
    edges = cumulative(reference.forward(before)[0, -1], temperature)
    rounded = cumulative(float32_of(reference).forward(before)[0, -1], temperature)
    gap = float(np.abs(edges - uniform(seed, position, row)).min())
    return Difference(row, position, gap, float(np.abs(edges - rounded).max()))


def cumulative(logits: Array, temperature: float) -> Array:
    """The edges between candidates, from 0 to 1."""
    edges: Array = np.cumsum(probabilities(logits, temperature))
    return edges


def float32_of(reference: Model) -> Model:
    """The specification in float32 with the same weights."""
    return NumpyBackend().load(reference.params(), reference.config, dtype="float32", phase=reference.phase)
