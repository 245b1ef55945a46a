"""bdh-conform: is this port right? The answer on stdout, talk on stderr; exit 0 passed, 1 disagreement, 2 misuse."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bdh_conformance import known, report
from bdh_conformance.__main__ import main
from bdh_conformance.channels import CHANNELS
from bdh_conformance.isolation import Isolated, Limits, Request, memory_of_the_machine
from bdh_conformance.levels import badge, markdown
from bdh_conformance.outcomes import BAD, Result
from bdh_conformance.plan import TIERS, Check
from bdh_conformance.ports import find_port
from bdh_conformance.runner import Run, share
from bdh_conformance.start import clean_up_when_interrupted
from bdh_conformance.yardstick.cases import Case
from bdh_spec.dtypes import DTYPES, dtype_name
from bdh_spec.files import whole_file
from bdh_spec.rope import PHASES, Phase

__all__ = ["command", "main"]

DISAGREEMENT = 1
COMMANDLINE = ParameterSource.COMMANDLINE

HELP = f"""Check a port of BDH against the specification.

PORT is a registered one, such as torch, mlx, jax or numpy, or any class by its path, such as mypkg.port:MyBackend.

\b
  bdh-conform torch
  bdh-conform mlx --device cpu --dtype float32,bfloat16
  bdh-conform mypkg.port:MyBackend --tier smoke --html report.html
  bdh-conform vectors export DIR

Channels: {", ".join(CHANNELS)}.
"""


def words(_: click.Context, parameter: click.Parameter, text: str | None) -> tuple[str, ...]:
    """A list separated by commas, of names that exist."""
    known_names = {"dtypes": DTYPES, "channels": tuple(CHANNELS)}[str(parameter.name)]
    found = tuple(word.strip() for word in text.split(",")) if text else ()
    found = tuple(map(dtype_name, found)) if parameter.name == "dtypes" else found
    if unknown := [word for word in found if word not in known_names]:
        raise click.UsageError(f"{unknown[0]!r} is none of {', '.join(known_names)}")
    return found


def parsed(_: click.Context, __: click.Parameter, text: str | None) -> Case | None:
    """A case as a failure printed it."""
    try:
        return Case.parse(text) if text else None
    except ValueError as error:
        raise click.UsageError(str(error)) from None


OUTPUT = click.Path(path_type=Path, dir_okay=False)
INPUT = click.Path(path_type=Path, dir_okay=False, exists=True)


@click.command(help=HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("port")
@click.option("--tier", type=click.Choice(tuple(TIERS)), default="standard", show_default=True, help="How much to look at.")
@click.option("--device", help="Such as cpu, cuda, mps, gpu.  [default: the port's best]")
@click.option("--dtype", "dtypes", callback=words, metavar="LIST", help="Dtypes to check.  [default: all claimed]")
@click.option("--channel", "channels", callback=words, metavar="LIST", help="Channels to check.  [default: all]")
@click.option("--phase", type=click.Choice(PHASES), help="Phases to check: exact or float32.  [default: all claimed]")
@click.option("--case", callback=parsed, metavar="CASE", help="One case only, as a failure printed it.")
@click.option("--seed", type=int, help="Draw other generated cases.  [default: the same every time; a new one for deep]")
@click.option("--known", "known_file", type=INPUT, help="Known failures, a TOML file; one that passes is an error.")
@click.option("--baseline", type=INPUT, help="An earlier --json, to compare with.")
@click.option("--json", "json_file", type=OUTPUT, help="Write everything that was found.")
@click.option("--junit", "junit_file", type=OUTPUT, help="Write it for a CI system.")
@click.option("--html", "html_file", type=OUTPUT, help="Write a page to look at.")
@click.option(
    "--badge", "badge_file", type=OUTPUT, help="Write a badge endpoint (.json) or a Markdown table (.md) of the levels."
)
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    metavar="N",
    help="Draw cases for so long, at most.  [default: 30 for deep]",
)
@click.option("--time-limit", default=120.0, show_default=True, metavar="SECONDS", help="For one case; JAX compiles meanwhile.")
@click.option(
    "--memory-limit", default=round(0.8 * memory_of_the_machine(), 1), show_default=True, metavar="GB", help="For the port."
)
@click.option("--in-process", is_flag=True, help="Run the port in this process, for a debugger: a crash ends it.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing on stderr but errors.")
@click.version_option(package_name="bdh-spec", message="%(prog)s %(version)s", prog_name="bdh-conform")
@click.pass_context
def command(
    context: click.Context,
    /,
    port: str,
    tier: str,
    device: str | None,
    dtypes: tuple[str, ...],
    channels: tuple[str, ...],
    phase: Phase | None,
    case: Case | None,
    seed: int | None,
    known_file: Path | None,
    baseline: Path | None,
    quiet: bool,
    minutes: float | None,
    time_limit: float,
    memory_limit: float,
    in_process: bool,
    **outputs: Path | None,
) -> int:
    """Run the checks, answer, write files; the exit status is returned."""
    refuse_ignored(context)
    excused, before = read_inputs(known_file, baseline)
    if seed is None and tier == "deep" and case is None:
        seed = int.from_bytes(os.urandom(4))
    phases = (phase,) if phase else ()
    request = Request(port, tier, device, seed, dtypes, channels, phases, str(case) if case else None, minutes)
    isolated, start = None if in_process else Isolated(request, Limits(time_limit, memory_limit)), time.perf_counter()
    clean_up_when_interrupted()
    try:
        run = Run(isolated.introduced() if isolated else find_port(port), device, seed, port)
        if device is not None and device.split(":")[0] not in run.backend.devices():
            raise click.UsageError(f"{port} has no device {device!r} here: choose from {', '.join(run.backend.devices())}")
        perform(run, request, isolated, quiet)
    finally:
        if isolated:
            isolated.stop()
    complaints = known.excuse(run.results, excused)
    whole = not (dtypes or channels or phases or case)
    result = report.document(run, tier, complaints, time.perf_counter() - start, whole=whole)
    changes = report.compare_with(result, before) if before else []
    answer(result, changes)
    write(result, report.Since(str(baseline), before, changes) if before else None, outputs)
    return 0 if result["passed"] else DISAGREEMENT


IGNORED = {  # by an option: those that mean nothing beside it, and why
    "case": (("tier", "seed"), "--case looks at one case only"),
    "in_process": (("time_limit", "memory_limit"), "--in-process can end no port"),
}


def refuse_ignored(context: click.Context) -> None:
    """What would be ignored is refused, so that nobody counts on it."""
    given = {p.name: p.opts[0] for p in context.command.params if context.get_parameter_source(str(p.name)) is COMMANDLINE}
    for option, (ignored, why) in IGNORED.items():
        if option in given and (name := next((name for name in ignored if name in given), None)):
            raise click.UsageError(f"{why}, so {given[name]} would be ignored: leave it out")


def read_inputs(known_file: Path | None, baseline: Path | None) -> tuple[list[known.Known], dict[str, Any] | None]:
    """The files that a run is judged with, before anything runs."""
    try:
        excused = known.read(known_file) if known_file else []
    except known.KnownError as error:
        raise click.UsageError(str(error)) from None
    return excused, report.read_baseline(baseline) if baseline else None


def perform(run: Run, request: Request, isolated: Isolated | None, quiet: bool) -> None:
    """Run the checks, showing on stderr which one is under way, or which is done where nobody watches."""
    console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
    if run.seed is not None:
        console.print(f"generated cases of seed {run.seed}", style="dim")
    watched = sys.stderr.isatty()
    columns = (TextColumn("{task.description:<32}"), BarColumn(), TimeElapsedColumn())
    checks = request.checks(run.backend)
    with Progress(*columns, console=console, transient=True, disable=quiet or not watched) as progress:
        task = progress.add_task("", total=len(checks))
        for number, check in enumerate(checks):
            progress.update(task, description=f"{check.channel.name} {check.dtype}")
            result = found(run, isolated, number, check, share(checks, number, request.until))
            bad = result.status in BAD
            if bad or (not watched and result.status != "not claimed"):
                line = f"{result.id} {result.status} after {result.cases} cases, {result.seconds:.1f} s"
                console.print(line, style="red" if bad else None)
            progress.advance(task)


def found(run: Run, isolated: Isolated | None, number: int, check: Check, until: float | None) -> Result:
    """One check, made here or in a process of its own."""
    if isolated is None:
        with devoid_of_talk():
            return run.run(check, until)
    return isolated.found(run, number, check)


@contextlib.contextmanager
def devoid_of_talk() -> Iterator[None]:
    """What a port prints goes to stderr: stdout is for the answer."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def answer(found: dict[str, Any], changes: list[dict[str, Any]]) -> None:
    """Failures with their explanation, then the levels, then the verdict."""
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)
    bad = [check for check in found["checks"] if check["status"] in BAD]
    for check in bad:
        if not check["same_as"]:
            print(check["worst"]["message"])
            for other in (other for other in bad if other["same_as"] == check["id"]):
                place = other["worst"]["stage"] or "its first call"
                print(f"  and so {other['id']} fails, first at {place}: {other['worst']['case']}")
            print()
    console.print(table(found))
    for change in changes:
        print(report.moved(change))
    for complaint in found["complaints"]:
        print(complaint)
    counts = ", ".join(f"{count} {status}" for status, count in found["totals"].items() if count)
    print(f"{found['port']} {'passes' if found['passed'] else 'fails'}: {counts}, in {found['seconds']} s")


