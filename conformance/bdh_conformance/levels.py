"""What a port has earned: levels, and the badge that shows them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

from bdh_conformance.outcomes import Result
from bdh_spec.dtypes import DTYPES

Standing: TypeAlias = Literal["earned", "failed", "not claimed", "not checked"]

LEVELS = (
    "forward",
    "traces",
    "decode",
    "long positions",
    "gradients",
    "training",
    "sampling",
    "padding",
    "frequencies",
    "int8",
    "threads",
    "refusals",
    *DTYPES[1:],  # beside the first
)


def levels(results: Iterable[Result]) -> dict[str, Standing]:
    """The standing of every level. One failure is enough to lose it, known or not."""
    found = list(results)
    return {level: standing([r for r in found if r.level == level]) for level in LEVELS}


def standing(results: list[Result]) -> Standing:
    """What the checks of one level make of it."""
    statuses = {result.status for result in results}
    if statuses & {"failed", "error", "known failure"}:
        return "failed"
    if "passed" in statuses:
        return "earned"
    return "not claimed" if results else "not checked"


def badge(port: str, standings: dict[str, Standing], passed: bool) -> dict[str, Any]:
    """What a shields.io endpoint shows."""
    earned = [level for level, it in standings.items() if it == "earned"]
    message = ", ".join(earned) if earned else "no level earned"
    colour = "red" if not passed or not earned else "brightgreen" if "failed" not in standings.values() else "yellow"
    return {"schemaVersion": 1, "label": f"BDH {port}", "message": message, "color": colour}


def markdown(port: str, standings: dict[str, Standing], about: str) -> str:
    """The levels as a table for a README."""
    signs = {"earned": "yes", "failed": "**no**", "not claimed": "not claimed", "not checked": "not checked"}
    rows = [f"| {level} | {signs[it]} |" for level, it in standings.items()]
    return "\n".join([f"| level | {port} |", "| --- | --- |", *rows, "", about, ""])
