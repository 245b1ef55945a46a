"""Write the text that the embedded checkpoint learns from, and the text it is measured on, from Python's own help topics.

python examples/hatchling_data.py DIR
bdh-train --config examples/hatchling.toml --data DIR/training.txt --val DIR/held_out.txt --init-from hatchling.safetensors
"""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import click


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def main(folder: Path) -> None:
    """Write training.txt and held_out.txt to FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    training, held_out = corpus()
    (folder / "training.txt").write_bytes(training)
    (folder / "held_out.txt").write_bytes(held_out)
    click.echo(f"{len(training):,} bytes to train on and {len(held_out):,} held out: {folder}", err=True)


def corpus() -> tuple[bytes, bytes]:
    """Training text, and the paragraphs of every tenth topic that it does not have: topics quote one another at length."""
    topics = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    training = "\n".join(topic for topic in topics if topic not in topics[5::10])
    paragraphs = [paragraph for topic in topics[5::10] for paragraph in topic.split("\n\n")]
    held_out = "\n\n".join(paragraph for paragraph in paragraphs if paragraph.strip() and paragraph not in training)
    return training.encode(), held_out.encode()


if __name__ == "__main__":
    main()
