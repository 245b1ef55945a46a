"""What a failure says: the smallest case that shows it, where it goes wrong first, and which known mistake does so.

A diagnosis is made once: checks that fail by the same mistake refer to the first of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import hypothesis
from hypothesis import strategies as st

from bdh_conformance import search
from bdh_conformance.channels import CHANNELS
from bdh_conformance.files import vectors
from bdh_conformance.files.vectors import Judged, origin
from bdh_conformance.outcomes import BAD, Outcome, Result
from bdh_conformance.plan import Check
from bdh_conformance.yardstick import stages
from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.sizes import LONG
from bdh_spec import BDHConfig, BDHError
from bdh_spec.dtypes import WIDE
from bdh_spec.params import count
from bdh_spec.rope import Phase

if TYPE_CHECKING:
    from bdh_conformance.adversaries.mistakes import Mistake
    from bdh_conformance.runner import Run

SMALLER = 150  # cases that are tried to make a failure smaller
CLEAR = 4.0  # times what is allowed: a failure that is no matter of a little less rounding, and is shrunk to no other
HANDY = 2**20  # weights of a model on which every known mistake can be tried
PATIENCE = 20.0  # seconds after which the smallest failure so far will do


class Told(NamedTuple):
    """A diagnosis that was made: of which check, and the mistakes that it names first."""

    id: str
    mistakes: list[Mistake]


def explain(run: Run, check: Check, given: Case | Judged, result: Result) -> None:
    """Say in the result what is wrong, on the smallest case that shows it."""
    if isinstance(given, Judged) and run.compared(check, origin(given)).status in BAD:
        given = origin(given)
    if told := told_before(run, check, given):
        result.same_as = told.id
        named = [f"looks like {told.id}: {in_words(told.mistakes)}"]
        settle(result, run.examined(check, given), [*named, again(run, check, given)])
        return
    small = smallest_vector(run, check, given) if isinstance(given, Judged) else smallest(run, check, given)
    outcome = run.examined(check, small)
    if outcome.status in BAD:
        groups = diagnosed(run, check, given if isinstance(given, Judged) or count(given.config) < HANDY else small)
        if groups:
            run.told.append(Told(result.id, groups[0]))
        said = [] if groups is None else in_lines(groups)
        settle(result, outcome, [*located(run, check, small), *said, again(run, check, small)])
    elif result.worst:
        settle(result, result.worst, ["it does not fail every time"])


def settle(result: Result, outcome: Outcome, lines: list[str]) -> None:
    """The last word on a check that failed."""
    worst = outcome if outcome.status in BAD or result.worst is None else result.worst
    result.worst = replace(worst, message="\n  ".join([worst.message, *lines]))
    result.status = "error" if worst.status == "error" else "failed"


def told_before(run: Run, check: Check, given: Case | Judged) -> Told | None:
    """The diagnosis of another check that explains this failure as well."""
    if not run.told:
        return None
    from bdh_conformance.adversaries import diagnosis

    with asking():
        runs = answers(run, check, given)
        for told in run.told:
            if diagnosis.explanations(runs[0], *asked(check, given), among=told.mistakes, others=runs[1:]):
                return told
    return None


def smallest(run: Run, check: Check, case: Case) -> Case:
    """A smaller case that fails too, of any sizes, and as clearly: by more than what rounding might do."""
    deadline, known = time.perf_counter() + PATIENCE, {str(case): True}
    clear = CLEAR if run.compared(check, case).ratio > CLEAR else 1.0

    def fails(smaller: Case) -> bool:
        fit = check.fit(smaller)
        if fit is None or time.perf_counter() > deadline:
            return False
        if str(fit) not in known:
            outcome = run.compared(check, fit)
            known[str(fit)] = outcome.status in BAD and outcome.ratio >= clear
        return known[str(fit)]

    found = search.smallest(smaller_than(case, check.channel.min_time), fails, SMALLER)
    return case if found is None else check.fit(found) or case


def smallest_vector(run: Run, check: Check, judged: Judged) -> Judged:
    """A vector of a smaller case that fails too: read from the same positions."""
    vector, deadline = judged.vector, time.perf_counter() + PATIENCE

    def of(case: Case) -> Judged:
        made = vectors.fresh(f"smaller than {vector.name}", case, vectors.ragged(case.time), vector.starts, vector.phase)
        return vectors.in_pairs(vectors.judge(made))

    def fails(smaller: Case) -> bool:
        return time.perf_counter() < deadline and run.judged(check, of(smaller)).status in BAD

    found = search.smallest(smaller_than(origin(judged), 2), fails, SMALLER)
    return judged if found is None else of(found)


def located(run: Run, check: Check, given: Case | Judged) -> Iterator[str]:
    """Where the trace of the same case goes wrong first, if a trace can tell."""
    case = origin(given) if isinstance(given, Judged) else given
    if not traceable(run, check):
        return
    if check.channel.name != "traces":
        traced = run.compared(replace(check, channel=CHANNELS["traces"]), case)
        if traced.status == "passed":
            yield "its trace of this case agrees throughout: the mistake is none of the parallel form's stages"
        elif traced.message:
            yield f"in its trace, {traced.message.removeprefix(run.backend.name).strip()}"
        if traced.status == "failed":
            yield from amplified(run, check, case, traced.stage)
    else:
        yield from amplified(run, check, case, run.compared(check, case).stage)


def amplified(run: Run, check: Check, case: Case, first: str) -> Iterator[str]:
    """Whether the first stage of a trace that differs is wrong, or only shows what is."""
    with asking():
        trace = run.load(replace(case), check.dtype, check.phase).trace(replace(case).tokens)
        if stages.is_whole(trace, case.config) and first in trace:
            sentence = stages.blame(trace, case.tokens, case.params, case.config, check.dtype, check.phase, first)
            yield from [sentence] if sentence else []


def traceable(run: Run, check: Check) -> bool:
    """Whether a trace may tell more than the channel itself."""
    return check.channel.judge is None and "trace" not in check.channel.verbs and "trace" in run.backend.capabilities.verbs


def diagnosed(run: Run, check: Check, given: Case | Judged) -> list[list[Mistake]] | None:
    """The known mistakes that answer as this port does, by its trace if that is wrong too: it tells more of them apart.

    The case is the one that failed first: on the smallest one many mistakes look alike. None if the port gives no answer.
    """
    # Hundreds of wrong specifications: built when one is needed.
    from bdh_conformance.adversaries import diagnosis

    traces = replace(check, channel=CHANNELS["traces"])
    with asking():
        if isinstance(given, Judged):
            found = diagnosis.of_vector(answers(run, check, given), check.channel.name, *asked(check, given))
            return with_table(found, measured(run, check))
        traced = given.time <= LONG and check.channel.name != "traces" and traceable(run, check)
        if traced and run.compared(traces, given).status == "failed":
            check = traces
        alike = check.fit(diagnosis.short(given)) if given.time > LONG else None
        runs = answers(run, check, given)
        right_when_short = alike is not None and run.compared(check, alike).status == "passed"
        found = diagnosis.explain(check.channel, runs, given, check.dtype, check.phase, right_when_short=right_when_short)
        return with_table(found, measured(run, check))
    return None


def with_table(found: list[list[Mistake]], table: list[list[Mistake]]) -> list[list[Mistake]]:
    """A diagnosis with what the measured table tells: early, for some mistakes look much like it on one case."""
    others = [group for group in table if group not in found]
    return [*found[:1], *others, *found[1:]] if not found or by_power(others) else found


def by_power(table: list[list[Mistake]]) -> bool:
    """Whether a table is off by units of its last place, and not because all turns are wrong."""
    return any(mistake.name == "table_by_float32_power" for group in table for mistake in group)


def measured(run: Run, check: Check) -> list[list[Mistake]]:
    """What is wrong with the frequency table that a port turns by: no two ports are off in the same entries.

    Its width is no power of two, of which every power function knows many roots exactly.
    """
    from bdh_conformance.adversaries import table

    capabilities = run.backend.capabilities
    if check.channel.judge is not None or "trace" not in capabilities.verbs or check.dtype not in WIDE:
        return []
    phase: Phase = "exact" if "exact" in capabilities.phases else check.phase
    case = Case(BDHConfig(1, 8, 0.1, 2, 250, 11), 1, table.STEPS, seed=1, scale=20.0)
    found = table.of_trace(run.load(case, check.dtype, phase).trace(case.tokens), table.PHASE_ERROR[phase])
    return [found] if found else []


class asking:
    """A port that fails here has failed before: there is nothing to compare mistakes with, and nothing more to say."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        return isinstance(error, Exception)


