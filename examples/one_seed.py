"""How often do ports write different texts from one seed? Prints a table; every difference must be too close to call.

python examples/one_seed.py --prompts 500 --new 100
"""

from __future__ import annotations

import pydoc_data.topics
import sys

import click
import numpy as np
from rich.console import Console
from rich.table import Table

import bdh_spec
from bdh_conformance.channels.sampling import differences
from bdh_conformance.yardstick.tolerances import FACTOR
from bdh_spec.sampling import Sampling

BATCH, LENGTH = 25, 12


@click.command()
@click.option("--prompts", default=100, show_default=True, help=f"How many texts, a multiple of {BATCH}.")
@click.option("--new", default=100, show_default=True, help="Tokens written after each prompt.")
@click.option("--ports", default="numpy,torch,jax,mlx", show_default=True)
def main(prompts: int, new: int, ports: str) -> None:
    """Compare float32 ports with the float64 specification on prompts from Python's help topics, temperature 0.8."""
    text = np.frombuffer("".join(pydoc_data.topics.topics.values()).encode(), np.uint8)
    starts = np.random.default_rng(0).integers(0, len(text) - LENGTH, prompts)
    batches = np.stack([text[s : s + LENGTH] for s in starts]).reshape(-1, BATCH, LENGTH)
    reference = bdh_spec.load(backend="numpy", dtype="float64")
    table = Table("port", "texts", "tokens drawn", "texts that differ", "closest call missed by", "unexplained")
    unexplained = 0
    for name in ports.split(","):
        port = bdh_spec.load(backend=name, device="cpu", dtype="float32")
        found = [
            d for seed, batch in enumerate(batches) for d in differences(port, reference, batch, new, Sampling(0.8, seed=seed))
        ]
        wild = [d for d in found if d.gap > FACTOR["float32"] * d.rounding]
        unexplained += len(wild)
        widest = f"{max(d.gap for d in found):.0e}" if found else ""
        table.add_row(name, str(prompts), str(prompts * new), str(len(found)), widest, str(len(wild)))
    Console(width=110).print(table)
    sys.exit(bool(unexplained))


if __name__ == "__main__":
    main()
