"""bdh-convert: answers on stdout, talk on stderr; misuse and bad input exit 2, a result that disagrees exits 1."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from bdh_convert.convert import DTYPES, Outcome, Settings, convert
from bdh_convert.dialects import DIALECTS, TARGETS
from bdh_convert.hf_folder import stale
from bdh_convert.inspect import as_table, report
from bdh_convert.route import Route, known, parse, remove_stray, stray_output
from bdh_convert.steps import Wishes
from bdh_convert.verify import MOST_LAYERS, DisagreementError
from bdh_convert.watch import Watch
from bdh_spec.dtypes import SYNONYMS, dtype_name
from bdh_spec.errors import BDHError, CheckpointError
from bdh_spec.files import shown
from bdh_spec.params import count

STDOUT = Path("-")
LARGE = 64 << 20  # bytes from which a conversion shows a bar

HELP = f"""Convert a BDH checkpoint between frameworks, or inspect one.

\b
  bdh-convert torch->mlx checkpoint.safetensors
  bdh-convert torch-to-mlx checkpoint.pt -o model.npz
  bdh-convert --to hf checkpoint.safetensors
  bdh-convert --quantize int8 checkpoint.safetensors
  bdh-convert torch-to-mlx checkpoint.pt -o - | ssh mac 'cat > model.safetensors'
  bdh-convert --inspect checkpoint.pt

