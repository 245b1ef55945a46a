"""The command line of bdh-look: what it finds goes to stdout or to a file, talk to stderr."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console

import bdh_spec
from bdh_look.start import clean_up_when_interrupted
from bdh_spec import BDHError, CheckpointError, ForeignTokensWarning, Model, Params, TokensError
from bdh_spec.files import shown, whole_file
from bdh_spec.params import count
from bdh_spec.registry import Freqs

MISUSE, INTERRUPTED, TERMINATED = 2, 130, 143
PAGE = "page"  # the command that a text alone means


@dataclass(frozen=True)
class Chosen:
    """The model that a command looks into."""

    checkpoint: Path | None
    backend: str
    device: str | None
    dtype: str | None
    n_layer: int | None
    freqs: Freqs | None
    quiet: bool

    @property
    def name(self) -> str:
        return "the embedded model" if self.checkpoint is None else self.checkpoint.name

    def read(self, checkpoint: Path | None = None) -> tuple[Params, bdh_spec.BDHConfig]:
        """Weights of a model of bytes."""
        with warnings.catch_warnings():
            warnings.simplefilter("error", ForeignTokensWarning)
            params, config = bdh_spec.read(checkpoint or self.checkpoint, self.n_layer, self.freqs)
        if config.vocab_size > 256:
            raise TokensError(
                f"the checkpoint has {config.vocab_size} tokens, and bytes are 256: use bdh_look.record with tokens of its own"
            )
        return params, config

    def load(self, checkpoint: Path | None = None) -> Model:
        """The model on its port."""
        params, config = self.read(checkpoint)
        model = bdh_spec.choose(self.backend).load(params, config, device=self.device, dtype=self.dtype)
        self.say(f"{model.backend} on {model.device}, {model.dtype}, {count(config):,} parameters")
        return model

    def say(self, sentence: str) -> None:
        Console(stderr=True, quiet=self.quiet, highlight=False, markup=False).print(sentence, style="dim")


def of_a_model(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that every command has, given to it as one ``chosen``."""

    def gathered(
        checkpoint: Path | None,
        backend: str,
        device: str | None,
        dtype: str | None,
        n_layer: int | None,
        freqs: Freqs | None,
        quiet: bool,
        **rest: Any,
    ) -> Any:
        if n_layer and not checkpoint:
            raise click.UsageError("the embedded model knows its layers, so --n-layer would be ignored: leave it out")
        return command(Chosen(checkpoint, backend, device, dtype, n_layer, freqs, quiet), **rest)

    gathered.__doc__ = command.__doc__
    gathered.__name__ = command.__name__
    for option in reversed(OPTIONS):
        gathered = option(gathered)
    return gathered


OPTIONS = (
    click.option("-c", "--checkpoint", type=click.Path(path_type=Path), help="Of any dialect.  [default: the embedded model]"),
    click.option(
        "--backend", default="auto", show_default=True, help="numpy, torch, mlx, jax, or auto: what suits this machine."
    ),
    click.option("--device", help="Such as cpu, cuda, mps, gpu, tpu.  [default: the port's best]"),
    click.option("--dtype", help="float32, bfloat16, float16 or float64.  [default: float32]"),
    click.option("--n-layer", type=int, help="For a file that does not say how many layers it has."),
    click.option(
        "--freqs", type=click.Choice(("keep", "reset")), help="Of frequencies that are not BDH's: use them, or BDH's."
    ),
    click.option("-q", "--quiet", is_flag=True, help="Say nothing on stderr but errors."),
)


class TextOrCommand(click.Group):
    """A group in which a first word that names no command is the text of a page."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        own = {word for param in self.params for word in param.opts} | set(context.help_option_names)
        if args and args[0] not in self.commands and args[0] not in own:
            args = [PAGE, *args]
        return super().parse_args(context, args)


@click.group(cls=TextOrCommand, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="bdh-spec", message="%(prog)s %(version)s", prog_name="bdh-look")
def command() -> None:
    """Look inside a model: bdh-look TEXT -o page.html writes a page about how it reads TEXT.

    TEXT that is the name of a command goes after it: bdh-look page TEXT.
    """


@command.command(PAGE)
@click.argument("text")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("look.html"), show_default=True, help="- is stdout."
)
@click.option("--force", is_flag=True, help="Replace a file.")
@click.option("--causes/--no-causes", default=True, show_default=True, help="Read each byte again without some earlier ones.")
@of_a_model
def page_command(chosen: Chosen, text: str, output: Path, force: bool, causes: bool) -> None:
    """Write one self-contained HTML page about how a model reads TEXT, 2 to 2,000 bytes, or - for stdin.

    Of each byte: its loss, what was expected next, the earlier bytes and the synapses that it read, and the neurons that were
    active; of each neuron what excites it, what it speaks for, and its partners; the state over the text.
    """
    from bdh_look.page import page

    check_free(output, force)
    html = page(chosen.load(), text_bytes(text), chosen.name, with_causes=causes)
    put(output, html.encode())


def text_bytes(text: str) -> bytes:
    """The text as the bytes that were typed or piped."""
    return sys.stdin.buffer.read() if text == "-" else os.fsencode(text)


def check_free(output: Path | None, force: bool) -> None:
    """Refuse before any work what could not be written after it."""
    if output is None or str(output) == "-":
        return
    if output.exists() and not force:
        raise CheckpointError(f"{output} exists: choose another name or give --force")
    if not output.resolve().parent.is_dir():
        raise CheckpointError(f"{output.parent} is not a folder: nothing can be written there")


def put(output: Path, content: bytes) -> None:
    """Write a file whole, and its name to stdout; or its content."""
    if str(output) == "-":
        sys.stdout.buffer.write(content)
        return
    clean_up_when_interrupted()
    with whole_file(output) as part:
        part.write_bytes(content)
    click.echo(output)


def main() -> None:
    """Run the command: bad input is one sentence on stderr and exit status 2."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # so that what is half written goes too
    try:
        command.main(standalone_mode=False)
    except BrokenPipeError:  # whoever read the answer has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except ModuleNotFoundError as error:
        if error.name not in ("jinja2", "markupsafe", "matplotlib", "networkx", "scipy"):
            raise
        complain(f"{error.name} is not installed: pip install 'bdh-spec[look]'")
        sys.exit(MISUSE)
    except (click.ClickException, BDHError, OSError) as error:
        complain(error.format_message() if isinstance(error, click.ClickException) else str(error))
        sys.exit(MISUSE)
    except (KeyboardInterrupt, click.Abort):
        complain("interrupted")
        sys.exit(INTERRUPTED)


def complain(sentence: str) -> None:
    print(f"bdh-look: {shown(sentence)}", file=sys.stderr)