def table(found: dict[str, Any]) -> Table:
    """Levels in rows: checks, cases, and the worst error over allowed."""
    made = Table("level", "standing", "checks", "cases", "worst error / allowed", "at", title=None)
    for level, standing in found["levels"].items():
        checks = [check for check in found["checks"] if check["level"] == level and check["cases"]]
        told = [check for check in checks if check["worst"]["ratio"] is not None]
        worst = max(told, key=lambda check: check["worst"]["ratio"], default=None)
        ratio, place = (
            (f"{worst['worst']['ratio']:.2g}", f"{worst['channel']} {worst['worst']['stage']}") if worst else ("", "")
        )
        made.add_row(level, standing, str(len(checks) or ""), str(sum(check["cases"] for check in checks) or ""), ratio, place)
    return made


def write(found: dict[str, Any], since: report.Since | None, outputs: dict[str, Path | None]) -> None:
    """The files that were asked for, each whole or not at all."""
    about = f"{found['tier']} tier, {found['versions']['port']}, suite {found['versions']['suite']}"
    make = {
        "json_file": lambda: json.dumps(found, indent=1) + "\n",
        "junit_file": lambda: report.junit(found),
        "html_file": lambda: report.page(found, since),
    }
    for name, path in outputs.items():
        if path is None:
            continue
        if name == "badge_file" and path.suffix == ".md":
            text = markdown(found["port"], found["levels"], about)
        elif name == "badge_file":
            text = json.dumps(badge(found["port"], found["levels"], found["passed"])) + "\n"
        else:
            text = make[name]()
        with whole_file(path) as part:
            part.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