Reads {", ".join(DIALECTS)}; writes {", ".join(TARGETS)}. The source dialect is detected when it is not named. FILE may be a
folder: of transformers, Trainer, accelerate, torch.distributed.checkpoint, DeepSpeed, or with one checkpoint in it.
"""


def dtype_of_weights(_: click.Context, __: click.Parameter, word: str | None) -> str | None:
    """A dtype by any of its names."""
    if word is not None and dtype_name(word) not in DTYPES:
        words = [*DTYPES, *(short for short, full in SYNONYMS.items() if full in DTYPES)]
        raise click.UsageError(f"no weights are stored as {word!r}: there are {', '.join(words)}")
    return word and dtype_name(word)


UNITS = {"": 1, "B": 1, **{f"{letter}B": 1000**k for k, letter in enumerate("KMGT", 1)}}
UNITS |= {f"{letter}IB": 1024**k for k, letter in enumerate("KMGT", 1)}


def number_of_bytes(_: click.Context, __: click.Parameter, word: str | None) -> int | None:
    """A size as transformers writes it, such as 5GB."""
    if word is None:
        return None
    match = re.fullmatch(r"(\d{1,15})\s*([A-Z]*)", word.upper())
    if match is None or match[2] not in UNITS or not int(match[1]):
        raise click.UsageError(f"{word!r} is no size of a file: give one such as 5GB or 500MiB")
    return int(match[1]) * UNITS[match[2]]


@click.command(help=HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("words", nargs=-1, metavar="[ROUTE] FILE", type=click.Path())
@click.option("--from", "source", metavar="DIALECT", help="What the file is, where it is not to be detected.")
@click.option("--to", "target", metavar="DIALECT", help="What to convert to.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Where to write; - for stdout.  [default: beside the input]"
)
@click.option("--force", is_flag=True, help="Replace an output that exists.")
@click.option(
    "--dtype", callback=dtype_of_weights, metavar="f32|bf16|f16", help="Store weights in this dtype; narrowing loses bits."
)
@click.option(
    "--quantize", type=click.Choice(("int8",)), help="Round weights to int8, a quarter of their size: the same as --to int8."
)
@click.option(
    "--max-shard-size", callback=number_of_bytes, metavar="SIZE", help="With hf: how large a file may be.  [default: 50GB]"
)
@click.option("--weights", metavar="NAME", help="Which set of weights, where a file holds several, such as ema.")
@click.option("--n-layer", type=click.IntRange(1), help="The number of layers, where nothing written tells it.")
@click.option("--dropout", type=click.FloatRange(0, 1, max_open=True), help="The dropout of training, likewise.")
@click.option(
    "--freqs", type=click.Choice(("keep", "reset")), help="Of frequencies that are not BDH's: compute by them, or by BDH's."
)
@click.option("--no-verify", is_flag=True, help="Do not read the result back and run both sides.")
@click.option("--allow-nonfinite", is_flag=True, help="Convert weights that hold NaN or infinity.")
@click.option("--inspect", "inspected", is_flag=True, help="Show what FILE holds, and convert nothing.")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
@click.version_option(package_name="bdh-spec", message="%(prog)s %(version)s", prog_name="bdh-convert")
@click.pass_context
def command(context: click.Context, /, words: tuple[str, ...], inspected: bool, as_json: bool, **options: Any) -> int:
    """Parse, do, answer; the exit status is returned."""
    if inspected:
        _refuse_ignored(context)
        return _inspect(words, as_json, _wishes(known(options["source"]), options))
    stray = stray_output() if words and words[0].endswith("-") else None
    try:
        quantised = options.pop("quantize")
        route = parse(words, options["source"], options["target"] or (quantised if len(words) == 1 else None), stray)
        _refuse_other_than(quantised, route)
        if stray:
            _talk(f"the shell took '>' for a redirection: this is read as {words[0]}>{stray}")
        return _convert(route, as_json=as_json, answer_on_stderr=bool(stray), **options)
    finally:
        if stray:
            _talk(remove_stray(stray))


def _refuse_other_than(quantised: str | None, route: Route) -> None:
    """Weights in int8 are a dialect of their own."""
    if quantised and route.target != quantised:
        raise click.UsageError(
            f"--quantize {quantised} writes the dialect {quantised}, and {route.target} is asked for as well: leave one out"
        )


def _wishes(source: str | None, options: dict[str, Any]) -> Wishes:
    return Wishes(source, options["weights"], options["n_layer"], options["dropout"], options["freqs"])


def _refuse_ignored(context: click.Context) -> None:
    """Options of a conversion have no effect on an inspection."""
    for name in ("target", "output", "force", "dtype", "quantize", "max_shard_size", "no_verify", "allow_nonfinite"):
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            option = next(parameter.opts[-1] for parameter in context.command.params if parameter.name == name)
            raise click.UsageError(f"--inspect writes nothing, so {option} would be ignored: leave it out")


def _inspect(words: tuple[str, ...], as_json: bool, wishes: Wishes) -> int:
    if len(words) != 1:
        raise click.UsageError(f"--inspect takes one file, and {' '.join(words) or 'nothing'} is given: inspect or convert")
    with _progress(Path(words[0])) as watch:
        found = report(Path(words[0]), wishes, watch)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
        for part in as_table(found):
            console.print(part, soft_wrap=isinstance(part, str), markup=False)
    return 0


def _convert(route: Route, *, output: Path | None, as_json: bool, answer_on_stderr: bool, **options: Any) -> int:
    settings = Settings(
        _wishes(route.source, options),
        options["dtype"],
        options["force"],
        not options["no_verify"],
        options["allow_nonfinite"],
        options["max_shard_size"],
    )
    if output == STDOUT:
        _refuse_no_pipe(route, settings, answer_on_stderr)
        with tempfile.TemporaryDirectory(prefix="bdh-convert-") as folder:
            file = Path(folder) / "checkpoint.safetensors"
            with _progress(route.file) as watch:
                outcome = convert(route.file, route.target, file, settings, watch)
            _pass_on(file)
        _report(route, replace(outcome, path=STDOUT), [*outcome.checkpoint.notes], as_json, on_stderr=True)
        return 0
    before = stale(output) if route.target == "hf" and output and output.is_dir() and settings.force else []
    with _progress(route.file) as watch:
        outcome = convert(route.file, route.target, output, settings, watch)
    notes, removed = [*outcome.checkpoint.notes], [file.name for file in before if not file.exists()]
    notes += [f"removed, being about other weights: {', '.join(removed)}"] if removed else []
    _report(route, outcome, notes, as_json, on_stderr=answer_on_stderr)
    return 0


def _refuse_no_pipe(route: Route, settings: Settings, stray: bool) -> None:
    """What cannot be, or means nothing, where the result goes to stdout."""
    if stray:
        raise click.UsageError("-o - needs stdout, which the shell took for the route: quote the route, 'torch->mlx'")
    if route.target == "hf":
        raise click.UsageError("hf is a folder, and only a file goes to stdout: name a folder with -o")
    if settings.force:
        raise click.UsageError("stdout replaces no file, so --force would be ignored: leave it out")
    if sys.stdout.isatty():
        raise click.UsageError("a checkpoint is no text for a terminal: send stdout to a file or a command")


def _pass_on(file: Path) -> None:
    """A finished file to stdout, whose reader may have had enough."""
    try:
        with file.open("rb") as whole:
            shutil.copyfileobj(whole, sys.stdout.buffer)
        sys.stdout.buffer.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that nothing more fails at the exit
        raise CheckpointError(
            f"stdout could not be written ({error.strerror}): what has arrived there is no whole file"
        ) from None


def _report(route: Route, outcome: Outcome, notes: Sequence[str], as_json: bool, *, on_stderr: bool) -> None:
    if as_json:
        click.echo(json.dumps(_as_json(route, outcome, notes), indent=2), err=on_stderr)
        return
    for note in notes:
        _talk(note)
    click.echo(_answer(route, outcome), err=on_stderr)


def _as_json(route: Route, outcome: Outcome, notes: Sequence[str]) -> dict[str, Any]:
    """What a conversion did, under keys that stay."""
    checkpoint = outcome.checkpoint
    return {
        "path": str(outcome.path),
        "from": checkpoint.dialect,
        "to": route.target,
        "config": checkpoint.config.as_dict(),
        "parameters": count(checkpoint.config),
        "dtypes": sorted({weight.stored_as for weight in checkpoint.weights}),
        "bytes": outcome.nbytes,
        "verified": outcome.losses is not None,
        "losses": outcome.losses,
        "rounding": outcome.rounding,
        "freqs": checkpoint.freqs,
        "notes": [shown(note) for note in notes],
    }


def _answer(route: Route, outcome: Outcome) -> str:
    checkpoint = outcome.checkpoint
    dtypes = ", ".join(sorted({weight.stored_as for weight in checkpoint.weights}))
    path = "stdout" if outcome.path == STDOUT else shown(outcome.path)
    written = f"{path}: {checkpoint.dialect} to {route.target}, {count(checkpoint.config):,} parameters, {dtypes}"
    if outcome.losses is None:
        return f"{written}, not verified"
    before, after = outcome.losses
    layers = checkpoint.config.n_layer
    own, bdhs = (" by its own frequencies", " by BDH's") if checkpoint.freqs == "reset" else ("", "")
    part = f", by the first {MOST_LAYERS} of {layers:,} layers" if layers > MOST_LAYERS else ""
    losses = f"{before:.6f} before{own}, {after:.6f} after{bdhs}"
    lines = [f"{written}, read back bit for bit", f"loss on a sentence: {losses}{part}"]
    return "\n".join(lines + (_rounded(outcome) if outcome.rounding else []))


def _rounded(outcome: Outcome) -> list[str]:
    """What weights in int8 lost, and what that is good for."""
    before, after = outcome.nbytes
    off = ", ".join(f"{name} {error:.1e}" for name, error in (outcome.rounding or {}).items())
    return [f"weights: {before:,} bytes before, {after:,} after", f"rounded off, in the worst column of each: {off}"]


@contextmanager
def _progress(file: Path) -> Iterator[Watch]:
    """A bar on stderr for what takes long."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(shown(file.name, 40), total=None, visible=False)

        def watch(done: int, total: int) -> None:
            progress.update(task, advance=done, total=total, visible=total >= LARGE)

        yield watch


def _talk(text: str) -> None:
    click.echo(f"bdh-convert: {shown(' '.join(text.split()))}", err=True)


def run(arguments: Sequence[str]) -> int:
    """Run the command; the exit status."""
    try:
        words = [word.removeprefix("->") for word in arguments]  # a route without a source is no option
        return int(command.main(words, standalone_mode=False) or 0)
    except click.Abort:
        raise KeyboardInterrupt from None
    except click.ClickException as error:
        _talk(error.format_message())
        return 2
    except DisagreementError as error:
        _talk(str(error))
        return 1
    except (BDHError, OSError) as error:
        _talk(str(error))
        return 2
