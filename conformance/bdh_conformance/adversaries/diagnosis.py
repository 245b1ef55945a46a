"""Which known mistake computes what a port computed: a wrong port is held against every wrong specification."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from bdh_conformance.adversaries.mistakes import MISTAKES, Mistake
from bdh_conformance.channels.channel import Channel
from bdh_conformance.channels.loading import Origin, load_params
from bdh_conformance.yardstick.agreement import nearness
from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.sizes import LONG
from bdh_conformance.yardstick.tolerances import FACTOR, FLOOR, PRECISION, Expectation, row_errors
from bdh_spec import Backend, Model
from bdh_spec.dtypes import numpy_dtype
from bdh_spec.numpy_backend import NumpyBackend
from bdh_spec.params import Array, cast
from bdh_spec.rope import Phase

Observed = Mapping[str, Array]
Observe = Callable[[Model, Case], dict[str, Array]]
Allowed = Mapping[str, Expectation]

NAMED = 6  # of the mistakes that a case cannot tell apart

# Answers of two mistakes that are as close as this, relatively, are one answer, but for rounding in float64.
SAME = 1e-9

# Runs that show where a port answers at random: a sum in another order often rounds alike.
RUNS = 6

# Two distances no further apart are one: last bits differ from processor to processor.
TIE = 0.1

SHORT = 5  # tokens of the text on which a port that fails on a long one is tried as well
DEAR = 3  # the cost of a channel from which on only those mistakes are tried that it has to see

# A mistake may take away what keeps rounding small. Within this many tolerances its own rounding is looked at.
SECOND_LOOK = 100.0


class Found(NamedTuple):
    """A mistake that computes what a port computed."""

    away: float  # in units of what rounding may do
    answer: Observed
    mistake: Mistake


def diagnose(
    observed: Observed,
    observe: Observe,
    case: Case,
    dtype: str = "float32",
    phase: Phase = "exact",
    expected: Allowed | None = None,
    among: Iterable[Mistake] | None = None,
    others: Sequence[Observed] = (),
) -> list[Mistake]:
    """The known mistakes that compute ``observed`` on this case, up to rounding, the likeliest first.

    ``observe`` is the channel's; ``expected`` what the specification computes there and its tolerance, where the channel has
    one; ``others`` what the same port answered when asked again. Empty if no known mistake, or the specification itself,
    explains the answer.
    """
    groups = explanations(observed, observe, case, dtype, phase, expected, among, others)
    return [mistake for group in groups for mistake in group]


def explanations(
    observed: Observed,
    observe: Observe,
    case: Case,
    dtype: str = "float32",
    phase: Phase = "exact",
    expected: Allowed | None = None,
    among: Iterable[Mistake] | None = None,
    others: Sequence[Observed] = (),
) -> list[list[Mistake]]:
    """The same in groups: the mistakes of one compute the same on this case, which cannot tell them apart."""
    known, suspects = expected or {}, list(MISTAKES.values() if among is None else among)
    groups = by_value(observed, observe, case, dtype, phase, known, suspects, "float64")
    if not groups and known and dtype != "float64":
        # Where a mistake makes a number too large for float32, what rounding leaves of it is the answer, on any port.
        groups = by_value(observed, observe, case, dtype, phase, known, suspects, "float32")
    groups += by_place([observed, *others], observe, case, dtype, phase, suspects)
    return groups or in_part(observed, observe, case, dtype, phase, known, suspects)


def explain(
    channel: Channel, runs: Sequence[Observed], case: Case, dtype: str, phase: Phase, *, right_when_short: bool
) -> list[list[Mistake]]:
    """The same for a channel, given what a port answered in one run or more: first the mistakes that the channel has to see.

    The others are held against it only where that takes no time. A port whose long texts alone go wrong has a mistake of which
    the same is true.
    """
    expected = {} if channel.judge else channel.expected(case, dtype, phase)
    named = [mistake for mistake in MISTAKES.values() if channel.name in mistake.channels]
    if right_when_short:
        named = [mistake for mistake in named if mistake.random or is_right(channel, mistake, short(case), dtype, phase)]
    others = [mistake for mistake in MISTAKES.values() if channel.name not in mistake.channels]
    for suspects in (named, others if channel.cost < DEAR and case.time <= LONG else []):
        if found := explanations(runs[0], channel.observe, case, dtype, phase, expected, suspects, runs[1:]):
            return found
    return []


def of_vector(
    runs: Sequence[Observed], name: str, observe: Observe, case: Case, dtype: str, phase: Phase, expected: Allowed
) -> list[list[Mistake]]:
    """The same for what a channel of this name computed of a published vector."""
    named = [mistake for mistake in MISTAKES.values() if name in mistake.channels]
    others = [mistake for mistake in MISTAKES.values() if name not in mistake.channels]
    for suspects in (named, others):
        if found := explanations(runs[0], observe, case, dtype, phase, expected, suspects, runs[1:]):
            return found
    return []


def short(case: Case) -> Case:
    """A case like this one whose text is short."""
    return replace(case, time=min(case.time, SHORT))


def is_right(channel: Channel, mistake: Mistake, case: Case, dtype: str, phase: Phase) -> bool:
    """Whether a mistake does not show on a case."""
    expected = channel.expected(case, dtype, phase)
    wrong = answer(mistake.backend(), channel.observe, case, dtype, phase)
    return distance({name: e.reference for name, e in expected.items()}, wrong, expected) <= 1


def by_value(
    observed: Observed,
    observe: Observe,
    case: Case,
    dtype: str,
    phase: Phase,
    known: Allowed,
    among: Iterable[Mistake],
    wide: str,
) -> list[list[Mistake]]:
    """The mistakes that compute ``observed`` in the precision ``wide``, up to rounding."""
    rights = [answer(NumpyBackend(), observe, case, dtype, phase, precision) for precision in {"float64", wide}]

    def from_right(values: Observed) -> float:
        return min(distance(values, right, known) for right in rights)

    found: list[Found] = []
    for mistake in (mistake for mistake in among if not mistake.random):
        wrong = answer(mistake.backend(), observe, case, dtype, phase, wide)
        away = distance(observed, wrong, known)
        if wrong is None or away > SECOND_LOOK or from_right(wrong) <= 1:  # what rounding may hide explains nothing
            continue
        if away > 1 and dtype != "float64" and wide == "float64":
            away = distance(observed, wrong, widened(known, wrong, mistake.backend(), observe, case, dtype, phase))
        if away <= 1:
            found.append(Found(away, wrong, mistake))
    nearest = min((one.away for one in found), default=0.0)
    return ranked(grouped(found)) if nearest < from_right(observed) else []


def in_part(
    observed: Observed, observe: Observe, case: Case, dtype: str, phase: Phase, known: Allowed, among: Iterable[Mistake]
) -> list[list[Mistake]]:
    """The mistakes that compute every array which is wrong, where the others are right: made from some position on, or of some
    lengths only.
    """
    right = answer(NumpyBackend(), observe, case, dtype, phase) or {}
    wrong = [name for name in observed if name not in right or beyond(observed, right, known, name)]
    if not 0 < len(wrong) < len(observed):
        return []
    found = []
    for mistake in (mistake for mistake in among if not mistake.random):
        theirs = answer(mistake.backend(), observe, case, dtype, phase)
        if theirs and all(name in theirs and not beyond(observed, theirs, known, name) for name in wrong):
            found.append(mistake)
    return [found] if found else []


def beyond(observed: Observed, other: Observed, known: Allowed, name: str) -> bool:
    """Whether an array of two observations differs by more than rounding."""
    allowed = known[name].allowed if name in known else FACTOR["float32"] * FLOOR
    if np.ndim(allowed) and np.shape(other[name]) != known[name].reference.shape:
        allowed = np.max(allowed)
    return apart(observed[name], other[name], allowed) > 1


def by_place(
    runs: Sequence[Observed], observe: Observe, case: Case, dtype: str, phase: Phase, among: Iterable[Mistake]
) -> list[list[Mistake]]:
    """The mistakes that answer at random in the very arrays in which these runs of a port differ."""
    if not (places := unsteady(runs)):
        return []

    def its_runs(mistake: Mistake) -> list[Observed]:
        return [fresh_answer(mistake.backend(), observe, case, dtype, phase) or {} for _ in range(RUNS)]

    alike = [mistake for mistake in among if mistake.random and unsteady(its_runs(mistake)) == places]
    return [alike] if alike else []


def repeated(ask: Callable[[], Observed]) -> list[Observed]:
    """A port's answers to one question: two if they are the same to the bit, else as many as show where they differ."""
    answers = [ask(), ask()]
    return answers + [ask() for _ in range(RUNS - 2)] if unsteady(answers) else answers


