"""What weights stored in fewer bits cost and save: python examples/quantised.py [CHECKPOINT] [--text FILE]

A row for each way to store them: bits per byte of a text, megabytes of all weights, CPU seconds to read the text and to write.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import torch
from hatchling_data import docstrings
from rich.console import Console
from rich.table import Table
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
)
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.utils import logging as transformers_logging

import bdh_spec
from bdh_transformers import BDHConfig, BDHForCausalLM

WINDOW = 1024
WAYS: dict[str, Callable[[], Any]] = {
    "float32": lambda: None,
    "torchao int8, weights only": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "torchao int8, activations too": lambda: TorchAoConfig(Int8DynamicActivationInt8WeightConfig()),
    "torchao float8, weights only": lambda: TorchAoConfig(Float8WeightOnlyConfig()),
    "torchao 4 bits by 32, in bytes": lambda: TorchAoConfig(IntxWeightOnlyConfig(torch.int4, PerGroup(32))),
}
if find_spec("bitsandbytes"):
    WAYS["bitsandbytes int8"] = lambda: BitsAndBytesConfig(load_in_8bit=True)


@click.command()
@click.argument("checkpoint", required=False, type=click.Path(exists=True, path_type=Path))
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Docstrings held out unless given.")
@click.option("--bytes", "size", default=32 * WINDOW, show_default=True, help="Of the text, from its start.")
@click.option("--tokens", default=64, show_default=True, help="To write.")
def main(checkpoint: Path | None, text: Path | None, size: int, tokens: int) -> None:
    """Print the table."""
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at each product that it narrows what it multiplies
    read = (text.read_bytes() if text else docstrings()[1])[:size]
    table = Table("weights", "bits per byte", "MB", "CPU s to read", "CPU ms a token")
    with tempfile.TemporaryDirectory() as folder:
        save(checkpoint, folder)
        for name, way in WAYS.items():
            model = BDHForCausalLM.from_pretrained(folder, quantization_config=way())
            bits, reading = surprise(model, read)
            table.add_row(name, f"{bits:.4f}", f"{stored(model) / 1e6:.2f}", f"{reading:.2f}", f"{writing(model, tokens):.1f}")
    Console().print(table)


def save(checkpoint: Path | None, folder: str) -> None:
    """Write a checkpoint of any dialect, or the embedded one, as a folder of transformers."""
    params, config = bdh_spec.read(*[checkpoint] if checkpoint else [])
    model = BDHForCausalLM(BDHConfig.from_sizes(config))
    embed, encoder, encoder_v, decoder, head = map(torch.from_numpy, params)
    body = {"embed.weight": embed, "encoder": encoder, "encoder_v": encoder_v, "decoder": decoder}
    weights = {f"backbone.{name}": weight for name, weight in body.items()} | {"lm_head.weight": head.T}
    model.load_state_dict(weights)
    model.save_pretrained(folder)


@torch.no_grad()
def surprise(model: BDHForCausalLM, text: bytes) -> tuple[float, float]:
    """Bits per byte of a text in windows, and the CPU seconds that it took to read it."""
    losses, began = [], time.process_time()
    for first in range(0, len(text) - 1, WINDOW):
        window = torch.tensor([list(text[first : first + WINDOW + 1])])
        losses.append((model(window, labels=window).loss.item(), window.shape[1] - 1))
    seconds = time.process_time() - began
    return sum(loss * n for loss, n in losses) / sum(n for _, n in losses) / math.log(2), seconds


def writing(model: BDHForCausalLM, tokens: int) -> float:
    """CPU milliseconds of a token that is written."""
    prompt = torch.tensor([list(b"The ")])
    began = time.process_time()
    model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return (time.process_time() - began) * 1000 / tokens


def stored(model: BDHForCausalLM) -> int:
    """Bytes of all weights, scales among them."""
    return sum(bytes_of(weight) for weight in model.state_dict().values())


def bytes_of(weight: torch.Tensor) -> int:
    """Bytes that a tensor holds, or the tensors that it is made of."""
    if hasattr(weight, "__tensor_flatten__"):
        names, _ = weight.__tensor_flatten__()
        return sum(bytes_of(getattr(weight, name)) for name in names)
    return weight.numel() * weight.element_size()


if __name__ == "__main__":
    main()
