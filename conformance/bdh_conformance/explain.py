"""What a failure says: the smallest case that shows it, where it goes wrong first, and which known mistake does so."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import hypothesis
from hypothesis import strategies as st

from bdh_conformance import search
from bdh_conformance.channels import CHANNELS
from bdh_conformance.files.vectors import Judged, origin
from bdh_conformance.outcomes import BAD, Outcome, Result
from bdh_conformance.plan import Check
from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.sizes import LONG
from bdh_spec import BDHConfig, BDHError

if TYPE_CHECKING:
    from bdh_conformance.runner import Run

SMALLER = 150  # cases that are tried to make a failure smaller
PATIENCE = 20.0  # seconds after which the smallest failure so far will do


def explain(run: Run, check: Check, given: Case | Judged, result: Result) -> None:
    """Say in the result what is wrong, on the smallest case that shows it."""
    if isinstance(given, Judged):
        if run.compared(check, origin(given)).status not in BAD:
            settle(result, run.judged(check, given), [f"{program(run, check)} --tier smoke"])
            return
        given = origin(given)
    case = smallest(run, check, given)
    outcome = run.compared(check, case)
    if outcome.status in BAD:
        again = f"{program(run, check)} --case '{case}'"
        settle(result, outcome, [*located(run, check, case), *diagnosed(run, check, given), again])
    elif result.worst:
        settle(result, result.worst, ["it does not fail every time"])


def settle(result: Result, outcome: Outcome, lines: list[str]) -> None:
    """The last word on a check that failed."""
    result.worst = replace(outcome, message="\n  ".join([outcome.message, *lines]))
    result.status = "error" if outcome.status == "error" else "failed"


def smallest(run: Run, check: Check, case: Case) -> Case:
    """A smaller case that fails too, of any sizes."""
    deadline, known = time.perf_counter() + PATIENCE, {str(case): True}

    def fails(smaller: Case) -> bool:
        fit = check.channel.prepare(smaller)
        if fit is None or time.perf_counter() > deadline:
            return False
        if str(fit) not in known:
            known[str(fit)] = run.compared(check, fit).status in BAD
        return known[str(fit)]

    found = search.smallest(smaller_than(case, check.channel.min_time), fails, SMALLER)
    return case if found is None else check.channel.prepare(found) or case


def located(run: Run, check: Check, case: Case) -> Iterator[str]:
    """Where the trace of the same case goes wrong first, if a trace can tell."""
    if not traceable(run, check):
        return
    traced = run.compared(replace(check, channel=CHANNELS["traces"]), case)
    if traced.status == "passed":
        yield "its trace of this case agrees throughout: the mistake is none of the parallel form's stages"
    elif traced.message:
        yield f"in its trace, {traced.message.removeprefix(run.backend.name).strip()}"


def traceable(run: Run, check: Check) -> bool:
    """Whether a trace may tell more than the channel itself."""
    return check.channel.judge is None and "trace" not in check.channel.verbs and "trace" in run.backend.capabilities.verbs


def diagnosed(run: Run, check: Check, case: Case) -> Iterator[str]:
    """The known mistakes that answer as this port does, by its trace if that is wrong too: it tells more of them apart.

    The case is the one that failed first: on the smallest one many mistakes look alike.
    """
    # Hundreds of wrong specifications: built when one is needed.
    from bdh_conformance.adversaries import diagnosis

    traces = replace(check, channel=CHANNELS["traces"])
    is_traced = case.time <= LONG and traceable(run, check) and run.compared(traces, case).status == "failed"
    channel = traces.channel if is_traced else check.channel
    alike = channel.prepare(diagnosis.short(case)) if case.time > LONG else None
    try:
        runs = diagnosis.repeated(lambda: channel.observe(run.load(replace(case), check.dtype, check.phase), replace(case)))
        right_when_short = alike is not None and run.compared(check, alike).status == "passed"
        found = diagnosis.explain(channel, runs, case, check.dtype, check.phase, right_when_short=right_when_short)
    except Exception:  # noqa: BLE001  the port that fails here has failed before: nothing to compare mistakes with
        return
    yield "\n  ".join(diagnosis.say(found).splitlines())


def program(run: Run, check: Check) -> str:
    """The start of the line that shows it again."""
    device = f" --device {run.device}" if run.device else ""
    phase = f" --phase {check.phase}" if check.phase != "exact" else ""
    port = f"{run.name or run.backend.name}{device}"
    return f"bdh-conform {port} --channel {check.channel.name} --dtype {check.dtype}{phase}"


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
            draw(st.integers(2, c.vocab_size)),
        )
    except BDHError:
        hypothesis.reject()
    batch, time = draw(st.integers(1, case.batch)), draw(st.integers(min_time, case.time))
    seed = draw(st.sampled_from([0, 1, 2, case.seed]))
    weights, freqs = draw(st.sampled_from(["normal", case.weights])), draw(st.sampled_from(["published", case.freqs]))
    return Case(config, batch, time, seed, case.scale, weights=weights, freqs=freqs)
