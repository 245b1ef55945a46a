"""From where to where: how a conversion is named on a command line, quoted or not."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import click

from bdh_convert.dialects import DIALECTS, TARGETS

ARROW = re.compile(r"(?P<source>\w*)(?:->|→|-to-)(?P<target>\w+)")


@dataclass(frozen=True)
class Route:
    """A conversion as the user named it."""

    source: str | None  # None: detect it
    target: str
    file: Path


def parse(words: tuple[str, ...], source: str | None, target: str | None, stray: Path | None) -> Route:
    """Read ``torch->mlx FILE``, ``torch-to-mlx FILE``, ``mlx FILE``, or ``FILE`` with --from and --to.

    ``stray`` is the file that a shell made out of an unquoted ``->``.
    """
    if not 1 <= len(words) <= 2:
        raise click.UsageError("name a route and a file, such as: bdh-convert 'torch->mlx' checkpoint.safetensors")
    if len(words) == 2:
        named_source, named_target = _arrow(words[0], stray)
        source, target = _once("--from", source, named_source), _once("--to", target, named_target)
    if target is None:
        raise click.UsageError(f"name the dialect to convert to: {', '.join(TARGETS)}")
    return Route(known(source), _writable(target), Path(words[-1]))


def _arrow(word: str, stray: Path | None) -> tuple[str | None, str | None]:
    if match := ARROW.fullmatch(word):
        return match["source"] or None, match["target"]
    if not word.endswith("-"):
        return None, word
    if stray is None:
        raise click.UsageError(
            f"{word!r} names no target, since a shell reads '>' as a redirection: quote the route, 'torch->mlx'"
        )
    return word.removesuffix("-") or None, stray.name


def _once(option: str, given: str | None, named: str | None) -> str | None:
    if given and named and given != named:
        raise click.UsageError(f"the route says {named} and {option} says {given}: say it once")
    return given or named


def known(name: str | None) -> str | None:
    """A dialect that there is, or None where none is named."""
    if name is not None and name not in DIALECTS:
        raise click.UsageError(f"no dialect is named {name!r}: there are {', '.join(DIALECTS)}")
    return name


def _writable(name: str) -> str:
    if known(name) not in TARGETS:
        raise click.UsageError(f"{name} is read and not written: convert to {', '.join(TARGETS)}")
    return name


def stray_output() -> Path | None:
    """The file with a dialect's name that the shell has just opened as our standard output, if it has."""
    try:
        out = os.fstat(1)
    except OSError:
        return None
    if not stat.S_ISREG(out.st_mode):
        return None
    return next((path for path in map(Path, DIALECTS) if path.exists() and os.path.samestat(path.stat(), out)), None)


def remove_stray(path: Path) -> str:
    """Remove the file again if it is still empty, and say what became of it."""
    now = path.lstat()
    if not stat.S_ISREG(now.st_mode) or now.st_size:
        return f"the file {path} that it opened is not empty, so it stays"
    born = getattr(now, "st_birthtime", now.st_mtime)  # macOS tells when a file was made; elsewhere an emptied one looks new
    if born < now.st_mtime - 1:
        return f"the file {path} was there before and the shell emptied it, which nobody can undo"
    path.unlink()
    return f"the empty file {path} that it made is removed"
