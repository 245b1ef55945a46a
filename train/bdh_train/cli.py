"""The command line of bdh-train: its flags are the fields of TrainConfig. Talk goes to stderr, the model's path to stdout."""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from bdh_spec import BDHError
from bdh_spec.files import shown
from bdh_train.config import TrainConfig, from_mapping, hints, read_toml
from bdh_train.loop import train
from bdh_train.show import Talk

MISUSE, INTERRUPTED, TERMINATED = 2, 130, 143


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """A flag for each field of TrainConfig."""
    for f in reversed(dataclasses.fields(TrainConfig)):
        command = option(f)(command)
    return command


def option(f: dataclasses.Field[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The flag of a field: a list may be given by commas or word by word; nothing is set that is not given."""
    flag, kind = f"--{f.name.replace('_', '-')}", str(hints()[f.name])
    default = "" if f.default in (None, (), False, 0) else f"  [default: {f.default}]"
    says = f"{f.metadata['help']}{default}"
    if kind == str(bool):
        return click.option(f"{flag}/--no-{flag[2:]}", f.name, default=None, help=says)
    if "tuple" in kind:
        return click.option(flag, f.name, multiple=True, help=says)
    return click.option(flag, f.name, type=int if "int" in kind else float if "float" in kind else str, help=says)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@options
@click.option("--config", "file", type=click.Path(path_type=Path), help="A TOML file of these settings; flags override it.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out, on this port or another.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing on stderr but errors.")
@click.version_option(package_name="bdh-spec", message="%(prog)s %(version)s", prog_name="bdh-train")
def command(file: Path | None, resume: bool, quiet: bool, **flags: Any) -> None:
    """Train a model of bytes on text, on any port, in the folder --out.

    Ctrl-C finishes the step, saves and leaves; a run that was killed at any moment goes on with --resume.
    """
    given = {name: value for name, value in flags.items() if value not in (None, ())}
    for name in ("freeze", "text_fields"):
        if name in given:
            given[name] = tuple(word for words in given[name] for word in words.split(","))
    settings = (read_toml(file) if file else {}) | from_mapping(given, "the command")
    config = TrainConfig(**settings)
    with Signals() as signals:
        result = train(config, resume=resume, given=tuple(settings), stop=signals.asked, talk=Talk(quiet))
        if result.rank == 0:
            click.echo(result.checkpoint)
    if signals.number is not None and not result.is_done:
        sys.exit(INTERRUPTED if signals.number == signal.SIGINT else TERMINATED)


class Signals:
    """SIGINT and SIGTERM as a wish to stop after the step; a second SIGINT stops at once."""

    number: int | None = None

    def __enter__(self) -> Signals:
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _: object) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    def asked(self) -> bool:
        return self.number is not None


def main() -> None:
    """Run the command: bad input is one sentence on stderr and exit status 2."""
    sys.stderr.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a terminal of ASCII is no reason to stop
    try:
        command.main(standalone_mode=False)
    except (click.ClickException, BDHError, OSError) as error:
        complain(error.format_message() if isinstance(error, click.ClickException) else str(error))
        sys.exit(MISUSE)
    except MemoryError:
        complain(
            "the memory of this machine is not enough: give a smaller --batch-size with more --accumulate, or --block-size"
        )
        sys.exit(MISUSE)
    except (KeyboardInterrupt, click.Abort):
        complain("interrupted: go on with --resume")
        sys.exit(INTERRUPTED)


def complain(sentence: str) -> None:
    print(f"bdh-train: {shown(sentence)}", file=sys.stderr)
