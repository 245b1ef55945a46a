"""The command line of bdh-generate: bytes in, bytes out; everything else goes to stderr."""

from __future__ import annotations

import os
import secrets
import signal
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from click.core import ParameterSource
from rich.console import Console
from rich.table import Table

import bdh_spec
from bdh_generate.start import clean_up_when_interrupted
from bdh_spec import BDHConfig, BDHError, CheckpointError, ForeignTokensWarning, Model, Params, State, StateError, TokensError
from bdh_spec import checkpoint as files
from bdh_spec.files import shown
from bdh_spec.params import Array, count, fingerprint
from bdh_spec.protocol import as_tokens
from bdh_spec.registry import Freqs, read_stored
from bdh_spec.sampling import Sampling, check_length

MISUSE, INTERRUPTED, TERMINATED = 2, 130, 143
SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".npz", ".bin")  # of checkpoints


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("prompt", required=False)
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
@click.option("-c", "--checkpoint", "named", type=click.Path(path_type=Path), help="The checkpoint, when there is no prompt.")
@click.option("--backend", default="auto", show_default=True, help="numpy, torch, mlx, jax, or auto: what suits this machine.")
@click.option("--device", help="Such as cpu, cuda, mps, gpu, tpu.  [default: the port's best]")
@click.option("--dtype", help="float32, bfloat16, float16 or float64.  [default: float32]")
@click.option("--seed", type=int, help="One seed gives one text on every port.  [default: a new one, named on stderr]")
@click.option("-n", "--max-new-tokens", default=200, show_default=True, help="How many bytes to write.")
@click.option("--temperature", default=1.0, show_default=True, help="0 always takes the likeliest byte.")
@click.option("--top-k", type=int, help="Choose among the k likeliest bytes only.  [default: all]")
@click.option("--n-layer", type=int, help="For a file that does not say how many layers it has.")
@click.option("--freqs", type=click.Choice(("keep", "reset")), help="Of frequencies that are not BDH's: use them, or BDH's.")
@click.option("--save-state", type=click.Path(path_type=Path), help="Write what the model remembers at the end to this file.")
@click.option("--load-state", type=click.Path(path_type=Path), help="Go on where a saved state stopped, on any port.")
@click.option("--force", is_flag=True, help="Let --save-state replace a file.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing on stderr but errors.")
@click.option("--backends", is_flag=True, help="Show which ports this machine has, and stop.")
@click.version_option(package_name="bdh-spec", message="%(prog)s %(version)s", prog_name="bdh-generate")
@click.pass_context
def command(
    context: click.Context,
    /,
    prompt: str | None,
    checkpoint: Path | None,
    named: Path | None,
    backend: str,
    device: str | None,
    dtype: str | None,
    seed: int | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    n_layer: int | None,
    freqs: Freqs | None,
    save_state: Path | None,
    load_state: Path | None,
    force: bool,
    quiet: bool,
    backends: bool,
) -> None:
    """Write PROMPT and its continuation to stdout, byte by byte as they come.

    PROMPT is any text, or - to read bytes from stdin. CHECKPOINT is a file or folder of any dialect; without one the small
    embedded model speaks. A file alone is no PROMPT. With --load-state and no PROMPT only the continuation is written, so that
    the outputs of two runs joined are the text of one longer run.
    """
    if backends:
        refuse_company(context)
        show_backends()
        return
    if checkpoint and named:
        raise click.UsageError(f"two checkpoints, {checkpoint} and {named}: name one")
    if force and not save_state:
        raise click.UsageError("--force lets --save-state replace a file, and nothing is saved: leave it out")
    prompt, checkpoint = sort_out(prompt, checkpoint or named, load_state)
    if n_layer and not checkpoint:
        raise click.UsageError("the embedded model knows its layers, so --n-layer would be ignored: leave it out")
    check_length(max_new_tokens)
    how = Sampling(temperature, top_k, secrets.randbelow(2**32) if seed is None else seed)  # short enough to be typed again
    refuse_to_replace(save_state, load_state, force)
    params, config = read_model_of_bytes(checkpoint, n_layer, freqs)
    model = bdh_spec.choose(backend).load(params, config, device=device, dtype=dtype)
    text = Text.begin(model, prompt_bytes(prompt), load_state, params)
    say = Console(stderr=True, quiet=quiet, highlight=False)
    say.print(f"{model.backend} on {model.device}, {model.dtype}, {count(config):,} parameters, seed {how.seed}", style="dim")
    seconds = write(text, max_new_tokens, how)
    if save_state:
        clean_up_when_interrupted()
        text.save(save_state, params)
    say.print(f"{max_new_tokens} bytes in {seconds:.1f} s, {max_new_tokens / seconds:.0f} a second", style="dim")


