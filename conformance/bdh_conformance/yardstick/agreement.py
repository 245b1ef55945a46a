"""The one comparison of this project, with a message that can be acted on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bdh_conformance.yardstick.tolerances import Expectation, row_errors, slope
from bdh_spec.params import Array

MANY_TOKENS = 8  # beyond which a complaint tells errors by position

# What the axes of an array count, by the name of its stage and by how many axes it has.
STAGE_AXES = {3: ("text", "token", "feature"), 4: ("text", "head", "token", "value")}
STATE_AXES = {"state": ("text", "head", "neuron", "feature"), "state_by_pair": ("text", "head", "pair", "value")}
WEIGHT_AXES = {
    "embed": ("id", "feature"),
    "encoder": ("head", "feature", "neuron"),
    "encoder_v": ("head", "feature", "neuron"),
    "decoder": ("head and neuron", "feature"),
    "lm_head": ("feature", "id"),
}


@dataclass(frozen=True)
class Comparison:
    """One array held against the specification; it agrees if there is no complaint."""

    stage: str
    error: float  # of the worst row, or of the slope where that is nearer to its limit; infinite where no number tells it
    allowed: float
    complaint: str = ""
    by_token: tuple[tuple[int, float], ...] = ()  # error over allowed up to each power of two of tokens, if it has any

    @property
    def ratio(self) -> float:
        """Error over allowed: what a report shows."""
        if self.error == 0:
            return 0.0
        return self.error / self.allowed if self.allowed else float("inf")


def assert_agrees(port: str, actual: Mapping[str, Array], expected: Mapping[str, Expectation], case: str = "") -> None:
    """Demand that a port computed what the specification says, stage by stage in the specification's order.

    Raises AssertionError at the first stage that differs, naming the last one that agreed. NaN never agrees.
    """
    compared = [compare(name, actual.get(name), expectation) for name, expectation in expected.items()]
    if any(c.complaint for c in compared):
        raise AssertionError(f"{headline(port, compared)}\n  {case}")


def headline(port: str, compared: list[Comparison]) -> str:
    """The first stage that differs, the last one before it that agreed, and what is wrong."""
    at = next(i for i, c in enumerate(compared) if c.complaint)
    agreed = compared[at - 1].stage if at else "nothing before it"
    return (
        f"{port} differs from the specification at {compared[at].stage} (agrees through {agreed})\n  {compared[at].complaint}"
    )


def compare(stage: str, actual: Array | None, expected: Expectation) -> Comparison:
    """An array against its expectation: its form first, then its rows, then its slope."""
    if complaint := malformed(actual, expected.reference):
        return Comparison(stage, float("inf"), float(np.max(expected.allowed)), complaint)
    assert actual is not None  # a missing array is malformed
    rows, scaled = row_errors(actual, expected.reference), abs(slope(actual, expected.reference))
    limits = np.broadcast_to(expected.allowed, rows.shape)
    at = np.unravel_index(np.argmax(nearness(rows, limits)), rows.shape)
    worst, limit, tokens = float(rows[at]), float(limits[at]), by_token(stage, rows, limits)
    if not (rows <= limits).all():
        return Comparison(stage, worst, limit, describe(stage, actual, expected.reference, rows, limits), tokens)
    if not scaled <= expected.allowed_slope:
        signed = slope(actual, expected.reference)
        complaint = f"all of it is scaled by 1 {signed:+.1e}, allowed {expected.allowed_slope:.1e}"
        return Comparison(stage, scaled, expected.allowed_slope, complaint, tokens)
    by_row, by_slope = (Comparison(stage, *pair, "", tokens) for pair in ((worst, limit), (scaled, expected.allowed_slope)))
    return max(by_row, by_slope, key=lambda c: c.ratio)


def nearness(rows: Array, limits: Array) -> Array:
    """Each row's error over what it is allowed; what is no number is the furthest beyond."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(rows == 0, 0.0, rows / limits)
    return np.where(np.isnan(ratio), np.inf, ratio)


