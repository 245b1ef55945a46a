"""What every command of bdh-look is told: which model to look into, and where to write."""

from __future__ import annotations

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
from bdh_spec import CheckpointError, ForeignTokensWarning, Model, Params, TokensError
from bdh_spec.files import whole_file
from bdh_spec.params import count
from bdh_spec.registry import Freqs


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


def check_free(output: Path | None, force: bool) -> None:
    """Refuse before any work what could not be written after it."""
    if output is None or str(output) == "-":
        return
    if output.exists() and not force:
        raise CheckpointError(f"{output} exists: choose another name or give --force")
    if not output.resolve().parent.is_dir():
        raise CheckpointError(f"{output.parent} is not a folder: nothing can be written there")


def put(output: Path, content: bytes, *, replace: bool = True) -> None:
    """Write a file whole, and its name to stdout; or its content. Without ``replace`` the name must still be free then."""
    if str(output) == "-":
        sys.stdout.buffer.write(content)
        return
    clean_up_when_interrupted()
    with whole_file(output, replace=replace) as part:
        part.write_bytes(content)
    click.echo(output)