def answers(run: Run, check: Check, given: Case | Judged) -> list[Any]:
    """What the port says of a case: twice, or more often where it does not repeat itself."""
    from bdh_conformance.adversaries import diagnosis

    def ask() -> Any:
        observe, case, *_ = asked(check, given)
        own = case if isinstance(given, Judged) else replace(case)
        return observe(run.load(own, check.dtype, check.phase), own)

    return diagnosis.repeated(ask)


def asked(check: Check, given: Case | Judged) -> tuple[Any, Case, str, Any, Any]:
    """What a diagnosis compares by: the observation, its case, dtype, phase, and what is expected of it."""
    if isinstance(given, Judged):
        expected = {name: by_dtype[check.dtype] for name, by_dtype in given.expected.items()}
        return check.channel.published, given.vector, check.dtype, check.phase, expected
    expected = {} if check.channel.judge else check.channel.expected(given, check.dtype, check.phase)
    return check.channel.observe, given, check.dtype, check.phase, expected


def in_lines(groups: list[list[Mistake]]) -> list[str]:
    from bdh_conformance.adversaries import diagnosis

    return diagnosis.say(groups).splitlines()


def in_words(mistakes: list[Mistake]) -> str:
    from bdh_conformance.adversaries import diagnosis

    return diagnosis.in_words(mistakes)


