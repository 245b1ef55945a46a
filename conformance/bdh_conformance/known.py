"""Known failures of a port: kept in its own folder, each with a reason and a link, and strict: one that passes is an error."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bdh_conformance.outcomes import BAD, Result


class KnownError(ValueError):
    """A file of known failures that cannot be read as such."""


@dataclass(frozen=True)
class Known:
    """One check that is expected to fail."""

    id: str
    reason: str
    link: str


def read(path: Path) -> list[Known]:
    """The file's entries: ``[[known]]`` with id, reason and link."""
    try:
        entries = tomllib.loads(path.read_text()).get("known", [])
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise KnownError(f"{path} cannot be read: {error}") from None
    for entry in entries:
        if set(entry) != {"id", "reason", "link"} or not all(isinstance(v, str) and v for v in entry.values()):
            raise KnownError(f"{path} has the entry {entry}: give it an id, a reason and a link, and nothing else")
    return [Known(**entry) for entry in entries]


def excuse(results: Iterable[Result], known: Iterable[Known]) -> list[str]:
    """Mark the failures that are known; what is wrong with the others: passing by now, or of no such check."""
    by_id = {result.id: result for result in results}
    complaints = []
    for entry in known:
        result = by_id.get(entry.id)
        if result is None:
            complaints.append(f"{entry.id} is known to fail and was not run: correct its id or remove it")
        elif result.status not in BAD:
            complaints.append(f"{entry.id} is known to fail and is {result.status}: remove it from the known failures")
        else:
            result.status, result.reason = "known failure", f"{entry.reason} ({entry.link})"
    return complaints
