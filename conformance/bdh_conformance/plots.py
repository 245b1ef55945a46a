"""What the page draws: places on its plots, in percent of their width and in pixels of their height."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bdh_spec.dtypes import DTYPES

LEAST, MOST = 1e-3, 10.0  # of error over allowed, between which a plot by position shows it
HEIGHT = 180  # pixels
ROOM = 1.25  # of error over allowed on a plot by channel; what is beyond stands at the edge
MOVED = 1.5  # times nearer to the limit, or farther: less comes and goes with rounding
QUIET = 0.02  # of what is allowed: below, rounding comes and goes


def by_position(report: Mapping[str, Any]) -> dict[str, Any]:
    """A line for each dtype: the worst error over allowed of all channels, up to each power of two of tokens."""
    worst: dict[str, dict[int, float | None]] = {}
    for check in report["checks"]:
        line = worst.setdefault(check["dtype"], {})
        for end, ratio in check["positions"].items():
            line[int(end)] = larger(line.get(int(end), 0.0), ratio)
    ends = sorted({end for line in worst.values() for end in line})
    x = {end: 100 * (i + 0.5) / len(ends) for i, end in enumerate(ends)}
    lines = {
        dtype: [{"x": x[end], "y": height(ratio), "end": end, "ratio": ratio} for end, ratio in sorted(line.items())]
        for dtype, line in worst.items()
        if line
    }
    return {
        "height": HEIGHT,
        "lines": lines,
        "ends": [(end, x[end]) for end in ends],
        "levels": [(level, height(level)) for level in (0.01, 0.1, 1.0, 10.0)],
        "colours": colours(),
    }


def larger(a: float | None, b: float | None) -> float | None:
    """The larger of two ratios; None is one that no number tells."""
    return None if a is None or b is None else max(a, b)


def height(ratio: float | None) -> float:
    """Where a ratio stands above the floor of a plot by position, in pixels from its top."""
    shown = MOST if ratio is None else min(max(ratio, LEAST), MOST)
    return round(HEIGHT * (1 - math.log(shown / LEAST) / math.log(MOST / LEAST)), 1)


def by_channel(report: Mapping[str, Any], before: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """A row for each channel, in it a dot for each dtype: the worst error over allowed now, and in an earlier report."""
    earlier = {check["id"]: worst_ratio(check) for check in before["checks"] if check["worst"]} if before else {}
    rows: dict[str, list[dict[str, Any]]] = {}
    for check in report["checks"]:
        if not check["worst"]:
            continue
        now, was = worst_ratio(check), earlier.get(check["id"])
        rows.setdefault(check["channel"], []).append(
            {
                "id": check["id"],
                "dtype": check["dtype"],
                "x": share(now),
                "over": check["status"] in ("failed", "error"),
                "was": share(was) if check["id"] in earlier else None,
                "ratio": now,
            }
        )
    return [{"channel": channel, "dots": dots} for channel, dots in rows.items()]


def worst_ratio(check: Mapping[str, Any]) -> float | None:
    """The worst error over allowed of a check; None if no number tells it."""
    return check["worst"]["ratio"] if check["worst"] else None


def share(ratio: float | None) -> float:
    """Where a ratio stands on a plot by channel, in percent."""
    return round(100 * min(ROOM if ratio is None else ratio, ROOM) / ROOM, 2)


def moved(report: Mapping[str, Any], before: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every check whose worst error is nearer to its limit than it was, or farther, and those that came or went."""
    earlier = {check["id"]: check for check in before["checks"] if check["worst"]}
    now = {check["id"]: check for check in report["checks"] if check["worst"]}
    rows = [{"id": name, "before": "", "now": "new", "times": None, "nearer": None} for name in now if name not in earlier]
    rows += [{"id": name, "before": "", "now": "gone", "times": None, "nearer": None} for name in earlier if name not in now]
    for name in now:
        if name not in earlier:
            continue
        a, b = worst_ratio(earlier[name]), worst_ratio(now[name])
        if a is None or b is None:
            continue  # a change of standing, which the page tells above
        times = max(b, QUIET) / max(a, QUIET)
        if not 1 / MOVED < times < MOVED:
            rows.append({"id": name, "before": a, "now": b, "times": max(times, 1 / times), "nearer": times > 1})
    return sorted(rows, key=lambda row: -(row["times"] or math.inf))


def colours() -> dict[str, str]:
    """The class of each dtype's marks."""
    return {dtype: f"c{i}" for i, dtype in enumerate(DTYPES)}
