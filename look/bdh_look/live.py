"""bdh-look live: a page that runs a model while one types, by the port in JavaScript beside this module."""

from __future__ import annotations

import base64
import html
import re
import warnings
import webbrowser
from pathlib import Path
from tempfile import TemporaryDirectory

import click

import bdh_spec
from bdh_spec import CheckpointError, ForeignTokensWarning, TokensError
from bdh_spec.checkpoint import EMBEDDED
from bdh_spec.files import whole_file
from bdh_spec.registry import Freqs

JAVASCRIPT = Path(__file__).parent / "javascript"
BYTES = 256  # tokens of a model that reads bytes
LARGEST = 2**28  # bytes of a checkpoint that a page can carry: in base64, browsers read strings of up to 2^29

IMPORT = re.compile(r'^import \{([^}]*)\} from "\./([a-z_]+)\.mjs";\n', re.MULTILINE)
EXPORT = re.compile(r"^export (?=(?:async )?(?:function\*?|class|const) (\w+))", re.MULTILINE)


def bundle(entry: str, folder: Path = JAVASCRIPT) -> str:
    """One script with a module and all that it imports: browsers load no modules from files.

    Each module keeps a scope of its own. They are in the style of this project: what is imported and exported has a name.
    """
    done: dict[str, str] = {}
    _add_module(entry, folder, done)
    return "const modules = {};\n" + "".join(done.values())


def _add_module(name: str, folder: Path, done: dict[str, str]) -> None:
    source = (folder / f"{name}.mjs").read_text(encoding="utf-8")
    for _, imported in IMPORT.findall(source):
        if imported not in done:
            _add_module(imported, folder, done)
    exported = ", ".join(EXPORT.findall(source))
    inside = EXPORT.sub("", IMPORT.sub(r"const {\1} = modules.\2;\n", source))
    done[name] = f"modules.{name} = (() => {{\n{inside}\nreturn {{ {exported} }};\n}})();\n"


def page(checkpoint: bytes | None = None, name: str = "") -> str:
    """The whole page as one HTML text, with a canonical checkpoint in it, or without one: then it asks for a file."""
    template = (JAVASCRIPT / "index.html").read_text(encoding="utf-8")
    carried = ""
    if checkpoint is not None:
        data = base64.b64encode(checkpoint).decode()
        carried = f'<script type="text/plain" id="checkpoint" data-name="{html.escape(name)}">{data}</script>'
    parts = {
        "/* page.css */": (JAVASCRIPT / "page.css").read_text(encoding="utf-8"),
        "/* modules */": bundle("page"),
        "<!-- checkpoint -->": carried,
    }
    before, *rest = re.split(r"(/\* (?:page\.css|modules) \*/|<!-- checkpoint -->)", template)
    return before + "".join(parts.get(part, part) for part in rest)


def canonical(path: Path | None, n_layer: int | None = None, freqs: Freqs | None = None) -> bytes:
    """A checkpoint of any dialect as a canonical file, refused if its tokens are no bytes or it is too large for a page."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ForeignTokensWarning)
        params, config = bdh_spec.read(path, n_layer, freqs)
    if config.vocab_size > BYTES:
        raise TokensError(
            f"{path} has {config.vocab_size} tokens, and bytes are {BYTES}: use its own tokenizer with bdh_spec.load"
        )
    if (size := sum(weight.nbytes for weight in params)) > LARGEST:
        raise CheckpointError(
            f"{path} holds {size:,} bytes, and a page carries up to {LARGEST:,}: write it with --empty, and drop the file on it"
        )
    with TemporaryDirectory() as folder:
        bdh_spec.save(Path(folder) / "canonical.safetensors", params, config)
        return (Path(folder) / "canonical.safetensors").read_bytes()


@click.command("live", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-c", "--checkpoint", type=click.Path(path_type=Path), help="Of any dialect.  [default: the embedded model]")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("live.html"), show_default=True, help="The page.")
@click.option("--empty", is_flag=True, help="Without a checkpoint: the page asks for a file.")
@click.option("--open", "show", is_flag=True, help="Show the page in a browser.")
@click.option("--n-layer", type=int, help="For a file that does not say how many layers it has.")
@click.option("--freqs", type=click.Choice(("keep", "reset")), help="Of frequencies that are not BDH's: use them, or BDH's.")
@click.option("--force", is_flag=True, help="Replace a file.")
def live(
    checkpoint: Path | None, output: Path, empty: bool, show: bool, n_layer: int | None, freqs: Freqs | None, force: bool
) -> None:
    """Write a page that runs a model while one types: one HTML file, which opens without a server or a network."""
    ignored = checkpoint or (n_layer and "--n-layer") or (freqs and "--freqs")
    if empty and ignored:
        raise click.UsageError(f"--empty leaves the model out, so {ignored} would be ignored: leave one of them out")
    if n_layer and not checkpoint:
        raise click.UsageError("the embedded model knows its layers, so --n-layer would be ignored: leave it out")
    _refuse_to_replace(output, force)
    text = page() if empty else page(canonical(checkpoint, n_layer, freqs), (checkpoint or EMBEDDED).name)
    with whole_file(output, replace=force) as part:
        part.write_text(text, encoding="utf-8")
    click.echo(output)
    if show:
        webbrowser.open(output.resolve().as_uri())


def _refuse_to_replace(output: Path, force: bool) -> None:
    if output.exists() and not force:
        raise CheckpointError(f"{output} exists: choose another name or give --force")
    if not output.resolve().parent.is_dir():
        raise CheckpointError(f"{output.parent} is not a folder: nothing can be saved there")
