"""Every bdh-look line of README and docs has flags that exist, and the page of claims has a place for its figures."""

import re
import shlex
from pathlib import Path

import click
import pytest

from bdh_look.cli import PAGE, command

ROOT = Path(__file__).parents[2]
LINES = [
    pytest.param(line, id=f"{page.stem}-{i}")
    for page in (ROOT / "README.md", ROOT / "docs" / "look.md")
    for i, line in enumerate(re.findall(r"(?m)^\$ (bdh-look [^\n<#]*)", page.read_text(encoding="utf-8")))
]


@pytest.mark.parametrize("line", LINES)
def test_a_command_line_is_one_that_the_command_takes(line: str) -> None:
    first, *rest = shlex.split(line)[1:]
    name, words = (first, rest) if first in command.commands else (PAGE, [first, *rest])
    chosen = command.commands[name]
    with click.Context(chosen) as context:
        chosen.parse_args(context, words)


def test_there_are_lines_of_every_command() -> None:
    said = " ".join(str(line.values[0]) for line in LINES)
    assert all(name in said for name in ("neurons", "graph", "state", "page.html"))


def test_the_figures_have_their_place() -> None:
    text = (ROOT / "docs" / "look.md").read_text(encoding="utf-8")
    script = (ROOT / "examples" / "look_claims.py").read_text(encoding="utf-8")
    begin, end = re.findall(r'(?:BEGIN, END = |, )"(<!-- .*? -->)\\n"', script)
    assert text.index(begin) < text.index(end)
    assert "| weights | `x_sparse` |" in text
