"""A finished run as data, and what can be made of it: JSON, JUnit, a badge, and a page that people look at."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import sys
from collections.abc import Mapping
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import jinja2
import markupsafe
import numpy as np

import bdh_spec
from bdh_conformance import plots
from bdh_conformance.levels import levels
from bdh_conformance.outcomes import totals
from bdh_conformance.runner import Run
from bdh_spec import BDHError

SCHEMA = 1
WORSE = 3.0  # times nearer to the limit than the baseline was: worth a look although inside it
QUIET = 0.02  # of what is allowed: below, rounding comes and goes


class BaselineError(BDHError, ValueError):
    """A file that is taken for an earlier report, and is none."""


def read_baseline(path: Path) -> dict[str, Any]:
    """An earlier report, as ``--json`` wrote it."""
    try:
        before: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BaselineError(f"{path} is no report in JSON ({error}): give a file that --json wrote") from None
    if not isinstance(before, dict) or before.get("schema") != SCHEMA or not isinstance(before.get("checks"), list):
        raise BaselineError(f"{path} is no report of this suite: give a file that --json wrote")
    return before


def moved(change: Mapping[str, Any]) -> str:
    """A change since the baseline, in words."""
    nearer = f"{change['times']:.1f} times nearer to its limit, {change['now']:.2g} of it" if change["times"] else change["now"]
    return f"since the baseline: {change['id']} {change['stage']} {nearer}".replace("  ", " ")


def document(run: Run, tier: str, complaints: list[str], seconds: float, *, whole: bool) -> dict[str, Any]:
    """Everything about a run, for JSON and for the page. ``whole`` says that a tier ran, so its coverage is demanded."""
    counts = totals(run.results)
    complete = whole and counts["passed"] == counted(counts) > 0  # a check stops at its first failure
    missing = [item for item, count in run.coverage.items() if not count] if complete else []
    found = [f"the tier met no case with {item}" for item in missing] + complaints
    if not counted(counts):
        found.append("nothing was checked")
    return {
        "schema": SCHEMA,
        "port": run.backend.name,
        "name": run.name or run.backend.name,
        "passed": not (counts["failed"] or counts["error"] or found),
        "complaints": found,
        "tier": tier,
        "device": run.device or run.backend.devices()[0],
        "seed": run.seed,
        "seconds": round(seconds, 1),
        "totals": counts,
        "levels": levels(run.results),
        "coverage": dict(run.coverage),
        "versions": versions(run),
        "hardware": hardware(),
        "checks": [result.as_dict() for result in run.results],
    }


def counted(counts: Mapping[str, int]) -> int:
    """How many checks were made."""
    return sum(counts.values()) - counts["not claimed"]


def versions(run: Run) -> dict[str, str]:
    """What the figures depend on."""
    return {
        "suite": bdh_spec.__version__,
        "specification": bdh_spec.SPEC_VERSION,
        "port": run.backend.version(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "hypothesis": version("hypothesis"),
    }


def hardware() -> str:
    """The machine, in a line."""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores{processor()}"


def processor() -> str:
    """The processor's name where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123  it is no file
            return next((f", {line.split(':')[1].strip()}" for line in lines if line.startswith("model name")), "")
    except OSError:
        return f", {platform.processor()}" if platform.processor() else ""


