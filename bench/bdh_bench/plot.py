"""Throughput and memory of the forward rows over T: ours, plain, and what the machine allows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bdh_bench import counts
from bdh_bench.results import RowResult, SideResult
from bdh_spec import BDHConfig

STYLE = {"ours": ("C0", "o"), "plain": ("C3", "s"), "compiled": ("C1", "^")}
INCHES = (5.0, 6.0)  # of one port in one dtype


def drawn(results: Sequence[RowResult]) -> list[RowResult]:
    """The rows that a plot shows."""
    return [r for r in results if r.row.kind == "forward" and any(side.median for side in r.sides)]


def plot(path: Path, results: Sequence[RowResult], config: BDHConfig) -> None:
    """Draw the forward rows; of extrapolated points the marks are hollow."""
    rows = drawn(results)
    kinds = list(dict.fromkeys((r.port, r.dtype) for r in rows))
    figure = Figure(figsize=(INCHES[0] * len(kinds), INCHES[1]), layout="constrained")
    axes = figure.subplots(2, len(kinds), squeeze=False, sharex=True)
    lengths = sorted({r.row.length for r in rows})  # of all columns, which share an axis
    for column, (port, dtype) in enumerate(kinds):
        found = [r for r in rows if (r.port, r.dtype) == (port, dtype)]
        throughput(axes[0, column], found, config)
        memory(axes[1, column], found)
        axes[0, column].set_title(f"{port} {dtype} on {found[0].device}")
        axes[1, column].set_xticks(lengths, labels=[f"{T:,}" for T in lengths])
        axes[1, column].set_xticks([], minor=True)
    figure.savefig(path)


def throughput(axes: Any, rows: list[RowResult], config: BDHConfig) -> None:
    """Tokens per second, with the limit of the matrix peak."""
    lines(axes, rows, lambda row, side: row.tokens_per_second(side))
    limits = [(r.row.length, r.row.tokens * r.limits.flops / counts.needed_flop(r.row, config)) for r in rows if r.limits]
    axes.plot(*zip(*limits, strict=True), "k--", label="limit: matrix peak")
    finish(axes, "tokens per second")


def memory(axes: Any, rows: list[RowResult]) -> None:
    """Megabytes above the weights, with what the device has."""
    lines(axes, rows, lambda row, side: side.memory and side.memory / 2**20)
    if rows[0].limits:
        axes.axhline(rows[0].limits.available / 2**20, color="k", linestyle="--", label="limit: free memory")
    finish(axes, "MB above the weights")
    axes.set_xlabel("T, tokens of the text")


def lines(axes: Any, rows: list[RowResult], value: Any) -> None:
    """One line per side."""
    for name, (colour, mark) in STYLE.items():
        points = [(r.row.length, value(r, side), side) for r in rows for side in r.sides if side.side == name]
        points = [point for point in points if point[1]]
        if not points:
            continue
        axes.plot([T for T, _, _ in points], [y for _, y, _ in points], color=colour, label=name)
        for T, y, side in points:
            axes.plot([T], [y], marker=mark, color=colour, fillstyle=fill(side))


def fill(side: SideResult) -> str:
    return "none" if side.extrapolated_from else "full"


def finish(axes: Any, label: str) -> None:
    axes.set(xscale="log", yscale="log", ylabel=label)
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend()