def unsteady(runs: Sequence[Observed]) -> set[str]:
    """The names of the arrays that are not the same, to the bit, in all runs."""
    first, *others = runs
    return {name for run in others for name in {*first, *run} if not identical(first.get(name), run.get(name))}


def identical(one: Array | None, other: Array | None) -> bool:
    """Whether two arrays are one, NaN included."""
    a, b = np.asarray(one), np.asarray(other)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def say(groups: list[list[Mistake]]) -> str:
    """A diagnosis in words."""
    if not groups:
        return f"none of the {len(MISTAKES)} known mistakes computes this"
    likeliest, *others = map(in_words, groups)
    return "\n".join([f"looks like: {likeliest}", *(f"less likely: {other}" for other in others)])


def in_words(group: Sequence[Mistake]) -> str:
    """Mistakes that a case cannot tell apart, a few of them by name."""
    named = [f"{mistake.says} ({mistake.name})" for mistake in group[:NAMED]]
    return ", or ".join([*named, f"{len(group) - NAMED} others"] if len(group) > NAMED else named)


def fresh_answer(
    backend: Backend, observe: Observe, case: Case, dtype: str, phase: Phase, wide: str = "float64"
) -> Observed | None:
    """What a NumPy port says of the case in float64, with weights as a port of ``dtype`` holds them; None if it fails."""
    fresh = replace(case)  # mistakes write anywhere
    held = case.given if case.stored == "int8" else cast(cast(case.params, numpy_dtype(dtype)), wide)
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return observe(load_params(Origin(backend, None, wide, phase), held, fresh), fresh)
    except Exception:  # noqa: BLE001  a mistake may fail in any way, and then it is not what answered
        return None


