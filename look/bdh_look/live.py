"""bdh-look live: a page that runs a model while one types, by the port in JavaScript beside this module."""

from __future__ import annotations

import base64
import html
import json
import re
import warnings
import webbrowser
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np

import bdh_spec
from bdh_look.options import check_free, put
from bdh_look.runs import checkpoints_in, step_in
from bdh_look.typed_arrays import encoded
from bdh_spec import BDHConfig, CheckpointError, ForeignTokensWarning, Params, TokensError
from bdh_spec.checkpoint import EMBEDDED
from bdh_spec.registry import Freqs

JAVASCRIPT = Path(__file__).parent / "javascript"
BYTES = 256  # tokens of a model that reads bytes
LARGEST = 2**28  # bytes of a checkpoint that a page can carry: in base64, browsers read strings of up to 2^29

IMPORT = re.compile(r'^import \{([^}]*)\} from "\./([a-z0-9_]+)\.mjs";\n', re.MULTILINE)
EXPORT = re.compile(r"^export (?=(?:async )?(?:function\*?|class|const) (\w+))", re.MULTILINE)
EXPORTS = re.compile(r"export ?\{([^{}]*)\};?\s*\Z")  # at the end of what another bundler made: ours as theirs, ...


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
    listed = [one.strip().split(" as ") for some in EXPORTS.findall(source) for one in some.split(",")]
    exported = ", ".join([*EXPORT.findall(source), *(f"{theirs}: {ours}" for ours, theirs in listed)])
    inside = EXPORTS.sub("", EXPORT.sub("", IMPORT.sub(r"const {\1} = modules.\2;\n", source)))
    done[name] = f"modules.{name} = (() => {{\n{inside}\nreturn {{ {exported} }};\n}})();\n"


def page(checkpoint: bytes | None = None, name: str = "", run: Sequence[dict[str, Any]] = ()) -> str:
    """The whole page as one HTML text, with a canonical checkpoint in it, or without one: then it asks for a file.

    ``run`` has the graphs of several checkpoints, as ``graphs_of`` makes them, of which ``checkpoint`` is the last.
    """
    template = (JAVASCRIPT / "index.html").read_text(encoding="utf-8")
    carried = ""
    if checkpoint is not None:
        data = base64.b64encode(checkpoint).decode()
        carried = f'<script type="text/plain" id="checkpoint" data-name="{html.escape(name)}">{data}</script>'
    if run:
        told = json.dumps(run, separators=(",", ":")).replace("<", "\\u003c")
        carried += f'\n<script type="application/json" id="run">{told}</script>'
    parts = {
        "/* page.css */": (JAVASCRIPT / "page.css").read_text(encoding="utf-8"),
        "/* modules */": bundle("page"),
        "<!-- checkpoint -->": carried,
    }
    before, *rest = re.split(r"(/\* (?:page\.css|modules) \*/|<!-- checkpoint -->)", template)
    return before + "".join(parts.get(part, part) for part in rest)


def opened(path: Path | None, n_layer: int | None = None, freqs: Freqs | None = None) -> tuple[Params, BDHConfig]:
    """A checkpoint of any dialect, refused if its tokens are no bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ForeignTokensWarning)
        params, config = bdh_spec.read(path, n_layer, freqs)
    if config.vocab_size > BYTES:
        raise TokensError(
            f"{path} has {config.vocab_size} tokens, and bytes are {BYTES}: use its own tokenizer with bdh_spec.load"
        )
    return params, config


def canonical(path: Path | None, params: Params, config: BDHConfig) -> bytes:
    """A checkpoint as a canonical file, refused if it is too large for a page."""
    if (size := sum(weight.nbytes for weight in params)) > LARGEST:
        raise CheckpointError(
            f"{path} holds {size:,} bytes, and a page carries up to {LARGEST:,}: write it with --empty, and drop the file on it"
        )
    with TemporaryDirectory() as folder:
        bdh_spec.save(Path(folder) / "canonical.safetensors", params, config)
        return (Path(folder) / "canonical.safetensors").read_bytes()


def graphs_of(paths: Sequence[Path], models: Iterable[tuple[Params, BDHConfig]]) -> list[dict[str, Any]]:
    """For the page, of each checkpoint of a run: its name, its step if it tells one, and its graphs with their hubs."""
    from bdh_look.hubs import hubs

    found, first = [], None
    for path, (params, config) in zip(paths, models, strict=True):
        first = first or config
        if (config.n_embd, config.n_head, config.n_neurons) != (first.n_embd, first.n_head, first.n_neurons):
            raise CheckpointError(f"{path} has other sizes than {paths[0]}: checkpoints of one run have the same neurons")
        graphs = {
            kind: {key: encoded(value) if isinstance(value, np.ndarray) else value for key, value in graph.items()}
            | {"chance": {way: encoded(value) for way, value in graph["chance"].items()}}
            for kind, graph in hubs(params, config).items()
        }
        found.append({"name": path.name, "step": step_in(path), "graphs": graphs})
    return found


@click.command("live", context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-c",
    "--checkpoint",
    "given",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Of any dialect. Several of one training run, or its folder, show its graph come about; the last one runs."
    "  [default: the embedded model]",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("live.html"), show_default=True, help="The page.")
@click.option("--empty", is_flag=True, help="Without a checkpoint: the page asks for a file.")
@click.option("--open", "show", is_flag=True, help="Show the page in a browser.")
@click.option("--n-layer", type=int, help="For a file that does not say how many layers it has.")
@click.option("--freqs", type=click.Choice(("keep", "reset")), help="Of frequencies that are not BDH's: use them, or BDH's.")
@click.option("--force", is_flag=True, help="Replace a file.")
def live(
    given: tuple[Path, ...],
    output: Path,
    empty: bool,
    show: bool,
    n_layer: int | None,
    freqs: Freqs | None,
    force: bool,
) -> None:
    """Write a page that runs a model while one types: one HTML file, which opens without a server or a network."""
    ignored = (given and given[0]) or (n_layer and "--n-layer") or (freqs and "--freqs")
    if empty and ignored:
        raise click.UsageError(f"--empty leaves the model out, so {ignored} would be ignored: leave one of them out")
    if show and str(output) == "-":
        raise click.UsageError("a page on stdout is no file for --open to show: name one with -o")
    if n_layer and not given:
        raise click.UsageError("the embedded model knows its layers, so --n-layer would be ignored: leave it out")
    check_free(output, force)
    with_model = page() if empty else _with_model([one for path in given for one in checkpoints_in(path)], n_layer, freqs)
    put(output, with_model.encode(), replace=force)
    if show:
        webbrowser.open(output.resolve().as_uri())


def _with_model(paths: Sequence[Path], n_layer: int | None, freqs: Freqs | None) -> str:
    """The page with one checkpoint; or with the last of several, and the graphs of all."""
    last = paths[-1] if paths else None
    carried = canonical(last, *opened(last, n_layer, freqs))
    run = graphs_of(paths, (opened(path, n_layer, freqs) for path in paths)) if len(paths) > 1 else ()
    return page(carried, (last or EMBEDDED).name, run)
