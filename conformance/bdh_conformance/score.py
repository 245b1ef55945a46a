"""How good the suite is: mistakes caught, diagnosed and missed, and honest or legal ports accused.

python -m bdh_conformance.score, or make conformance-score
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bdh_conformance.adversaries.diagnosis import explanations, repeated
from bdh_conformance.adversaries.hostile import HOSTILE
from bdh_conformance.adversaries.legal import LEGAL
from bdh_conformance.adversaries.mistakes import MISTAKES, Mistake
from bdh_conformance.channels import CHANNELS
from bdh_conformance.outcomes import BAD, Result
from bdh_conformance.plan import TIERS, Check, Tier, plan
from bdh_conformance.runner import Run
from bdh_conformance.yardstick.cases import Case
from bdh_spec import Backend, get_backend

FIXED_ONLY = Tier("standard", 0, 0, 0, 0, "the structured cases of the standard tier")
DTYPES = ("float32", "float64")  # in this order: what rounding hides in float32, float64 shows


@dataclass(frozen=True)
class Score:
    """What became of one planted bug."""

    name: str
    channels: tuple[str, ...]  # that caught it, of those that have to
    missed: tuple[str, ...]  # that have to and did not
    named: bool | None  # among the first three of its diagnosis; None: not asked


def score(mistake: Mistake) -> Score:
    """Run a mistake as a port on the channels that must see it."""
    caught = {name: failing for name in mistake.channels if (failing := first_failure(mistake.backend(), name)) is not None}
    missed = tuple(name for name in mistake.channels if name not in caught)
    named = any(names(mistake, check, case) for check, case in caught.values()) if caught else None
    return Score(mistake.name, tuple(caught), missed, named)


def first_failure(backend: Backend, channel: str) -> tuple[Check, Case] | None:
    """The first structured case on which a port fails a channel."""
    for dtype in DTYPES:
        run = Run(backend)
        for check in plan(FIXED_ONLY, backend.capabilities, dtypes=(dtype,), channels=(channel,)):
            examine = partial(run.examine, check, result=Result(channel, check.level, dtype, check.phase))
            failing = next((case for case in run.fitting(check) if examine(case).status in BAD), None)
            if isinstance(failing, Case):
                return check, failing
    return None


def names(mistake: Mistake, check: Check, case: Case) -> bool:
    """Whether the diagnosis of a failure gives the mistake among its first three."""
    run = Run(mistake.backend())
    observed, *others = repeated(lambda: check.channel.observe(run.load(own := replace(case), check.dtype, check.phase), own))
    expected = {} if check.channel.judge else check.channel.expected(case, check.dtype, check.phase)
    found = explanations(observed, check.channel.observe, case, check.dtype, check.phase, expected, others=others)
    return mistake.name in [known.name for group in found[:3] for known in group]


def accused(backend: Backend) -> list[str]:
    """The channels of the structured cases that a legal variant fails."""
    return [name for name in CHANNELS if first_failure(backend, name)]


def accused_in_standard(backend: Backend) -> list[str]:
    """The checks of the standard tier that an honest port fails."""
    run = Run(backend)
    return [result.id for result in map(run.run, plan(TIERS["standard"], backend.capabilities)) if result.status in BAD]


@click.command()
@click.option("--ports", default="numpy", show_default=True, help="Honest ports to run the standard tier on, by commas.")
def main(ports: str) -> None:
    """Print the score; exit 1 unless every mistake is caught and nobody is accused."""
    say = Console(stderr=True)
    with Progress(console=say, transient=True) as progress:
        scores = [score(mistake) for mistake in progress.track(list(MISTAKES.values()), description="mistakes")]
        hostile = {
            bad.name: all(first_failure(bad.backend(), name) for name in bad.channels)
            for bad in progress.track(list(HOSTILE.values()), description="hostile ports")
        }
        honest = {
            legal.name: accused(legal.backend()) for legal in progress.track(list(LEGAL.values()), description="legal variants")
        }
        honest |= {
            name: accused_in_standard(get_backend(name))
            for name in progress.track(ports.split(","), description="honest ports")
        }
    caught = [s for s in scores if s.channels]
    table = Table("what", "of", "count", "exceptions")
    table.add_row("mistakes caught", str(len(scores)), str(len(caught)), ", ".join(s.name for s in scores if not s.channels))
    partly = [f"{s.name} by {', '.join(s.missed)}" for s in caught if s.missed]
    table.add_row("mistakes caught by every channel named", str(len(scores)), str(len(caught) - len(partly)), "; ".join(partly))
    unnamed = [s.name for s in caught if not s.named]
    table.add_row("of those caught, diagnosed", str(len(caught)), str(len(caught) - len(unnamed)), ", ".join(unnamed))
    table.add_row(
        "hostile ports caught", str(len(hostile)), str(sum(hostile.values())), ", ".join(n for n, c in hostile.items() if not c)
    )
    wrong = [f"{name} at {', '.join(found)}" for name, found in honest.items() if found]
    table.add_row("honest ports and legal variants accused", str(len(honest)), str(len(wrong)), "; ".join(wrong))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    sys.exit(len(caught) < len(scores) or not all(hostile.values()) or bool(wrong))


if __name__ == "__main__":
    main()