def again(run: Run, check: Check, given: Case | Judged) -> str:
    """The line that shows it again."""
    device = f" --device {run.device}" if run.device else ""
    phase = f" --phase {check.phase}" if check.phase != "exact" else ""
    port = f"{run.name or run.backend.name}{device}"
    case = " --tier smoke" if isinstance(given, Judged) else f" --case '{given}'"
    return f"bdh-conform {port} --channel {check.channel.name} --dtype {check.dtype}{phase}{case}"


@st.composite
def smaller_than(draw: st.DrawFn, case: Case, min_time: int) -> Case:
    """Cases no larger than this one in any size."""
    c = case.config
    n_head = draw(st.integers(1, c.n_head))
    n_embd = draw(st.sampled_from(range(min(2, c.n_embd), c.n_embd + 1, 2)))
    fitting = [
        m for m in range(1, c.mlp_internal_dim_multiplier + 1) if m * n_embd // n_head >= 2 and m * n_embd // n_head % 2 == 0
    ]
    hypothesis.assume(fitting)
    try:
        config = BDHConfig(
            draw(st.integers(1, c.n_layer)),
            n_embd,
            c.dropout,
            n_head,
            draw(st.sampled_from(fitting)),
            draw(st.integers(min(2, c.vocab_size), c.vocab_size)),
        )
    except BDHError:
        hypothesis.reject()
    batch, time = draw(st.integers(1, case.batch)), draw(st.integers(min(min_time, case.time), case.time))
    seed = draw(st.sampled_from([0, 1, 2, case.seed]))
    weights, freqs = draw(st.sampled_from(["normal", case.weights])), draw(st.sampled_from(["published", case.freqs]))
    return Case(config, batch, time, seed, case.scale, weights=weights, freqs=freqs, stored=case.stored)
