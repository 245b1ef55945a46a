"""bdh-bench: answers on stdout, talk on stderr; misuse exits 2, a port that broke exits 1."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bdh_bench import machine
from bdh_bench.measure import Settings, run
from bdh_bench.results import RowResult, read_json, write_json
from bdh_bench.rows import KINDS, Kind, chosen, standard
from bdh_bench.sides import ITEMSIZE, BenchError
from bdh_bench.sizes import SIZES, configured
from bdh_bench.table import heading, markdown, table
from bdh_bench.worker import EndError
from bdh_spec import BDHConfig, BDHError
from bdh_spec.dtypes import dtype_name
from bdh_spec.files import shown
from bdh_spec.registry import PORTS

BROKEN, MISUSE, TERMINATED, INTERRUPTED = 1, 2, 143, 130
WIDTH = 200  # of a table that goes to a file
PICTURES = (".png", ".svg")
# What a command measures. `all` leaves out nothing.
COMMANDS: dict[str, tuple[Kind, ...]] = {
    "forward": ("forward", "prefill"),
    "decode": ("decode",),
    "train": ("train",),
    "transformers": ("transformers",),
    "convert": ("convert",),
    "all": KINDS,
}
HELP = {
    "forward": "Texts of growing length: their logits (forward), and their logits and state (prefill).",
    "decode": "One token after a context, for one text or many.",
    "train": "A step of training: loss, slopes, AdamW.",
    "transformers": "A text by generate of transformers beside one by bdh_torch.",
    "convert": "bdh-convert beside cp of the same file.",
    "all": "Everything above.",
}

say = Console(stderr=True, highlight=False)


class Words(click.ParamType[tuple[str, ...]]):
    """Words with commas between them, each among those that are known, if any are named."""

    name = "words"

    def __init__(self, what: str, known: Callable[[], Sequence[str]] = tuple, read: Callable[[str], str] = str) -> None:
        self.what, self.known, self.read = what, known, read

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> tuple[str, ...]:
        words = tuple(self.read(word.strip()) for word in str(value).split(",") if word.strip())
        known = self.known()
        for word in words:
            if known and word not in known and ":" not in word:
                self.fail(f"no {self.what} is named {word!r}: there are {', '.join(known)}", param, context)
        if not words:
            self.fail(f"no {self.what} is named", param, context)
        return words


class Picture(click.Path):
    """A file that a plot can be written to."""

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        path = Path(os.fsdecode(super().convert(value, param, context)))
        if path.suffix.lower() not in PICTURES:
            self.fail(f"{path} is no picture that can be drawn: end it in {' or '.join(PICTURES)}", param, context)
        if find_spec("matplotlib") is None:
            self.fail("matplotlib draws it, and is not installed: pip install 'bdh-spec[bench]'", param, context)
        return path


def ports() -> list[str]:
    """Every port that is registered."""
    return ["numpy", *sorted(point.name for point in entry_points(group=PORTS))]


BACKEND = click.option(
    "--backend",
    "backends",
    type=Words("port", ports),
    help="Ports, such as torch,jax, or package.module:Class.  [default: all]",
)
OPTIONS = [
    BACKEND,
    click.option("--device", help="Such as cpu, cuda, mps, gpu, tpu.  [default: each port's best]"),
    click.option(
        "--dtype",
        "dtypes",
        default="float32",
        type=Words("dtype", lambda: tuple(ITEMSIZE), dtype_name),
        help="float32,bfloat16",
    ),
    click.option("--size", default="base", show_default=True, type=click.Choice(tuple(SIZES)), help="Of the model."),
    click.option("--n-layer", type=click.IntRange(1), help="In place of the size's own."),
    click.option("--n-embd", type=click.IntRange(1), help="Likewise."),
    click.option("--n-head", type=click.IntRange(1), help="Likewise."),
    click.option("--mlp-internal-dim-multiplier", type=click.IntRange(1), help="Likewise."),
    click.option("--vocab-size", type=click.IntRange(1), help="Likewise."),
    click.option(
        "--dropout", default=0.0, show_default=True, type=click.FloatRange(0, 1, max_open=True), help="Of training steps."
    ),
    click.option("--rows", "patterns", type=Words("row"), help="Only these, such as 'forward T=512,decode B=1*'."),
    click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Turns of each side."),
    click.option("--max-seconds", default=600.0, show_default=True, type=click.FloatRange(1), help="Of a row."),
    click.option("--budget", type=click.FloatRange(1), help="Seconds after which no row is begun.  [default: no end]"),
    click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of weights and tokens."),
    click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write everything to this file."),
    click.option("--plot", "picture", type=Picture(dir_okay=False), help="Draw throughput and memory over T (.png, .svg)."),
]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="bdh-spec", message="%(prog)s %(version)s", prog_name="bdh-bench")
def command() -> None:
    """Measure ports beside the plain form of the model, side by side, in turns, in one run.

    Without a COMMAND, everything is measured.
    """


def measuring(name: str) -> click.Command:
    """The command that measures the rows of some kinds."""

    def measured(**options: Any) -> int:
        return answer(COMMANDS[name], **options)

    for option in reversed(OPTIONS):
        measured = option(measured)
    return click.command(name, help=HELP[name])(measured)


for _name in COMMANDS:
    command.add_command(measuring(_name))


@command.command("errors")
@BACKEND
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(1), help="Of each case.")
def errors_command(backends: tuple[str, ...] | None, seeds: int) -> int:
    """The errors of every port and dtype in small cases, as shares of the allowed ones."""
    from bdh_bench.errors import errors

    show(errors(backends or ports(), seeds))
    return 0


@command.command("memory")
@BACKEND
@click.option("--more", default=2000, show_default=True, type=click.IntRange(1), help="Tokens to go on for.")
def memory_command(backends: tuple[str, ...] | None, more: int) -> int:
    """The peak memory of decoding at position 10 and at 100,000."""
    from bdh_bench.memory import memory

    show(memory(backends or ports(), more))
    return 0


@command.command("show")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--markdown", "for_page", is_flag=True, help="A table for a page, a line to a row.")
@click.option("--plot", "picture", type=Picture(dir_okay=False), help="Draw throughput and memory over T (.png, .svg).")
def show_command(files: tuple[Path, ...], for_page: bool, picture: Path | None) -> int:
    """What --json of one or more runs wrote, of one machine and model, as one table."""
    first, *more = (read_json(file) for file in files)
    for file, other in zip(files[1:], more, strict=True):
        if (other.machine, other.config) != (first.machine, first.config):
            raise BenchError(f"{file} is of another machine, of other versions or of another model than {files[0]}")
    results = [result for found in (first, *more) for result in found.rows]
    tell(first.machine, first.config, results, picture, for_page=for_page)
    return 0


def answer(
    kinds: tuple[Kind, ...],
    *,
    backends: tuple[str, ...] | None,
    device: str | None,
    dtypes: tuple[str, ...],
    size: str,
    dropout: float,
    patterns: tuple[str, ...] | None,
    rounds: int,
    max_seconds: float,
    budget: float | None,
    seed: int,
    json_file: Path | None,
    picture: Path | None,
    **numbers: int | None,
) -> int:
    """Measure, show, and write what is asked for; the exit status."""
    config = configured(size, dropout, **numbers)
    rows = chosen(standard(kinds, accelerated=device is not None and not device.startswith("cpu")), patterns or ())
    if picture and not any(row.kind == "forward" for row in rows):
        raise BenchError("--plot draws forward rows over T, and none is asked for: leave it out, or ask for forward rows")
    for file in filter(None, (json_file, picture)):
        if not file.absolute().parent.is_dir():
            raise BenchError(f"{file.parent} is not a folder: {file.name} cannot be written there")
    settings = Settings(config, dtypes, device, rounds, max_seconds, budget or float("inf"), seed)
    asked = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in ("config", "budget")}
    asked |= {"budget": budget, "rows": [row.name for row in rows], "ports": list(backends or ports())}
    about, results = machine.facts(), []
    for result in run(settings, backends or ports(), rows, lambda line: say.print(line, style="dim", markup=False)):
        results.append(result)
        if json_file:  # after each row, so that an interrupted run has what it has
            write_json(json_file, about, config, asked, results)
    tell(about, config, results, picture)
    return BROKEN if any(result.failed for result in results) else 0


def tell(
    about: dict[str, str], config: BDHConfig, results: list[RowResult], picture: Path | None, *, for_page: bool = False
) -> None:
    """The machine, the limits and the table on stdout, and the plot if it is asked for."""
    for line in heading(about, config, results):
        click.echo(line)
    if for_page:
        click.echo("\n" + "\n".join(markdown(results)))
    else:
        show(table(results))
    if picture:
        draw(picture, results, config)


def draw(picture: Path, results: list[RowResult], config: BDHConfig) -> None:
    """The plot, if there is anything in it."""
    from bdh_bench.plot import drawn, plot

    if drawn(results):
        plot(picture, results, config)
    else:
        talk(f"{picture} is not drawn, because no forward row gave a figure")


def show(found: Table) -> None:
    Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH).print(found, markup=False)


def talk(sentence: str) -> None:
    print(f"bdh-bench: {shown(sentence, 1000)}", file=sys.stderr)


def main() -> None:
    """Run the command; bad input is one sentence on stderr and exit status 2."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    words = sys.argv[1:]
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help", "--version")):
        words = ["all", *words]
    try:
        sys.exit(command.main(words, prog_name="bdh-bench", standalone_mode=False) or 0)
    except EndError as error:
        talk(str(error))
        sys.exit(BROKEN)
    except (click.ClickException, BDHError, OSError) as error:
        talk(error.format_message() if isinstance(error, click.ClickException) else str(error))
        sys.exit(MISUSE)
    except (KeyboardInterrupt, click.Abort):
        talk("interrupted")
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
