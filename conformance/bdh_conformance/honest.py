"""Honest ports and legal variants on cases drawn with several seeds: a suite that accuses one of them is wrong itself.

python -m bdh_conformance.honest --ports numpy,torch,jax,mlx --seeds 1,2,3 --minutes 5
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context

import click
from rich.console import Console

from bdh_conformance.adversaries.legal import LEGAL
from bdh_conformance.outcomes import BAD
from bdh_conformance.plan import TIERS, plan
from bdh_conformance.ports import find_port
from bdh_conformance.runner import Run, share
from bdh_conformance.score import quiet
from bdh_spec.dtypes import DTYPES


@dataclass(frozen=True)
class Heard:
    """What the suite said of one port on the cases of one seed."""

    name: str
    seed: int
    cases: int
    accusations: tuple[str, ...]


def hear(name: str, seed: int, minutes: float) -> Heard:
    """Generated cases alone, of the deep tier, for so long; a legal variant in float32, whose tolerances are the closest."""
    is_legal = name in LEGAL
    run = Run(LEGAL[name].backend() if is_legal else find_port(name), "cpu", seed, name, explains=False)
    checks = plan(TIERS["deep"].for_minutes(minutes), run.backend.capabilities, dtypes=DTYPES[:1] if is_legal else ())
    drawn = [replace(check, fixed=()) for check in checks if check.generated and not check.reason]
    until = time.time() + 60 * minutes
    results = [run.run(check, share(drawn, number, until)) for number, check in enumerate(drawn)]
    accused = tuple(result.worst.message for result in results if result.status in BAD and result.worst)
    return Heard(name, seed, sum(result.cases for result in results), accused)


def heard(jobs: list[tuple[str, int]], minutes: float, processes: int) -> Iterator[Heard]:
    """As they come."""
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=quiet) as pool:
        for done in as_completed([pool.submit(hear, name, seed, minutes) for name, seed in jobs]):
            yield done.result()


def whole_numbers(_: click.Context, __: click.Parameter, text: str) -> list[int]:
    """Numbers between commas."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r}: give whole numbers by commas, such as 1,2,3") from None


@click.command()
@click.option("--ports", default="numpy", show_default=True, help="Ports, by commas, as bdh-conform takes them.")
@click.option("--seeds", default="1,2,3", show_default=True, callback=whole_numbers, help="Of the cases, by commas.")
@click.option("--minutes", default=5.0, show_default=True, help="For each port and seed.")
@click.option("--legal/--no-legal", default=True, show_default=True, help="Hear the legal variants too.")
@click.option("--jobs", default=os.cpu_count() or 1, show_default="one a core", help="Processes to work in.")
def main(ports: str, seeds: list[int], minutes: float, legal: bool, jobs: int) -> None:
    """Print how many cases were drawn for each port; exit 1 if one is accused, or if there were none."""
    names = [*filter(None, ports.split(",")), *(LEGAL if legal else ())]
    wanted = [(name, seed) for seed in seeds for name in names]
    cases, accused = 0, 0
    say = Console(stderr=True, highlight=False)
    for one in heard(wanted, minutes, jobs):
        cases, accused = cases + one.cases, accused + len(one.accusations)
        say.print(f"{one.name}, seed {one.seed}: {one.cases} cases, {len(one.accusations)} accusations")
        for message in one.accusations:
            print(message)
    print(f"{cases} generated cases of {len(names)} ports with {len(seeds)} seeds: {accused} accusations")
    sys.exit(bool(accused or not cases))


if __name__ == "__main__":
    main()
