"""R14 across ports: do they write one text from one seed, and where they do not, was the draw too close to call?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bdh_conformance.yardstick.agreement import Comparison
from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.reference import Specification
from bdh_conformance.yardstick.tolerances import FACTOR, FLOOR, as_numpy_dtype
from bdh_spec.numpy_backend import NumpyBackend
from bdh_spec.params import Array, cast
from bdh_spec.protocol import Model
from bdh_spec.rope import Phase
from bdh_spec.sampling import probabilities, sample, uniform

SETTINGS: tuple[tuple[float, int | None, int], ...] = (
    (1.0, None, 0),
    (0.8, 3, 1),
    (2.0, 0, 2**63),
    (1.0, 1, 2),
    (0.0, None, 3),
    (0.0, 2, 4),
    (3.0, 2, 5),
)  # temperature, top_k, and what is added to the case's seed
NEW = 8
PERTURBATIONS = 64


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


def written(model: Model, case: Case) -> dict[str, Array]:
    """The texts that a model writes on a case's tokens, by setting."""
    return {
        setting_name(temperature, top_k): model.generate(case.tokens, NEW, temperature, top_k, case.seed + plus)
        for temperature, top_k, plus in SETTINGS
    }


def setting_name(temperature: float, top_k: int | None) -> str:
    return f"temperature_{temperature}_top_k_{top_k}"


def judge(observed: Mapping[str, Array], case: Case, dtype: str, phase: Phase) -> list[Comparison]:
    """The specification's texts, token by token, except where rounding decides between two candidates (R14)."""
    held = cast(case.params, as_numpy_dtype(dtype))
    wide, narrow = (Specification(cast(held, d), case.config, phase) for d in (np.float64, np.float32))
    compared = []
    for temperature, top_k, plus in SETTINGS:
        name, seed = setting_name(temperature, top_k), case.seed + plus
        text, expected = observed.get(name), wide.generate(case.tokens, NEW, temperature, top_k, seed)
        wrong = complaint(text, expected, lambda r, t: excused(wide, narrow, r, t, temperature, top_k, seed))  # noqa: B023
        compared.append(Comparison(name, float("inf") if wrong else 0.0, 0.0, wrong))
    return compared


def complaint(text: Any, expected: Array, is_excused: Callable[[int, Array], bool]) -> str:
    """What is wrong with the texts of a batch, or an empty string."""
    if not isinstance(text, np.ndarray) or text.dtype.kind not in "iu" or text.shape != expected.shape:
        return f"it is {describe_array(text)}, wanted whole numbers of shape {expected.shape}"
    for row in np.flatnonzero((text != expected).any(axis=1)):
        at = int(np.argmax(text[row] != expected[row]))
        if not is_excused(int(row), text[row, : at + 1]):
            return f"text {row} has token {text[row, at]} at {at}, wanted {expected[row, at]}"
    return ""


def describe_array(value: Any) -> str:
    return f"{value.dtype} of shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__


def excused(wide: Model, narrow: Model, row: int, text: Array, temperature: float, top_k: int | None, seed: int) -> bool:
    """Whether rounding of the logits could have chosen the last token of this text (T,).

    Logits that tie exactly stay tied: rounding moves equal numbers alike.
    """
    before, position = text[None, :-1], len(text) - 1
    exact, rounded = (model.forward(before)[0, -1].astype(np.float64) for model in (wide, narrow))
    reach = FACTOR["float32"] * np.abs(rounded - exact).max() + FLOOR * np.abs(exact).max()
    ids, draw, rng = np.unique(exact, return_inverse=True)[1], uniform(seed, position, row), np.random.default_rng(seed)
    moved = (exact + rng.uniform(-reach, reach, exact.size)[ids] for _ in range(PERTURBATIONS))
    return any(sample(logits, draw, temperature, top_k) == text[-1] for logits in moved)
