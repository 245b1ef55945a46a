"""Which known mistake computes what a port computed: a wrong port is held against every wrong specification."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache

import numpy as np

from bdh_conformance.cases import Case
from bdh_conformance.channels import Origin, load_params
from bdh_conformance.mistakes import MISTAKES, Mistake
from bdh_conformance.tolerances import FACTOR, FLOOR, PRECISION, Expectation, as_numpy_dtype, row_errors
from bdh_spec import Backend, Model
from bdh_spec.numpy_backend import NumpyBackend
from bdh_spec.params import Array, cast
from bdh_spec.rope import Phase

Observed = Mapping[str, Array]
Observe = Callable[[Model, Case], dict[str, Array]]
Allowed = Mapping[str, Expectation]

# Answers of two mistakes that are as close as this, relatively, are one answer, but for rounding in float64.
SAME = 1e-9

# A mistake may take away what keeps rounding small. Within this many tolerances its own rounding is looked at.
SECOND_LOOK = 100.0


def diagnose(
    observed: Observed,
    observe: Observe,
    case: Case,
    dtype: str = "float32",
    phase: Phase = "exact",
    expected: Allowed | None = None,
    among: Iterable[Mistake] | None = None,
) -> list[Mistake]:
    """The known mistakes that compute ``observed`` on this case, up to rounding, the likeliest first.

    ``observe`` is the channel's; ``expected`` what the specification computes there and its tolerance, where the channel has
    one. Empty if no known mistake, or the specification itself, explains the answer.
    """
    return [mistake for group in explanations(observed, observe, case, dtype, phase, expected, among) for mistake in group]


def explanations(
    observed: Observed,
    observe: Observe,
    case: Case,
    dtype: str = "float32",
    phase: Phase = "exact",
    expected: Allowed | None = None,
    among: Iterable[Mistake] | None = None,
) -> list[list[Mistake]]:
    """The same in groups: the mistakes of one compute the same on this case, which cannot tell them apart."""
    known = expected or {}
    right = answer(NumpyBackend(), observe, case, dtype, phase)
    found: list[tuple[float, Observed, Mistake]] = []
    for mistake in MISTAKES.values() if among is None else among:
        wrong = answer(mistake.backend(), observe, case, dtype, phase)
        away = distance(observed, wrong, known)
        if wrong is None or away > SECOND_LOOK or distance(wrong, right, known) <= 1:  # what rounding may hide explains nothing
            continue
        if away > 1 and dtype != "float64":
            away = distance(observed, wrong, widened(known, wrong, mistake.backend(), observe, case, dtype, phase))
        if away <= 1:
            found.append((away, wrong, mistake))
    found.sort(key=lambda f: f[0])
    nearest = found[0][0] if found else 0.0
    return grouped(found) if nearest < distance(observed, right, known) else []


def say(groups: list[list[Mistake]]) -> str:
    """A diagnosis in words."""
    if not groups:
        return f"none of the {len(MISTAKES)} known mistakes computes this"
    likeliest, *others = [", or ".join(f"{mistake.says} ({mistake.name})" for mistake in group) for group in groups]
    return "\n".join([f"looks like: {likeliest}", *(f"less likely: {other}" for other in others)])


@lru_cache(maxsize=4096)  # a run diagnoses many failures on few cases
def answer(backend: Backend, observe: Observe, case: Case, dtype: str, phase: Phase, wide: str = "float64") -> Observed | None:
    """What a NumPy port says of the case in float64, with weights as a port of ``dtype`` holds them; None if it fails."""
    fresh = replace(case)  # mistakes write anywhere
    held = cast(cast(case.params, as_numpy_dtype(dtype)), wide)
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return observe(load_params(Origin(backend, None, wide, phase), held, fresh), fresh)
    except Exception:  # noqa: BLE001  a mistake may fail in any way, and then it is not what answered
        return None


def widened(
    expected: Allowed, wrong: Observed, backend: Backend, observe: Observe, case: Case, dtype: str, phase: Phase
) -> Allowed:
    """The tolerances, but nowhere below what rounding does to this very mistake."""
    rounded = answer(backend, observe, case, dtype, phase, "float32") or {}
    unit = PRECISION[dtype].unit / PRECISION["float32"].unit
    return {
        name: Expectation(value, limit(name, value, rounded.get(name), expected, unit, dtype), 0)
        for name, value in wrong.items()
    }


def limit(name: str, value: Array, rounded: Array | None, expected: Allowed, unit: float, dtype: str) -> float:
    """The largest error of one array that rounding explains."""
    own = apart(rounded, value) if rounded is not None else 0.0
    known = expected[name].allowed if name in expected else FLOOR
    return max(known, FACTOR[dtype] * unit * own) if np.isfinite(own) else known


def distance(observed: Observed, answer: Observed | None, expected: Allowed) -> float:
    """How far two observations are apart, in units of what rounding may do; any large number once it is a large one."""
    if answer is None or set(observed) != set(answer):
        return float("inf")
    worst = 0.0
    for name, value in answer.items():
        allowed = expected[name].allowed if name in expected else FACTOR["float32"] * FLOOR
        worst = max(worst, apart(observed[name], value) / allowed)
        if worst > SECOND_LOOK:  # most mistakes are told apart by the first array
            break
    return worst


def same(one: Observed, other: Observed) -> bool:
    """Whether two float64 observations are one."""
    return set(one) == set(other) and all(apart(one[name], other[name]) <= SAME for name in one)


def apart(one: Array, other: Array) -> float:
    """The error of the worst row; infinite unless both have one form and are finite at the same places."""
    one, other = np.asarray(one), np.asarray(other)
    if one.shape != other.shape or one.dtype.kind != other.dtype.kind:
        return float("inf")
    if one.dtype.kind != "f":
        return 0.0 if np.array_equal(one, other) else float("inf")
    finite = np.isfinite(one)
    if not np.array_equal(finite, np.isfinite(other)):
        return float("inf")
    wide = [np.where(finite, values, 0).astype(np.float64) for values in (one, other)]
    return float(row_errors(*wide).max(initial=0))


def grouped(found: list[tuple[float, Observed, Mistake]]) -> list[list[Mistake]]:
    """Mistakes with one answer, together, where the nearest of them stands."""
    groups: list[tuple[Observed, list[Mistake]]] = []
    for _, wrong, mistake in found:
        for first, members in groups:
            if same(first, wrong):
                members.append(mistake)
                break
        else:
            groups.append((wrong, [mistake]))
    return [members for _, members in groups]
