"""Examples of docstrings as code: without a fence Markdown would take their ">>>" for a quotation of a quotation."""

from __future__ import annotations

import doctest
from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Put a fence round the examples of every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring and ">>>" in obj.docstring.value and "```" not in obj.docstring.value:
            obj.docstring.value = fenced(obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        self.on_object(obj=pkg)


def fenced(text: str) -> str:
    """A docstring whose examples stand in fences."""
    out = []
    for part in doctest.DocTestParser().parse(text):
        if isinstance(part, str):
            out.append(part)
        else:
            lines = part.source.rstrip("\n").split("\n")
            shown = [f">>> {lines[0]}", *(f"... {line}" for line in lines[1:])]
            out.append("\n".join(["```pycon", *shown, part.want + "```\n"]))
    return "".join(out).replace("```\n```pycon\n", "")