def compare_with(now: dict[str, Any], before: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Where a check is several times nearer to its limit than in an earlier report, or has changed its status."""
    earlier = {check["id"]: check for check in before["checks"]}
    changes = []
    for check in now["checks"]:
        old = earlier.get(check["id"])
        if old is None:
            continue
        if old["status"] != check["status"]:
            changes.append({"id": check["id"], "stage": "", "before": old["status"], "now": check["status"], "times": None})
        for stage, ratio in check["ratios"].items():
            was = old["ratios"].get(stage)
            if was is not None and ratio is not None and ratio >= WORSE * max(was, QUIET):
                changes.append(
                    {"id": check["id"], "stage": stage, "before": was, "now": ratio, "times": ratio / max(was, 1e-9)}
                )
    return changes


def junit(report: Mapping[str, Any]) -> str:
    """The checks as JUnit test cases: a level is a class."""
    counts = report["totals"]
    suite = ElementTree.Element(
        "testsuite",
        name=f"bdh-conform {report['port']}",
        tests=str(len(report["checks"]) + len(report["complaints"])),
        failures=str(counts["failed"] + len(report["complaints"])),
        errors=str(counts["error"]),
        skipped=str(counts["not claimed"] + counts["known failure"]),
        time=str(report["seconds"]),
    )
    for check in report["checks"]:
        case = ElementTree.SubElement(suite, "testcase", classname=check["level"], name=check["id"], time=str(check["seconds"]))
        if check["status"] in ("failed", "error"):
            tag = "failure" if check["status"] == "failed" else "error"
            message = check["worst"]["message"]
            ElementTree.SubElement(case, tag, message=message.splitlines()[0]).text = message
        elif check["status"] != "passed":
            ElementTree.SubElement(case, "skipped", message=f"{check['status']}: {check['reason']}")
    for complaint in report["complaints"]:
        case = ElementTree.SubElement(suite, "testcase", classname="the run", name=complaint)
        ElementTree.SubElement(case, "failure", message=complaint)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True)


class Since(NamedTuple):
    """An earlier report, and what is worth a word since then."""

    name: str
    before: Mapping[str, Any]
    changes: list[dict[str, Any]]


def page(report: Mapping[str, Any], since: Since | None = None) -> str:
    """One self-contained HTML page."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(heat=heat, short=short, breakable=breakable)
    template = environment.from_string(files("bdh_conformance").joinpath("report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        since=since,
        moved=plots.moved(report, since.before) if since else [],
        command=" ".join(["bdh-conform", *sys.argv[1:]]),
        by_position=plots.by_position(report),
        by_channel=plots.by_channel(report, since.before if since else None),
        stages=stage_map(report),
        dtypes=dtype_map(report),
        unclaimed=unclaimed(report),
        cases=sum(check["cases"] for check in report["checks"]),
        worst=worst(report),
        bad=[check for check in report["checks"] if check["status"] in ("failed", "error")],
        known=[check for check in report["checks"] if check["status"] == "known failure"],
    )


def stage_map(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each dtype a table of the traces' error over allowed: stages in rows, layers in columns."""
    tables = []
    for check in report["checks"]:
        if check["channel"] != "traces" or not check["ratios"]:
            continue
        by_layer = {tuple(stage.split(".")[1:]): r for stage, r in check["ratios"].items() if stage.startswith("layers.")}
        layers = sorted({int(layer) for layer, _ in by_layer})
        names = list(dict.fromkeys(name for _, name in by_layer))
        rows = [(name, [by_layer.get((str(layer), name)) for layer in layers]) for name in names]
        ends = [(end, check["ratios"][end]) for end in ("embed", "logits", "names") if end in check["ratios"]]
        tables.append({"dtype": check["dtype"], "layers": layers, "rows": rows, "ends": ends})
    return tables


def dtype_map(report: Mapping[str, Any]) -> dict[str, Any]:
    """Channels in rows, dtypes in columns: each check's worst error over allowed, or its status. Only what was claimed."""
    checks = [check for check in report["checks"] if check["status"] != "not claimed"]
    columns = list(dict.fromkeys((check["dtype"], check["phase"]) for check in checks))
    found = {(check["channel"], check["dtype"], check["phase"]): check for check in report["checks"]}
    channels = list(dict.fromkeys(check["channel"] for check in checks))
    return {"columns": columns, "rows": [(c, [found.get((c, *column)) for column in columns]) for c in channels]}


def unclaimed(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """The checks that were not made, by the reason."""
    reasons: dict[str, list[str]] = {}
    for check in report["checks"]:
        if check["status"] == "not claimed":
            reasons.setdefault(check["reason"], []).append(check["channel"])
    return reasons


def worst(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """The check that is nearest to its limit, or over it."""
    told = [check for check in report["checks"] if check["worst"]]
    return max(told, key=lambda check: math.inf if check["worst"]["ratio"] is None else check["worst"]["ratio"], default=None)


def heat(ratio: float | None) -> str:
    """The class of a cell: how near to the limit, in five steps."""
    if ratio is None:
        return "over"
    return next(
        (name for limit, name in ((0.02, "h0"), (0.15, "h1"), (0.3, "h2"), (0.6, "h3"), (1.0, "h4")) if ratio <= limit), "over"
    )


def short(ratio: float | None) -> str:
    """A ratio in few characters."""
    if ratio is None:
        return "wrong"
    if ratio >= 100:
        return f"{ratio:.0e}"
    return f"{ratio:.2f}" if ratio >= 0.005 else "0" if ratio == 0 else "<.01"


def breakable(name: str) -> markupsafe.Markup:
    """A name that a narrow page may break after its dots and strokes."""
    return markupsafe.Markup(re.sub(r"(?<=[./])", "<wbr>", str(markupsafe.escape(name))))
