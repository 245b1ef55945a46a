"""bdh-convert: answers on stdout, talk on stderr; misuse and bad input exit 2, a result that disagrees exits 1."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from bdh_convert.convert import DTYPES, Outcome, Settings, Watch, convert
from bdh_convert.dialects import DIALECTS, TARGETS
from bdh_convert.inspect import as_table, report
from bdh_convert.route import Route, parse, remove_stray, stray_output
from bdh_convert.verify import DisagreementError
from bdh_spec.errors import BDHError
from bdh_spec.params import count

LARGE = 64 << 20  # bytes from which a conversion shows a bar

HELP = f"""Convert a BDH checkpoint between frameworks, or inspect one.

\b
  bdh-convert torch->mlx checkpoint.safetensors
  bdh-convert torch-to-mlx checkpoint.pt -o model.npz
  bdh-convert --to hf checkpoint.safetensors
  bdh-convert --inspect checkpoint.pt

Reads {", ".join(DIALECTS)}; writes {", ".join(TARGETS)}. The source dialect is detected when it is not named.
"""


@click.command(help=HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("words", nargs=-1, metavar="[ROUTE] FILE")
@click.option("--from", "source", metavar="DIALECT", help="What the file is, where it is not to be detected.")
@click.option("--to", "target", metavar="DIALECT", help="What to convert to.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write (default: beside the input).")
@click.option("--force", is_flag=True, help="Replace an output that exists.")
@click.option("--dtype", type=click.Choice(tuple(DTYPES)), help="Store weights in this dtype; narrowing loses bits.")
@click.option("--n-layer", type=click.IntRange(1), help="The number of layers, where nothing written tells it.")
@click.option("--dropout", type=click.FloatRange(0, 1, max_open=True), help="The dropout of training, likewise.")
@click.option("--freqs", type=click.Choice(("keep", "reset")), help="What to do with frequencies that are not BDH's.")
@click.option("--no-verify", is_flag=True, help="Do not read the result back and run both sides.")
@click.option("--allow-nonfinite", is_flag=True, help="Convert weights that hold NaN or infinity.")
@click.option("--inspect", "inspected", type=click.Path(path_type=Path), metavar="FILE", help="Show what a file holds.")
@click.option("--json", "as_json", is_flag=True, help="With --inspect: machine readable.")
def command(words: tuple[str, ...], inspected: Path | None, as_json: bool, **options: Any) -> int:
    """Parse, do, answer; the exit status is returned."""
    stray = stray_output() if words and words[0].endswith("-") else None
    try:
        if inspected is not None:
            return _inspect(inspected, words, as_json)
        if as_json:
            raise click.UsageError("--json belongs to --inspect: give a file to inspect")
        route = parse(words, options.pop("source"), options.pop("target"), stray)
        if stray:
            _talk(f"the shell took '>' for a redirection: this is read as {words[0]}>{stray}")
        return _convert(route, answer_on_stderr=bool(stray), **options)
    finally:
        if stray:
            _talk(remove_stray(stray))


def _inspect(file: Path, words: tuple[str, ...], as_json: bool) -> int:
    if words:
        raise click.UsageError(f"--inspect takes one file, and {' '.join(words)} is beside it: inspect or convert")
    found = report(file)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
        for part in as_table(found):
            console.print(part, soft_wrap=isinstance(part, str), markup=False)
    return 0


def _convert(
    route: Route,
    *,
    output: Path | None,
    no_verify: bool,
    answer_on_stderr: bool,
    **options: Any,
) -> int:
    settings = Settings(source=route.source, verify=not no_verify, **options)
    with _progress(route.file) as watch:
        outcome = convert(route.file, route.target, output, settings, watch)
    for note in outcome.checkpoint.notes:
        _talk(note)
    click.echo(_answer(route, outcome), err=answer_on_stderr)
    return 0


def _answer(route: Route, outcome: Outcome) -> str:
    checkpoint = outcome.checkpoint
    dtypes = ", ".join(sorted({weight.dtype.name for weight in checkpoint.weights}))
    written = f"{outcome.path}: {checkpoint.dialect} to {route.target}, {count(checkpoint.config):,} parameters, {dtypes}"
    if outcome.losses is None:
        return f"{written}, not verified"
    before, after = outcome.losses
    return f"{written}, read back bit for bit\nloss on a sentence: {before:.6f} before, {after:.6f} after"


@contextmanager
def _progress(file: Path) -> Iterator[Watch]:
    """A bar on stderr for what takes long."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(file.name, total=None, visible=False)

        def watch(done: int, total: int) -> None:
            progress.update(task, advance=done, total=total, visible=total >= LARGE)

        yield watch


def _talk(text: str) -> None:
    click.echo(f"bdh-convert: {text}", err=True)


def main() -> None:
    """The console script."""
    try:
        words = [word.removeprefix("->") for word in sys.argv[1:]]  # a route without a source is no option
        sys.exit(command.main(words, standalone_mode=False))
    except (KeyboardInterrupt, click.Abort):
        _talk("interrupted, nothing was left behind")
        sys.exit(130)
    except click.ClickException as error:
        _talk(error.format_message())
        sys.exit(2)
    except DisagreementError as error:
        _talk(" ".join(str(error).split()))
        sys.exit(1)
    except (BDHError, OSError) as error:
        _talk(" ".join(str(error).split()))
        sys.exit(2)
