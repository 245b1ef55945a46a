"""bdh-conform vectors: hand out what a port in another language must compute, and judge what it did compute."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

import click

from bdh_conformance.adversaries.diagnosis import say
from bdh_conformance.adversaries.mistakes import Mistake
from bdh_conformance.files.check import AGREES, DIFFERS, NOT_CLAIMED, CaseReport, Verdict, branch_of, check, diagnosis
from bdh_conformance.files.vectors import VERSION, export, export_cases
from bdh_conformance.yardstick.agreement import headline
from bdh_spec import BDHError
from bdh_spec.dtypes import WIDE, dtype_name

Diagnosis: TypeAlias = list[list[Mistake]] | None


def known_dtype(_: click.Context, __: click.Parameter, word: str | None) -> str | None:
    """A dtype that vectors come in, by any of its names."""
    if word is not None and dtype_name(word) not in WIDE:
        raise click.UsageError(f"no vectors are in {word!r}: there are {', '.join(WIDE)}")
    return word and dtype_name(word)


@click.group()
@click.version_option(package_name="bdh-spec", message="%(prog)s %(version)s", prog_name="bdh-conform vectors")
def vectors() -> None:
    """Vectors for ports in other languages: inputs, and what the specification makes of them."""


@vectors.command("export")
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--version", help=f"Which published set.  [default: {VERSION}]")
@click.option("--case", "texts", multiple=True, metavar="CASE", help="Vectors of this case, instead of a published set.")
def export_command(folder: Path, version: str | None, texts: tuple[str, ...]) -> None:
    """Write vectors to DIR, a folder per case: safetensors, raw little-endian files, manifest.json and case.txt."""
    if version and texts:
        raise click.UsageError("--case is no case of a published set, so --version would be ignored: leave it out")
    try:
        names = export_cases(folder, texts) if texts else export(folder, version or VERSION)
    except (BDHError, ValueError) as error:
        raise click.UsageError(str(error)) from None
    click.echo(f"{folder} holds {', '.join(names)}")


@vectors.command("check")
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.argument("outputs", type=click.Path(path_type=Path), metavar="OUTPUTS")
@click.option(
    "--dtype",
    callback=known_dtype,
    metavar="|".join(WIDE),
    help="What the port computes in.  [default: the dtype of each file]",
)
@click.option("--json", "as_json", is_flag=True, help="Every tensor's verdict, machine readable.")
def check_command(folder: Path, outputs: Path, dtype: str | None, as_json: bool) -> None:
    """Judge what a port wrote to OUTPUTS/CASE/ against the vectors in DIR: exit 1 if anything differs."""
    try:
        reports = check(folder, outputs, dtype)
    except BDHError as error:
        raise click.UsageError(str(error)) from None
    found = diagnosis(reports)
    click.echo(as_document(reports, found) if as_json else as_text(reports, found))
    if any(report.having(DIFFERS) for report in reports):
        sys.exit(1)


def as_document(reports: list[CaseReport], found: Diagnosis) -> str:
    """The reports as JSON."""
    guesses = [[{"name": mistake.name, "says": mistake.says} for mistake in group] for group in found or []]
    agrees = not any(report.having(DIFFERS) for report in reports)
    return json.dumps({"agrees": agrees, "diagnosis": guesses, "cases": [r.as_dict() for r in reports]}, indent=2)


def as_text(reports: list[CaseReport], found: Diagnosis) -> str:
    """The reports for a reader, what they look like, and the number of tensors that agree, differ and are not claimed."""
    total = Counter(verdict.status for report in reports for verdict in report.verdicts)
    lines = [line for report in reports for line in lines_of(report)]
    summary = f"{total[AGREES]} tensors agree, {total[DIFFERS]} differ, {total[NOT_CLAIMED]} are not claimed"
    return "\n".join([*lines, *([] if found is None else [say(found)]), summary])


def lines_of(report: CaseReport) -> Iterator[str]:
    """One line for a case that agrees; for any other, where each branch of it leaves the specification."""
    agreeing, missing = report.having(AGREES), report.having(NOT_CLAIMED)
    if not report.actual:
        yield f"{report.case}: not claimed"
        return
    if report.having(DIFFERS):
        for branch in branches(report.verdicts):
            yield from divergence(report, branch)
    else:
        yield f"{report.case}: {len(agreeing)} tensors agree, {worst(agreeing)}"
    if missing:
        yield f"  not claimed: {', '.join(verdict.name for verdict in missing)}"


def branches(verdicts: Iterable[Verdict]) -> list[list[Verdict]]:
    """The verdicts in groups of which each is one chain of computation."""
    grouped: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        grouped.setdefault(branch_of(verdict.name), []).append(verdict)
    return list(grouped.values())


def divergence(report: CaseReport, branch: list[Verdict]) -> Iterator[str]:
    """The first tensor of a branch that differs, what agrees before it and how many differ after it."""
    differing = [verdict for verdict in branch if verdict.status == DIFFERS]
    if not differing:
        return
    claimed = [verdict.comparison for verdict in branch if verdict.comparison]
    yield f"{headline(report.case, claimed)}, {differing[0].dtype}"
    if len(differing) > 1:
        yield f"  {len(differing) - 1} after it differ too, the last of them {differing[-1].name}"


def worst(agreeing: list[Verdict]) -> str:
    """The dtypes, and how near the edge the worst tensor is."""
    dtypes = " and ".join(sorted({verdict.dtype for verdict in agreeing}))
    nearest = max((verdict.comparison for verdict in agreeing if verdict.comparison), key=lambda c: c.ratio)
    return f"{dtypes}; the largest error is {nearest.ratio:.2g} of what is allowed, at {nearest.stage}"
