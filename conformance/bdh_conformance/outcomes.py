"""What a run found: one outcome for every channel on every case, and one result for every channel, dtype and phase."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from bdh_conformance.yardstick.agreement import Comparison
from bdh_spec.rope import Phase

Status: TypeAlias = Literal["passed", "failed", "error", "known failure", "not claimed"]
BAD: tuple[Status, ...] = ("failed", "error")


@dataclass(frozen=True)
class Outcome:
    """One channel on one case. ``stage`` is the first that differs, or else the one nearest to its limit."""

    channel: str
    dtype: str
    phase: Phase
    case: str
    stage: str
    status: Status
    error: float
    allowed: float
    message: str = ""
    compared: tuple[Comparison, ...] = field(default=(), repr=False)

    @property
    def ratio(self) -> float:
        return Comparison(self.stage, self.error, self.allowed).ratio


@dataclass
class Result:
    """All outcomes of one channel in one dtype and phase."""

    channel: str
    level: str
    dtype: str
    phase: Phase
    status: Status = "not claimed"
    reason: str = ""  # why it is not claimed, or why its failure is known
    cases: int = 0
    seconds: float = 0.0
    worst: Outcome | None = None  # the nearest to its limit, or the failure, shrunk
    ratios: dict[str, float] = field(default_factory=dict)  # stage: the largest error over allowed
    positions: dict[int, float] = field(default_factory=dict)  # the same up to so many tokens, from half as many on
    same_as: str = ""  # the id of an earlier check whose diagnosis explains this failure as well

    @property
    def id(self) -> str:
        """The name by which known failures and baselines find it."""
        return f"{self.channel}/{self.dtype}" + ("/float32_phases" if self.phase == "float32" else "")

    def add(self, outcome: Outcome) -> None:
        """Count an outcome, and keep the worst: a failure counts as worse than any number."""
        self.cases += 1
        for compared in outcome.compared:
            self.ratios[compared.stage] = max(compared.ratio, self.ratios.get(compared.stage, 0.0))
            for end, ratio in compared.by_token:
                self.positions[end] = max(ratio, self.positions.get(end, 0.0))
        if outcome.status in BAD:
            self.status, self.worst = outcome.status, outcome
        elif self.status not in BAD:
            self.status = "passed"
            if self.worst is None or outcome.ratio > self.worst.ratio:
                self.worst = outcome

    def as_dict(self) -> dict[str, Any]:
        """For JSON, whose numbers are finite."""
        worst = self.worst
        return {
            "id": self.id,
            "channel": self.channel,
            "level": self.level,
            "dtype": self.dtype,
            "phase": self.phase,
            "status": self.status,
            "reason": self.reason,
            "same_as": self.same_as,
            "cases": self.cases,
            "seconds": round(self.seconds, 3),
            "ratios": {stage: finite(ratio) for stage, ratio in self.ratios.items()},
            "positions": {str(end): finite(ratio) for end, ratio in sorted(self.positions.items())},
            "worst": worst
            and {
                "stage": worst.stage,
                "case": worst.case,
                "error": finite(worst.error),
                "allowed": finite(worst.allowed),
                "ratio": finite(worst.ratio),
                "message": worst.message,
            },
        }


def finite(value: float) -> float | None:
    """A number, or nothing where none tells it: JSON knows no infinity."""
    return float(f"{value:.4g}") if abs(value) < float("inf") else None


def totals(results: Iterable[Result]) -> dict[str, int]:
    """How many results there are of each status."""
    counts = dict.fromkeys(("passed", "failed", "error", "known failure", "not claimed"), 0)
    for result in results:
        counts[result.status] += 1
    return counts