def malformed(actual: Any, reference: Array) -> str:
    """What is wrong with an answer before its values are looked at: a port may answer anything."""
    if actual is None:
        return "it is missing"
    if not isinstance(actual, np.ndarray):
        return f"it is a {type(actual).__name__}, wanted a NumPy array"
    if actual.dtype not in (np.float32, np.float64):
        return f"dtype {actual.dtype}, wanted float32 or float64"
    if actual.shape != reference.shape:
        return f"shape {actual.shape}, wanted {reference.shape}"
    if not np.isfinite(actual).all():
        return f"{np.sum(~np.isfinite(actual))} of {actual.size} values are not finite; first at {first(~np.isfinite(actual))}"
    return ""


def describe(stage: str, actual: Array, reference: Array, rows: Array, limits: Array) -> str:
    """Where two finite arrays of one shape differ most: the worst value of the worst row."""
    near = nearness(rows, limits)
    at_row = np.unravel_index(np.argmax(near), rows.shape)
    in_worst_row = np.broadcast_to(spread(near == near.max(), reference.ndim), reference.shape)
    difference = np.where(in_worst_row, np.abs(np.asarray(actual, np.float64) - reference), -1)
    at = [int(i) for i in np.unravel_index(np.argmax(difference), difference.shape)]
    values = f"{actual[tuple(at)]:.8g} against {reference[tuple(at)]:.8g}"
    wrong = f"{np.sum(~(rows <= limits))} of {rows.size} rows"
    off = f"worst row off by {rows[at_row]:.1e}, allowed {limits[at_row]:.1e}"
    return f"{wrong}; {off}; worst value at {at}: {values}{place(stage, at)}{by_position(rows, limits, reference.ndim)}"


def by_position(rows: Array, limits: Array, ndim: int) -> str:
    """Of a long text: the first token that is wrong, and the largest error over allowed up to each power of two."""
    if ndim != 3 or rows.shape[1] <= MANY_TOKENS:
        return ""
    near = nearness(rows, limits).max(axis=0)  # T
    shown = ", ".join(f"{end} {ratio:.1g}" for end, ratio in doublings(near))
    return f"; first wrong token {int(np.argmax(near > 1))}; error over allowed up to token {shown}"


def by_token(stage: str, rows: Array, limits: Array) -> tuple[tuple[int, float], ...]:
    """The largest error over allowed up to each power of two; nothing of states, weights and gradients: they have no tokens."""
    *path, name = stage.split(".")
    if rows.ndim != 2 or name in STATE_AXES or {"gradients", "weights"} & set(path):
        return ()
    return tuple(doublings(nearness(rows, limits).max(axis=0)))  # B T to T


def doublings(near: Array) -> Iterator[tuple[int, float]]:
    """Of numbers by position the largest up to each power of two, from the one before on."""
    for end in (2**k for k in range(len(near).bit_length() + 1)):
        if (part := near[end // 2 : end]).size:
            yield end, float(part.max())


def spread(rows: Array, ndim: int) -> Array:
    """One value per row, with the axes of the array again: see ``row_errors``."""
    return np.expand_dims(rows, {3: (2,), 4: (1, 3)}[ndim]) if ndim in (3, 4) else rows


def place(stage: str, at: list[int]) -> str:
    """An index in words: text 0, head 2, token 5."""
    *path, name = stage.split(".")
    of_weights = WEIGHT_AXES.get(name) if {"gradients", "weights"} & set(path) else None
    axes = of_weights or STATE_AXES.get(name) or STAGE_AXES.get(len(at), ())
    if len(axes) != len(at):
        return ""
    return f" ({', '.join(f'{axis} {i}' for axis, i in zip(axes, at, strict=True))})" if at else ""


def first(where: Array) -> list[int]:
    """The index of the first true value."""
    return [int(i) for i in np.argwhere(where)[0]]


def by_pair(memory: Array) -> Array:
    """A state (B, h, N, D) as (B, h, N/2, 2 D): a row is a pair of neurons.

    Rotation moves the length of a pair from one neuron to the other. What is left of it in one of them can be as small as
    rounding, and its relative error says nothing.
    """
    if not isinstance(memory, np.ndarray) or memory.ndim != 4 or memory.shape[2] % 2:
        return memory  # no state at all: the comparison says so
    B, h, N, D = memory.shape
    return memory.reshape(B, h, N // 2, 2 * D)