@dataclass
class Text:
    """A text under way: what the model has read, and what is written but not yet read."""

    model: Model
    state: State
    pending: Array  # 1 P
    shown: bytes  # of the pending ones, those that belong to this run's output

    @classmethod
    def begin(cls, model: Model, prompt: bytes, load: Path | None, params: Params) -> Text:
        """A new text, or one that a saved state goes on with."""
        tokens = np.frombuffer(prompt, np.uint8).astype(np.int64)[None]
        if load is None:
            return cls(model, model.init_state(), as_tokens(prompt), prompt)
        saved, pending = files.read_state(load, model.config, fingerprint(params, model.config.freqs))
        if saved.batch != 1:
            raise StateError(f"{load} holds {saved.batch} texts: bdh-generate goes on with one")
        return cls(model, model.import_state(saved), np.concatenate([pending, tokens], axis=1), prompt)

    def save(self, path: Path, params: Params) -> None:
        """Write the state, all but the last byte of the text read."""
        if self.pending.shape[1] > 1:
            _, self.state = self.model.advance(self.state, self.pending[:, :-1], donate=True)
        exported = self.model.export_state(self.state)
        config, pending = self.model.config, self.pending[:, -1:].astype(np.int64)
        files.save_state(path, exported, config, fingerprint(params, config.freqs), pending)


def write(text: Text, max_new_tokens: int, how: Sampling) -> float:
    """Stream the text to stdout; the seconds that the continuation took."""
    out = sys.stdout.buffer
    out.write(text.shown)
    out.flush()
    start = time.perf_counter()
    stream = text.model.stream(text.pending, max_new_tokens, how.temperature, how.top_k, how.seed, state=text.state)
    for token, state in stream:
        text.pending, text.state = token[:, None], state
        out.write(bytes(token.tolist()))
        out.flush()
    if sys.stdout.isatty():
        out.write(b"\n")
        out.flush()
    return time.perf_counter() - start


def refuse_company(context: click.Context) -> None:
    """Whatever stands beside --backends would be ignored."""
    given = [p for p in context.command.params if context.get_parameter_source(str(p.name)) is ParameterSource.COMMANDLINE]
    if others := [p for p in given if p.name != "backends"]:
        raise click.UsageError(f"--backends writes no text, so {others[0].opts[-1]} would be ignored: leave it out")


def sort_out(prompt: str | None, checkpoint: Path | None, load: Path | None) -> tuple[str | None, Path | None]:
    """The prompt and the checkpoint, where the only word that is given is a file and no text."""
    if prompt is None or checkpoint is not None or not is_a_checkpoints_name(prompt):
        return prompt, checkpoint
    if load is None:
        raise click.UsageError(f"{prompt} is taken for a checkpoint, so no prompt is left: bdh-generate PROMPT {prompt}")
    return None, Path(prompt)


def is_a_checkpoints_name(word: str) -> bool:
    """Whether a word ends as checkpoints do, or is a file that is there, or a folder of transformers."""
    with suppress(OSError):  # of a prompt that is longer than names can be
        return word.lower().endswith(SUFFIXES) or Path(word).is_file() or (Path(word) / "config.json").is_file()
    return False


def prompt_bytes(prompt: str | None) -> bytes:
    """The prompt as the bytes that were typed or piped."""
    return sys.stdin.buffer.read() if prompt == "-" else os.fsencode(prompt or "")


def refuse_to_replace(save: Path | None, load: Path | None, force: bool) -> None:
    """A state is replaced only if asked to, or by its own continuation."""
    if save is None:
        return
    if save.exists() and not force and save != load:
        raise CheckpointError(f"{save} exists: choose another name or give --force")
    if not save.resolve().parent.is_dir():
        raise CheckpointError(f"{save.parent} is not a folder: nothing can be saved there")


def read_model_of_bytes(checkpoint: Path | None, n_layer: int | None, freqs: Freqs | None) -> tuple[Params, BDHConfig]:
    """A checkpoint, refused if its tokens are not bytes, for each is written as one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ForeignTokensWarning)
        params, config = read_stored(checkpoint, n_layer, freqs)
    if config.vocab_size > 256:
        raise TokensError(
            f"the checkpoint has {config.vocab_size} tokens, and bytes are 256: use its own tokenizer with bdh_spec.load"
        )
    return params, config


def show_backends() -> None:
    """A table of ports on stdout."""
    table = Table("port", "version", "devices", "dtypes", "available")
    for port in bdh_spec.backends():
        status = "yes" if port.available else f"no: {port.reason}"
        table.add_row(port.name, port.version, " ".join(port.devices), " ".join(port.dtypes), status)
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 140).print(table)


def main() -> None:
    """Run the command: bad input is one sentence on stderr and exit status 2."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # so that what is half written goes too
    sys.stderr.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a terminal of ASCII is no reason to stop
    try:
        command.main(standalone_mode=False)
    except BrokenPipeError:  # whoever read the text has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (click.ClickException, BDHError, OSError) as error:
        complain(error.format_message() if isinstance(error, click.ClickException) else str(error))
        sys.exit(MISUSE)
    except (KeyboardInterrupt, click.Abort):
        complain("interrupted")
        sys.exit(INTERRUPTED)


def complain(sentence: str) -> None:
    print(f"bdh-generate: {shown(sentence)}", file=sys.stderr)
