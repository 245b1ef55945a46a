"""The pages of this repository, block by block."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
NOT_RUN = "*Not run by the tests: "  # how the paragraph before a block begins that excuses it, for readers to see
# Where the options of each command stand; a group holds those of its commands.
COMMANDS = {
    "bdh-convert": ("bdh_convert.command:command",),
    "bdh-generate": ("bdh_generate.cli:command",),
    "bdh-train": ("bdh_train.cli:command",),
    "bdh-look": ("bdh_look.cli:command",),
    "bdh-bench": ("bdh_bench.cli:command",),
    "bdh-conform": ("bdh_conformance.cli:command", "bdh_conformance.files.cli:vectors"),
}


@dataclass(frozen=True)
class Block:
    """A piece of a page that is set apart as code."""

    page: str
    line: int
    language: str  # "indented" where there is no fence, empty where the fence names none
    code: str
    why_not: str = ""  # the reason why it is not run, from the paragraph before it

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[str]:
        """The lines of a console that somebody typed; the others are answers."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]

    def answer(self) -> str:
        """What the page shows as printed."""
        return "".join(f"{line}\n" for line in self.code.splitlines() if not line.startswith("$ "))


def pages() -> list[str]:
    """Every page of the repository."""
    hidden = ("node_modules", "site", "demo-output", "build", "dist")
    found = (path.relative_to(ROOT) for path in ROOT.rglob("*.md"))
    return sorted(path.as_posix() for path in found if not any(part in hidden or part[0] == "." for part in path.parts))


def tokens(page: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse((ROOT / page).read_text(encoding="utf-8"))


def blocks(page: str) -> Iterator[Block]:
    """All that a page sets apart as code, fenced or indented, wherever it stands."""
    before = ""
    for token in tokens(page):
        if token.type in ("fence", "code_block"):
            why = before.removeprefix(NOT_RUN).rstrip(".*") if before.startswith(NOT_RUN) else ""
            line = token.map[0] + 1 if token.map else 0
            yield Block(page, line, token.info.strip() if token.type == "fence" else "indented", token.content, why)
        if token.type != "paragraph_close":
            before = " ".join(token.content.split()) if token.type == "inline" else ""


def inline(page: str) -> list[str]:
    """What a page sets as code within a line."""
    found = [child for token in tokens(page) for child in token.children or ()]
    return [" ".join(child.content.split()) for child in found if child.type == "code_inline"]


def html(page: str) -> list[str]:
    """What a page says in HTML."""
    return [token.content for token in tokens(page) if token.type == "html_block"]


def unknown_options(line: str) -> list[str]:
    """The words of a command of ours that look like options and are none."""
    name, *words = shlex.split(line, comments=True)
    until = next((i for i, word in enumerate(words) if word in ("|", "&&", ";", ">", "<")), len(words))
    known = set().union(*(options(load(place)) for place in COMMANDS[name]))
    return [word for word in words[:until] if word.startswith("-") and word != "-" and word.partition("=")[0] not in known]


def load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def options(command: click.Command) -> set[str]:
    """The options of a command and of the commands below it."""
    own = {word for param in command.params for word in (*param.opts, *param.secondary_opts) if word.startswith("-")}
    below = command.commands.values() if isinstance(command, click.Group) else ()
    return own.union({"-h", "--help"}, *(options(each) for each in below))
