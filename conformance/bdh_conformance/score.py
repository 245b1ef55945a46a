"""How good the suite is: mistakes caught, diagnosed and missed, and honest or legal ports accused.

python -m bdh_conformance.score, or make conformance-score
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import TypeVar

import click
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bdh_conformance.adversaries.diagnosis import explain, repeated, short
from bdh_conformance.adversaries.hostile import HOSTILE
from bdh_conformance.adversaries.legal import LEGAL
from bdh_conformance.adversaries.mistakes import MISTAKES, Mistake
from bdh_conformance.channels import CHANNELS
from bdh_conformance.outcomes import BAD
from bdh_conformance.plan import TIERS, Check, plan
from bdh_conformance.runner import Run
from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.sizes import LONG
from bdh_spec import Backend, get_backend
from bdh_spec.dtypes import DTYPES

# The standard tier but for the values drawn for the pool's shapes: its structured cases and its classes of sizes.
QUICK = replace(TIERS["standard"], examples=0, narrow_examples=0)
T = TypeVar("T")


@dataclass(frozen=True)
class Score:
    """What became of one planted bug."""

    name: str
    channels: tuple[str, ...]  # that caught it, of those that have to
    missed: tuple[str, ...]  # that have to and did not
    named: bool | None  # among the first three of its diagnosis; None: not asked


@np.errstate(all="ignore")  # what a planted bug divides by is its own affair
def score(mistake: Mistake) -> Score:
    """Run a mistake as a port on the channels that must see it."""
    caught = {name: failing for name in mistake.channels if (failing := first_failure(mistake.backend(), name)) is not None}
    missed = tuple(name for name in mistake.channels if name not in caught)
    named = any(names(mistake, check, case) for check, case in caught.values()) if caught else None
    return Score(mistake.name, tuple(caught), missed, named)


def first_failure(backend: Backend, channel: str, dtypes: Sequence[str] = DTYPES) -> tuple[Check, Case] | None:
    """The first case of the plan on which a port fails a channel."""
    # In this order: what rounding hides in float32, float64 shows.
    for dtype in (dtype for dtype in dtypes if dtype in backend.capabilities.dtypes):
        run = Run(backend, explains=False)
        for check in plan(QUICK, backend.capabilities, dtypes=(dtype,), channels=(channel,)):
            result = run.run(check)
            if result.status in BAD and result.worst:
                return check, Case.parse(result.worst.case)
    return None


def names(mistake: Mistake, check: Check, case: Case) -> bool:
    """Whether the diagnosis of a failure gives the mistake among its first three."""
    run = Run(mistake.backend())
    try:
        runs = repeated(lambda: check.channel.observe(run.load(own := replace(case), check.dtype, check.phase), own))
    except Exception:  # noqa: BLE001  a bug that raises gives no answer to diagnose
        return False
    only_long = case.time > LONG and run.compared(check, short(case)).status not in BAD
    found = explain(check.channel, runs, case, check.dtype, check.phase, right_when_short=only_long)
    return mistake.name in [known.name for group in found[:3] for known in group]


def accused_in_standard(backend: Backend) -> list[str]:
    """The checks of the standard tier that an honest port fails."""
    run = Run(backend)
    return [result.id for result in map(run.run, plan(TIERS["standard"], backend.capabilities)) if result.status in BAD]


def scored(name: str) -> Score:
    """The score of a mistake by its name."""
    return score(MISTAKES[name])


def hostile_caught(name: str) -> bool:
    """Whether every channel that must refuse a hostile port does."""
    return all(first_failure(HOSTILE[name].backend(), channel) for channel in HOSTILE[name].channels)


def legal_accused(channel: str) -> list[str]:
    """The legal variants that fail a channel: one after another, because what is expected of them is the same.

    In float32 alone, whose tolerances are the closest to what rounding does: all dtypes would take twice the time.
    """
    return [name for name, legal in LEGAL.items() if first_failure(legal.backend(), channel, DTYPES[:1])]


def port_accused(name: str) -> list[str]:
    """The checks of the standard tier that a registered port fails."""
    return accused_in_standard(get_backend(name))


def quiet() -> None:
    """What planted bugs divide by, and cast to, is their own affair."""
    np.seterr(all="ignore")
    warnings.simplefilter("ignore")


def each(pool: ProcessPoolExecutor, judge: Callable[[str], T], names: Iterable[str], what: str, say: Console) -> dict[str, T]:
    """A judgement of everything named, with a bar, or where nobody watches with a line at each tenth."""
    asked = list(names)
    with Progress(console=say, transient=True, disable=not say.is_terminal) as progress:
        judged = []
        for judgement in progress.track(pool.map(judge, asked), total=len(asked), description=what):
            judged.append(judgement)
            if not say.is_terminal and 10 * len(judged) // len(asked) > 10 * (len(judged) - 1) // len(asked):
                say.print(f"{what}: {len(judged)} of {len(asked)}")
    return dict(zip(asked, judged, strict=True))


@click.command()
@click.option("--ports", default="", help="Honest ports to run the standard tier on as well, by commas.")
@click.option("--jobs", default=os.cpu_count() or 1, show_default="one a core", help="Processes to work in.")
def main(ports: str, jobs: int) -> None:
    """Print the score; exit 1 unless every mistake is caught by all its channels and named, and nobody is accused."""
    say = Console(stderr=True)
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=quiet) as pool:
        scores = each(pool, scored, MISTAKES, "mistakes", say)
        hostile = each(pool, hostile_caught, HOSTILE, "hostile ports", say)
        by_channel = each(pool, legal_accused, CHANNELS, "legal variants by channel", say)
        honest = {name: [channel for channel, found in by_channel.items() if name in found] for name in LEGAL}
        honest |= each(pool, port_accused, filter(None, ports.split(",")), "honest ports", say)
    free = [name for name, s in scores.items() if not s.channels]
    partly = [f"{name} by {', '.join(s.missed)}" for name, s in scores.items() if s.channels and s.missed]
    unnamed = [name for name, s in scores.items() if s.channels and not s.named]
    escaped = [name for name, caught in hostile.items() if not caught]
    wronged = [f"{name} at {', '.join(found)}" for name, found in honest.items() if found]
    table = Table("what", "of", "count", "exceptions")
    rows = (
        ("mistakes caught", len(scores), free),
        ("mistakes caught by every channel named", len(scores), free + partly),
        ("mistakes diagnosed among the first three", len(scores), free + unnamed),
        ("hostile ports caught", len(hostile), escaped),
        ("honest ports and legal variants left alone", len(honest), wronged),
    )
    for what, of, exceptions in rows:
        table.add_row(what, str(of), str(of - len(exceptions)), "; ".join(exceptions))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    sys.exit(bool(free or partly or unnamed or escaped or wronged))


if __name__ == "__main__":
    main()