@lru_cache(maxsize=4096)  # a run diagnoses many failures on few cases
def answer(backend: Backend, observe: Observe, case: Case, dtype: str, phase: Phase, wide: str = "float64") -> Observed | None:
    """The same, remembered."""
    return fresh_answer(backend, observe, case, dtype, phase, wide)


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


def limit(name: str, value: Array, rounded: Array | None, expected: Allowed, unit: float, dtype: str) -> Any:
    """The largest error of one array, or of each of its rows, that rounding explains."""
    own = apart(rounded, value) if rounded is not None else 0.0
    known = expected[name].allowed if name in expected else FLOOR
    if np.ndim(known) and np.shape(value) != expected[name].reference.shape:
        known = np.max(known)  # of an answer in another form
    return np.maximum(known, FACTOR[dtype] * unit * own) if np.isfinite(own) else known


def distance(observed: Observed, answer: Observed | None, expected: Allowed) -> float:
    """How far two observations are apart, in units of what rounding may do; any large number once it is a large one."""
    if answer is None or set(observed) != set(answer):
        return float("inf")
    worst = 0.0
    for name, value in answer.items():
        allowed = expected[name].allowed if name in expected else FACTOR["float32"] * FLOOR
        if np.ndim(allowed) and np.shape(value) != expected[name].reference.shape:
            allowed = np.max(allowed)  # of an answer in another form
        worst = max(worst, apart(observed[name], value, allowed))
        if worst > SECOND_LOOK:  # most mistakes are told apart by the first array
            break
    return worst


def same(one: Observed, other: Observed) -> bool:
    """Whether two float64 observations are one."""
    return set(one) == set(other) and all(apart(one[name], other[name]) <= SAME for name in one)


def apart(one: Array, other: Array, allowed: Any = 1.0) -> float:
    """The error of the worst row over what it is allowed; infinite for two forms, or numbers at other places."""
    one, other = np.asarray(one), np.asarray(other)
    if one.shape != other.shape or one.dtype.kind != other.dtype.kind:
        return float("inf")
    if one.dtype.kind != "f":
        return 0.0 if np.array_equal(one, other) else float("inf")
    finite = np.isfinite(one)
    if not np.array_equal(finite, np.isfinite(other)):
        return float("inf")
    wide = [np.where(finite, values, 0).astype(np.float64) for values in (one, other)]
    return float(nearness(row_errors(*wide), allowed).max(initial=0))


def grouped(found: list[Found]) -> list[list[Found]]:
    """Mistakes with one answer, together, in the library's order."""
    groups: list[list[Found]] = []
    for one in found:
        alike = next((group for group in groups if same(group[0].answer, one.answer)), None)
        if alike is None:
            groups.append([one])
        else:
            alike.append(one)
    return groups


def ranked(groups: list[list[Found]]) -> list[list[Mistake]]:
    """The nearest group first; those that rounding cannot tell apart keep the library's order."""
    left, order = list(groups), []
    while left:
        nearest = min(group[0].away for group in left)
        order.append(next(group for group in left if group[0].away <= nearest + TIE))
        left.remove(order[-1])
    return [[one.mistake for one in group] for group in order]
