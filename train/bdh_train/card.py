"""What a stranger should know of a model that was trained here."""

from __future__ import annotations

import subprocess
import textwrap
from dataclasses import dataclass
from pathlib import Path

from bdh_spec import BDHConfig, Params, fingerprint
from bdh_spec.params import count
from bdh_train.config import TrainConfig


@dataclass(frozen=True)
class Findings:
    """What was measured of a model at the end."""

    step: int
    training_bytes: int
    held_out_bytes: int
    data: str  # the fingerprint of the training text
    bits: float
    positions: dict[str, float]
    sample: bytes
    port: str


def card(config: TrainConfig, params: Params, sizes: BDHConfig, found: Findings) -> str:
    """The card, in Markdown."""
    windows = f"{config.block_size}" if config.min_block_size is None else f"{config.min_block_size} to {config.block_size}"
    windows += (
        f" bytes, and of {config.longest} in the last {config.long_steps} of {config.max_steps} steps"
        if config.long_block_size
        else " bytes"
    )
    batches = f"{config.accumulate} batches of " if config.accumulate > 1 else ""
    facts = {
        "configuration": ", ".join(f"{k} {v}" for k, v in sizes.as_dict().items()),
        **({} if sizes.freqs is None else {"frequencies": "its own, which are not BDH's (R4): the file carries them"}),
        "parameters": f"{count(sizes):,}",
        "fingerprint": f"`{fingerprint(params, sizes.freqs)}`",
        "data": f"{', '.join(map(name_of, config.data))}: {found.training_bytes:,} bytes to train on",
        "fingerprint of the data": f"`{found.data}`",
        "started from": name_of(config.init_from) if config.init_from else f"fresh weights, seed {config.seed}",
        "training": f"step {found.step} of {config.max_steps}, each {batches}{config.batch_size} windows of {windows}",
        "recipe": f"AdamW, rate {config.learning_rate:g}, {config.schedule} after {config.warmup_steps} steps of warm-up, decay"
        f" {config.weight_decay:g}, clip {config.grad_clip:g}, dropout {config.dropout:g}"
        + (f", {', '.join(config.freeze)} frozen" if config.freeze else ""),
        "held-out bits per byte": f"{found.bits:.3f}, on {found.held_out_bytes:,} bytes, in windows of {config.longest}",
        "made by": f"`bdh-train`, {found.port}, git revision {revision()}",
    }
    table = "\n".join(f"| {name} | {fact} |" for name, fact in facts.items())
    positions = "\n".join(f"| {place} | {bits:.3f} |" for place, bits in found.positions.items())
    text = textwrap.indent(found.sample.decode(errors="replace"), "    ")
    return f"""# model.safetensors

| | |
| --- | --- |
{table}

Bits per byte on held-out text by the position in a window that is read from an empty state; training saw windows of
{windows}:

| position | bits per byte |
| --- | --- |
{positions}

A sample, prompt {config.prompt!r}, temperature 0.8, top_k 50, seed {config.seed}:

{text}
"""


def name_of(path: str) -> str:
    """The last part of a path, which says enough and nothing of the machine; the whole of a name that is no path."""
    return Path(path).name if Path(path).exists() else path


def revision() -> str:
    """The git revision of this code, where it is a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
