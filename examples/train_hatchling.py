"""Train the first stage of the checkpoint that ships inside bdh_spec, on English that every Python carries, and write its card.

It sees windows of 256 bytes; examples/hatchling.toml is what it goes on with.

python examples/train_hatchling.py --out DIR        about an hour on two cores
"""

from __future__ import annotations

import hashlib
import math
import platform
import pydoc_data.topics
import textwrap
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import track

import bdh_spec
from bdh_spec.params import count
from bdh_torch import BDH, BDHConfig

CONFIG = BDHConfig(n_layer=4, n_embd=64, n_head=4, mlp_internal_dim_multiplier=32, dropout=0.1)
BATCH, WINDOW, WARMUP = 8, 256, 100
LEARNING_RATE, WEIGHT_DECAY, CLIP = 4e-3, 0.1, 1.0
PROMPT, SEED = "The ", 7


@click.command()
@click.option("--out", default=Path("hatchling-first-stage"), type=click.Path(path_type=Path, file_okay=False))
@click.option("--steps", default=3000, show_default=True)
def main(out: Path, steps: int) -> None:
    """Train, measure on held-out topics, save the checkpoint and its card to OUT."""
    torch.manual_seed(SEED)
    training, held_out = corpus()
    model = BDH(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    for step in track(range(steps), "training", console=Console(stderr=True)):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * schedule(step, steps)
        idx, targets = windows(training)
        with torch.autocast("cpu", torch.bfloat16):
            _, loss = model(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        if step % 200 == 199:
            print(
                f"step {step + 1}: training {loss.item() / math.log(2):.3f}, held out {bits_per_byte(model, held_out):.3f}",
                flush=True,
            )
    save(model, out, steps, training, held_out)


def corpus() -> tuple[bytes, bytes]:
    """Training text and held-out text, from the topics of Python's built-in help.

    Every tenth topic is held out. Topics quote one another at length, so of those only the paragraphs count that the
    training text does not have.
    """
    topics = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    training = "\n".join(topic for topic in topics if topic not in topics[5::10])
    paragraphs = [paragraph for topic in topics[5::10] for paragraph in topic.split("\n\n")]
    held_out = "\n\n".join(paragraph for paragraph in paragraphs if paragraph.strip() and paragraph not in training)
    return training.encode(), held_out.encode()


def windows(text: bytes) -> tuple[torch.Tensor, torch.Tensor]:
    """Random windows (BATCH, WINDOW) and the byte after each of theirs."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    starts = torch.randint(len(data) - WINDOW, (BATCH,))
    rows = torch.stack([data[s : s + WINDOW + 1] for s in starts.tolist()])
    return rows[:, :-1], rows[:, 1:]


def schedule(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to a twentieth."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP)))


def bits_per_byte(model: BDH, text: bytes) -> float:
    """Cross entropy on consecutive windows, each read from an empty state."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    rows = data[: (len(data) - 1) // WINDOW * WINDOW + 1]
    idx, targets = rows[:-1].view(-1, WINDOW), rows[1:].view(-1, WINDOW)
    model.eval()
    with torch.no_grad():
        losses = [model(i, t)[1].item() * len(i) for i, t in zip(idx.split(BATCH), targets.split(BATCH), strict=True)]
    model.train()
    return sum(losses) / len(idx) / math.log(2)


def save(model: BDH, out: Path, steps: int, training: bytes, held_out: bytes) -> None:
    """Write hatchling.safetensors and, beside it, hatchling.md."""
    weights = {name.removesuffix(".weight"): w.detach().numpy() for name, w in model.named_parameters()}
    params = bdh_spec.Params(**weights)
    out.mkdir(parents=True, exist_ok=True)
    bdh_spec.save(out / "hatchling.safetensors", params, CONFIG)
    sample = bdh_spec.get_backend("numpy").load(params, CONFIG).generate(PROMPT, 400, temperature=0.7, top_k=50, seed=SEED)
    (out / "hatchling.md").write_text(card(params, steps, training, held_out, bits_per_byte(model, held_out), sample))


def card(params: bdh_spec.Params, steps: int, training: bytes, held_out: bytes, bits: float, sample: bytes) -> str:
    """What a stranger should know of the checkpoint."""
    source = f"the help topics of Python {platform.python_version()} (`pydoc_data/topics.py`)"
    facts = {
        "configuration": ", ".join(f"{k} {v}" for k, v in CONFIG.as_dict().items()),
        "parameters": f"{count(CONFIG):,}, float32",
        "fingerprint": f"`{bdh_spec.fingerprint(params)}`",
        "data": f"{source}, {len(training):,} bytes",
        "SHA-256 of the training text": f"`{hashlib.sha256(training).hexdigest()}`",
        "licence of the data": "Python Software Foundation License Version 2; its code examples also Zero-Clause BSD",
        "training": f"{steps} steps of {BATCH} windows of {WINDOW} bytes, AdamW, bfloat16 autocast, on the CPU",
        "held-out bits per byte": f"{bits:.3f}, in windows of {WINDOW} bytes without earlier context",
        "held-out text": f"{len(held_out):,} bytes: paragraphs of every tenth topic, of which none occurs in the training text",
        "made by": "`examples/train_hatchling.py`",
    }
    table = "\n".join(f"| {name} | {fact} |" for name, fact in facts.items())
    text = textwrap.indent(sample.decode(errors="replace"), "    ")
    return f"""# hatchling.safetensors

A small BDH for demonstrations and tests. It writes English words in the manner of Python's documentation, and means nothing
by them.

| | |
| --- | --- |
{table}

A sample, prompt {PROMPT!r}, temperature 0.7, top_k 50, seed {SEED}:

{text}
"""


if __name__ == "__main__":
    main()
