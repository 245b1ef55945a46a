"""Write the text that the embedded checkpoint learns from, and the text it is measured on: what every Python says of itself.

python examples/hatchling_data.py DIR
bdh-train --config examples/hatchling.toml --size hatchling --data DIR/training.txt --val DIR/held_out.txt
"""

from __future__ import annotations

import ast
import pydoc_data.topics
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import click

# Folders of the standard library with text of another kind, of others, or of this text again.
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "site-packages", "dist-packages"}
SHORTEST = 80  # bytes of a docstring that is more than a phrase


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def main(folder: Path) -> None:
    """Write training.txt and held_out.txt to FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    training, held_out = (b"\n\n".join(both) for both in zip(corpus(), docstrings(), strict=True))
    (folder / "training.txt").write_bytes(training)
    (folder / "held_out.txt").write_bytes(held_out)
    click.echo(f"{len(training):,} bytes to train on and {len(held_out):,} held out: {folder}", err=True)


def corpus() -> tuple[bytes, bytes]:
    """Help topics to train on, and paragraphs of every tenth that these do not have: topics quote one another at length."""
    topics = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    training = "\n".join(topic for topic in topics if topic not in topics[5::10])
    paragraphs = [paragraph for topic in topics[5::10] for paragraph in topic.split("\n\n")]
    held_out = "\n\n".join(paragraph for paragraph in paragraphs if paragraph.strip() and paragraph not in training)
    return training.encode(), held_out.encode()


def docstrings() -> tuple[bytes, bytes]:
    """Docstrings of the standard library to train on, and those of every tenth module that these do not have."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in library.rglob("*.py") if not LEFT_OUT & set(path.relative_to(library).parts)]
    modules = [list(said(path)) for path in sorted(paths)]
    modules = [texts for texts in modules if texts]
    training = dict.fromkeys(text for i, texts in enumerate(modules) if i % 10 != 5 for text in texts)  # each once, in order
    held_out = dict.fromkeys(text for texts in modules[5::10] for text in texts if text not in training)
    return "\n\n".join(training).encode(), "\n\n".join(held_out).encode()


def said(path: Path) -> Iterator[str]:
    """The docstrings of a module."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            if len(text) >= SHORTEST:
                yield text


if __name__ == "__main__":
    main()
