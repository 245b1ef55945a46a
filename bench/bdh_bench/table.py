"""Rows for people: a table on stdout, and one in Markdown for a page."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from bdh_bench.results import RowResult, SideResult
from bdh_bench.sides import OURS, PLAIN
from bdh_spec import BDHConfig
from bdh_spec.params import count

NOTHING = "-"


def heading(machine: dict[str, str], config: BDHConfig, results: Sequence[RowResult]) -> list[str]:
    """The machine, the model, and the limits that shares are counted from."""
    lines = [", ".join(f"{name} {value}" for name, value in machine.items())]
    lines.append(
        f"L {config.n_layer}, D {config.n_embd}, nh {config.n_head}, N {config.n_neurons}, V {config.vocab_size},"
        f" {count(config):,} parameters, dropout {config.dropout:g}"
    )
    seen = {(r.port, r.dtype): r.limits for r in results if r.limits}
    for (port, dtype), limits in seen.items():
        facts = ", ".join(f"{name} {value}" for name, value in limits.facts.items())
        lines.append(f"{port} {dtype}: {limits.flops / 1e9:.4g} GFLOP/s, copies {limits.copy / 1e9:.3g} GB/s; {facts}")
    return lines


def table(results: Sequence[RowResult]) -> Table:
    """One line per side."""
    columns = (
        "row",
        "port",
        "dtype",
        "side",
        "ms",
        "x ours",
        "tokens/s",
        "MB above weights",
        "of peak",
        "of copy",
        "error",
        "note",
    )
    found = Table(*columns)
    for result in results:
        about = (result.row.name, result.port, result.dtype)
        for side in result.sides:
            found.add_row(*about, *line(result, side))
            about = ("", "", "")
        if result.note:
            found.add_row(*about, *[""] * 8, result.note)
        found.add_section()
    return found


def line(result: RowResult, side: SideResult) -> list[str]:
    """The cells of one side."""
    ratio, rate = result.ratios().get(side.side), result.tokens_per_second(side)
    notes = [f"from {side.extrapolated_from} by FLOP"] if side.extrapolated_from else []
    return [
        side.side,
        f"{1000 * side.median:.4g}" if side.median else NOTHING,
        f"{ratio.of_medians:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" if ratio else "",
        f"{rate:.4g}" if rate else NOTHING,
        NOTHING if side.memory is None else f"{side.memory / 2**20:.0f}",
        share(result.of_peak(side)),
        share(result.of_copy(side)),
        NOTHING if side.error is None else f"{side.error:.1e}",
        "; ".join([*notes, *side.notes]),
    ]


def share(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.0f}%"


def markdown(results: Sequence[RowResult]) -> list[str]:
    """One line per row that gave a figure: ours, and how many times as long each other side takes; memory of ours, of plain."""
    found = [result for result in results if result.ours and result.ours.median]
    others = list(dict.fromkeys(side.side for result in found for side in result.sides if side.side != OURS))
    titles = ["row", "port", "dtype", "ours", *others, "of peak", "of copy", "MB above weights", "error"]
    lines = [titles, ["---"] * len(titles), *(_cells(result, others) for result in found)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _cells(result: RowResult, others: Sequence[str]) -> list[str]:
    sides = {side.side: side for side in result.sides}
    ours = sides[OURS]
    memory = [sides[name].memory for name in (OURS, PLAIN) if name in sides]
    return [
        *(result.row.name, result.port, result.dtype, duration(ours.median)),
        *(_other(result, sides.get(name)) for name in others),
        *(share(result.of_peak(ours)), share(result.of_copy(ours))),
        ", ".join(NOTHING if size is None else f"{size / 2**20:,.0f}" for size in memory),
        NOTHING if ours.error is None else f"{ours.error:.1e}",
    ]


def _other(result: RowResult, side: SideResult | None) -> str:
    if side is None or not side.median:
        return NOTHING
    how = ", by FLOP" if side.extrapolated_from else ""
    return f"{duration(side.median)} ({result.ratios()[side.side].of_medians:.2f}{how})"


def duration(seconds: float | None) -> str:
    """
    >>> duration(2.0449), duration(0.01234)
    ('2.04 s', '12.3 ms')
    """
    if seconds is None:
        return NOTHING
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
