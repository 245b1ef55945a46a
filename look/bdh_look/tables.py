"""What the commands print: plain tables for people, of the same numbers that --json writes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bdh_spec.files import shown


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on stdout; where that is no terminal, wide enough for every cell."""
    table = Table(*columns)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, str) else number(cell) for cell in row))
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 140)
    console.print(f"\n{title}", style="bold", soft_wrap=True)
    console.print(table)


def number(value: Any) -> str:
    """A number in as many digits as one reads."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def quoted(text: bytes) -> str:
    """Bytes in one line, control characters spelt out."""
    return shown(text.decode(errors="backslashreplace"))
