"""Run a plan on a port: fixed cases first, then generated ones, and the first failure of each check explained."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import hypothesis

from bdh_conformance import search
from bdh_conformance.channels.channel import against
from bdh_conformance.channels.loading import load
from bdh_conformance.explain import Told, explain
from bdh_conformance.files.vectors import Judged, origin
from bdh_conformance.outcomes import BAD, Outcome, Result
from bdh_conformance.plan import Check, Generated
from bdh_conformance.yardstick.agreement import Comparison, headline
from bdh_conformance.yardstick.cases import COVERAGE, Case
from bdh_spec import Backend
from bdh_spec.rope import Phase


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
    told: list[Told] = field(default_factory=list)  # what was diagnosed so far

    def run(self, check: Check, until: float | None = None) -> Result:
        """All cases of a check, up to the first that fails: that one is shrunk and explained.

        No more cases are drawn once the clock says ``until``.
        """
        result = Result(check.channel.name, check.level, check.dtype, check.phase, reason=check.reason)
        self.results.append(result)
        if check.reason:
            return result
        start = time.perf_counter()
        failing = next((c for c in self.fitting(check) if self.examine(check, c, result).status in BAD), None)
        for cases in check.generated:
            failing = failing or self.explore(check, cases, result, until)
        if failing is not None and self.explains:
            explain(self, check, failing, result)
        result.seconds = time.perf_counter() - start
        result.reason = "" if result.cases else "none of its cases is fit for this channel"
        return result

    def fitting(self, check: Check) -> Iterator[Case | Judged]:
        """The fixed cases as the channel needs them."""
        for given in check.fixed:
            fit = given if isinstance(given, Judged) else check.fit(given)
            if fit is not None:
                yield fit

    def examine(self, check: Check, given: Case | Judged, result: Result) -> Outcome:
        """One case, counted."""
        outcome = self.examined(check, given)
        result.add(outcome)
        case = origin(given) if isinstance(given, Judged) else given
        self.coverage.update(item for item, holds in COVERAGE.items() if holds(case))
        return outcome

    def examined(self, check: Check, given: Case | Judged) -> Outcome:
        """One case against the specification, or a vector against what is published with it."""
        return self.judged(check, given) if isinstance(given, Judged) else self.compared(check, given)

    def judged(self, check: Check, judged: Judged) -> Outcome:
        """A published vector against what is published with it."""
        expected = {name: by_dtype[check.dtype] for name, by_dtype in judged.expected.items()}
        observe = check.channel.published
        assert observe is not None  # the plan gives vectors to channels that read them

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

    def explore(self, check: Check, cases: Generated, result: Result, until: float | None = None) -> Case | None:
        """Generated cases; the smallest of them that fails, if one does."""
        failures: list[Case] = []

        def fails(case: Case) -> bool:
            if until is not None and time.time() > until and not failures:
                raise search.Enough
            fit = check.fit(case)
            hypothesis.assume(fit is not None)
            assert fit is not None  # assumed
            if bad := self.examine(check, fit, result).status in BAD:
                failures.append(fit)
            return bad

        search.failing(cases.strategy, fails, cases.examples, self.seed, shrinks=cases.shrinks)
        return failures[-1] if failures else None


def share(checks: Sequence[Check], number: int, until: float | None) -> float | None:
    """When a check has had its part of the time that is left: as much as its drawn cases are of those to come."""
    if until is None:
        return None
    parts = [sum(cases.examples * check.channel.cost for cases in check.generated) for check in checks[number:]]
    now = time.time()
    return now + max(until - now, 0.0) * parts[0] / max(sum(parts), 1)
