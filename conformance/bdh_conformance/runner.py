"""Run a plan on a port: fixed cases first, then generated ones, and the first failure of each check explained."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import hypothesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException

from bdh_conformance.channels import CHANNELS
from bdh_conformance.channels.channel import against
from bdh_conformance.channels.loading import load
from bdh_conformance.files import frozen
from bdh_conformance.files.vectors import Judged
from bdh_conformance.outcomes import BAD, Outcome, Result
from bdh_conformance.plan import NARROW_SHAPES, Check
from bdh_conformance.yardstick.agreement import Comparison, headline
from bdh_conformance.yardstick.cases import COVERAGE, Case, pooled
from bdh_spec import Backend, BDHConfig, BDHError
from bdh_spec.rope import Phase

SMALLER = 150  # cases that are tried to make a failure smaller
PATIENCE = 20.0  # seconds after which the smallest failure so far will do


class DisagreementError(Exception):
    """What Hypothesis shrinks."""


@dataclass
class Run:
    """One port on one device, and what was found about it."""

    backend: Backend
    device: str | None = None
    seed: int | None = None  # of generated cases; None: the same ones every time
    name: str = ""  # by which the command line finds the port
    explains: bool = True  # shrink and diagnose what fails, which takes seconds
    coverage: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(COVERAGE, 0)))
    results: list[Result] = field(default_factory=list)

    def run(self, check: Check) -> Result:
        """All cases of a check, up to the first that fails: that one is shrunk and explained."""
        result = Result(check.channel.name, check.level, check.dtype, check.phase, reason=check.reason)
        self.results.append(result)
        if check.reason:
            return result
        start = time.perf_counter()
        failing = next((c for c in self.fitting(check) if self.examine(check, c, result).status in BAD), None)
        if failing is None and check.examples:
            failing = self.explore(check, result)
        if failing is not None and self.explains:
            self.explain(check, failing, result)
        result.seconds = time.perf_counter() - start
        result.reason = "" if result.cases else "none of its cases is fit for this channel"
        return result

    def fitting(self, check: Check) -> Iterator[Case | Judged]:
        """The fixed cases as the channel needs them."""
        for given in check.fixed:
            fit = given if isinstance(given, Judged) else check.channel.prepare(given)
            if fit is not None:
                yield fit

    def examine(self, check: Check, given: Case | Judged, result: Result) -> Outcome:
        """One case, counted."""
        outcome = self.judged(check, given) if isinstance(given, Judged) else self.compared(check, given)
        result.add(outcome)
        case = origin(given) if isinstance(given, Judged) else given
        self.coverage.update(item for item, holds in COVERAGE.items() if holds(case))
        return outcome

    def judged(self, check: Check, judged: Judged) -> Outcome:
        """A published vector against what is published with it."""
        expected = {name: by_dtype[check.dtype] for name, by_dtype in judged.expected.items()}
        observe = frozen.OBSERVE[check.channel.name]

        def compare() -> list[Comparison]:
            vector = judged.vector
            observed = observe(self.load(vector, check.dtype, check.phase), vector)
            # A file may hold a number as an array of one.
            observed = {n: v.reshape(expected[n].reference.shape) if v.size == 1 else v for n, v in observed.items()}
            return against(observed, {name: expected[name] for name in expected if name in observed})

        return self.outcome(check, judged.vector.origin, compare)

    def compared(self, check: Check, case: Case) -> Outcome:
        """A case against today's specification."""
        own = replace(case)  # with weights and texts of its own, whatever the port does to them

        def compare() -> list[Comparison]:
            observed = check.channel.observe(self.load(own, check.dtype, check.phase), own)
            return check.channel.compare(observed, replace(case), check.dtype, check.phase)

        return self.outcome(check, str(own), compare)

    def load(self, case: Case, dtype: str, phase: Phase) -> Any:
        return load(self.backend, case, dtype, phase, self.device)

    def outcome(self, check: Check, case: str, compare: Callable[[], list[Comparison]]) -> Outcome:
        """What came of a comparison, or the error that kept it from being made."""
        where = (check.channel.name, check.dtype, check.phase, case)
        try:
            compared = tuple(compare())
        except Exception as error:  # noqa: BLE001  a port may raise anything, and it is the port that is judged
            message = f"{self.backend.name} fails in {check.channel.name}: {type(error).__name__}: {error}"
            return Outcome(*where, "", "error", float("inf"), 0.0, message)
        if not compared:
            return Outcome(*where, "", "failed", float("inf"), 0.0, f"{self.backend.name} answers nothing", compared)
        wrong = next((c for c in compared if c.complaint), None)
        shown = wrong or max(compared, key=lambda c: c.ratio)
        message = headline(self.backend.name, list(compared)) if wrong else ""
        return Outcome(*where, shown.stage, "failed" if wrong else "passed", shown.error, shown.allowed, message, compared)

    def explore(self, check: Check, result: Result) -> Case | None:
        """Generated cases; the smallest of the pool that fails, if one does."""
        failures: list[Case] = []

        def holds(case: Case) -> None:
            fit = check.channel.prepare(case)
            hypothesis.assume(fit is not None)
            assert fit is not None  # assumed
            if self.examine(check, fit, result).status in BAD:
                failures.append(fit)
                raise DisagreementError

        shapes = tuple(s for s in check.channel.shapes if check.dtype in ("float32", "float64") or s in NARROW_SHAPES)
        strategy = pooled(shapes, min_time=check.channel.min_time, kinds=check.kinds)
        test = settings(quiet(), max_examples=check.examples, derandomize=self.seed is None)(hypothesis.given(strategy)(holds))
        if self.seed is not None:
            test = hypothesis.seed(self.seed)(test)
        try:
            test()
        except (DisagreementError, HypothesisException):  # a port that answers now so, now so, makes Hypothesis give up
            return failures[-1] if failures else None
        return None

    def explain(self, check: Check, given: Case | Judged, result: Result) -> None:
        """Say in the result what is wrong, on the smallest case that shows it."""
        if isinstance(given, Judged):
            if self.compared(check, origin(given)).status not in BAD:
                self.settle(result, self.judged(check, given), [f"{self.program(check)} --tier smoke"])
                return
            given = origin(given)
        case = self.smallest(check, given)
        outcome = self.compared(check, case)
        if outcome.status in BAD:
            again = f"{self.program(check)} --case '{case}'"
            self.settle(result, outcome, [*self.located(check, case), *self.diagnosed(check, given), again])
        elif result.worst:
            self.settle(result, result.worst, ["it does not fail every time"])

    def settle(self, result: Result, outcome: Outcome, lines: list[str]) -> None:
        """The last word on a check that failed."""
        result.worst = replace(outcome, message="\n  ".join([outcome.message, *lines]))
        result.status = "error" if outcome.status == "error" else "failed"

    def smallest(self, check: Check, case: Case) -> Case:
        """A smaller case that fails too, of any sizes."""
        deadline, known = time.perf_counter() + PATIENCE, {str(case): True}

        def fails(smaller: Case) -> bool:
            fit = check.channel.prepare(smaller)
            if fit is None or time.perf_counter() > deadline:
                return False
            if str(fit) not in known:
                known[str(fit)] = self.compared(check, fit).status in BAD
            return known[str(fit)]

        try:
            found = hypothesis.find(
                smaller_than(case, check.channel.min_time),
                fails,
                settings=settings(quiet(), max_examples=SMALLER, derandomize=True),
            )
        except HypothesisException:
            return case
        return check.channel.prepare(found) or case

    def located(self, check: Check, case: Case) -> Iterator[str]:
        """Where the trace of the same case goes wrong first, if a trace can tell."""
        if not self.traceable(check):
            return
        traced = self.compared(replace(check, channel=CHANNELS["traces"]), case)
        if traced.status == "passed":
            yield "its trace of this case agrees throughout: the mistake is none of the parallel form's stages"
        elif traced.message:
            yield f"in its trace, {traced.message.removeprefix(self.backend.name).strip()}"

    def traceable(self, check: Check) -> bool:
        """Whether a trace may tell more than the channel itself."""
        return check.channel.judge is None and check.channel.name != "traces" and "trace" in self.backend.capabilities.verbs

    def diagnosed(self, check: Check, case: Case) -> Iterator[str]:
        """The known mistakes that answer as this port does, by its trace if that is wrong too: it tells more of them apart.

        The case is the one that failed first: on the smallest one many mistakes look alike.
        """
        # Hundreds of wrong specifications: built when one is needed.
        from bdh_conformance.adversaries.diagnosis import explanations, repeated, say

        traces = replace(check, channel=CHANNELS["traces"])
        channel = traces.channel if self.traceable(check) and self.compared(traces, case).status == "failed" else check.channel
        try:
            observed, *others = repeated(
                lambda: channel.observe(self.load(replace(case), check.dtype, check.phase), replace(case))
            )
            expected = {} if channel.judge else channel.expected(case, check.dtype, check.phase)
            found = explanations(observed, channel.observe, case, check.dtype, check.phase, expected, others=others)
        except Exception:  # noqa: BLE001  the port that fails here has failed before: nothing to compare mistakes with
            return
        yield "\n  ".join(say(found).splitlines())

    def program(self, check: Check) -> str:
        """The start of the line that shows it again."""
        device = f" --device {self.device}" if self.device else ""
        phase = f" --phase {check.phase}" if check.phase != "exact" else ""
        port = f"{self.name or self.backend.name}{device}"
        return f"bdh-conform {port} --channel {check.channel.name} --dtype {check.dtype}{phase}"


def origin(judged: Judged) -> Case:
    """The case that a vector was made from, before its weights were changed."""
    return Case.parse(judged.vector.origin.split(" with ")[0])


def quiet() -> settings:
    """Hypothesis without a database, deadlines or talk."""
    return settings(
        database=None,
        deadline=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        verbosity=hypothesis.Verbosity.quiet,
    )


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
    return Case(config, batch, time, seed, case.scale, weights=draw(st.sampled_from(["normal", case.weights])))
