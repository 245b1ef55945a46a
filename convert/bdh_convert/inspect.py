"""What a checkpoint holds, and whatever about it should make its owner look twice."""

from __future__ import annotations

import math
import reprlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from rich.table import Table

from bdh_convert import verify
from bdh_convert.checkpoint import Checkpoint, of, open_checkpoint
from bdh_convert.raw import chunks
from bdh_convert.steps import NOTHING_SAID, STEPS, Draft, Wishes, begin
from bdh_convert.tensors import FLOATS, Tensor
from bdh_convert.watch import Watch, counted, ignore, watched
from bdh_spec.errors import BDHError
from bdh_spec.files import reading, shown
from bdh_spec.int8 import MOST as MOST_INT8
from bdh_spec.params import Params, count
from bdh_spec.registry import Freqs

MOST = 200  # tensors, or keys of a configuration, that a report lists
DEEPEST = 4  # mappings within mappings
CLEARLY = 0.5  # nats per byte by which a head must do better lying on its side before anyone is told


def report(path: Path, wishes: Wishes = NOTHING_SAID, watch: Watch = ignore) -> dict[str, Any]:
    """Everything --inspect tells, under keys that stay."""
    with reading(path):
        draft = begin(path, wishes)
        refusals = _collected(draft)
        listed = [part for tensor in draft.tensors.values() for part in tensor.parts()][:MOST]
        checkpoint = None if refusals else of(draft)
        total = sum(tensor.nbytes for tensor in listed) + (_runs(checkpoint) * verify.traffic(checkpoint) if checkpoint else 0)
        tensors = [_statistics(counted(tensor, total, watch)) for tensor in listed]
        suspicious = [*draft.notes, *refusals, *_in_values(tensors)]
        if len(draft.tensors) > MOST:
            suspicious.append(f"{len(draft.tensors) - MOST:,} more tensors are not listed")
        runs = checkpoint is not None and not any(_is_beyond_int8(tensor) for tensor in tensors)
        loss = _run(watched(checkpoint, total, watch), suspicious) if checkpoint and runs else None
        suspicious += _choice(path, wishes) if draft.undecided and len(refusals) == 1 else []
        return {
            "path": str(path),
            "container": draft.contents.container,
            "dialect": draft.dialect.name if draft.dialect else None,
            "config": draft.config.as_dict() if draft.config else None,
            "config_as_written": _plain(draft.contents.config),
            "tokenizer": draft.contents.tokenizer,
            "parameters": count(draft.config) if draft.config else None,
            "bytes": sum(tensor.nbytes for tensor in draft.tensors.values()),
            "loss": loss,
            "tensors": tensors,
            "suspicious": [shown(line) for line in suspicious],
        }


def _collected(draft: Draft) -> list[str]:
    """What every step that can be taken says against the file, and not only the first."""
    refusals = []
    for step in STEPS:
        try:
            if step.is_ready(draft):
                step.take(draft)
        except BDHError as error:
            refusals.append(str(error))
    return refusals


def _choice(path: Path, wishes: Wishes) -> list[str]:
    """What a model says by its own frequencies and by BDH's, where the user has to choose."""
    losses = {}
    for wish in get_args(Freqs):
        with suppress(BDHError):
            losses[wish] = verify.loss(open_checkpoint(path, replace(wishes, freqs=wish)))
    said = {"keep": "by its own frequencies", "reset": "by BDH's"}
    return [f"--freqs {wish}: the loss on a sentence is {loss:.6f} {said[wish]}" for wish, loss in losses.items()]


def _in_values(tensors: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"{tensor['name']} holds {tensor['nonfinite']:,} values that are not finite"
        for tensor in tensors
        if tensor["nonfinite"]
    ]
    lines += [
        f"{t['name']} holds -128: values in int8 run from -127 to 127, so nothing reads it"
        for t in tensors
        if _is_beyond_int8(t)
    ]
    return lines + [
        f"{tensor['name']} is {tensor['min']} everywhere" for tensor in tensors if tensor["std"] == 0 and not _unused(tensor)
    ]


def _is_beyond_int8(tensor: dict[str, Any]) -> bool:
    """Whether a weight in int8 holds what no rounding gives (R17)."""
    return (
        tensor["dtype"] == "int8"
        and tensor["name"] in Params._fields
        and tensor["min"] is not None
        and tensor["min"] < -MOST_INT8
    )


def _unused(tensor: dict[str, Any]) -> bool:
    return tensor["name"] == "lm_gate"


def _runs(checkpoint: Checkpoint) -> int:
    """How often a checkpoint is run: a square head is looked at from both sides."""
    return 2 if checkpoint.config.vocab_size == checkpoint.config.n_embd else 1


def _run(checkpoint: Checkpoint, suspicious: list[str]) -> float | None:
    """The specification's loss on a sentence, with a look at the head from the side where it is square."""
    loss = verify.loss(checkpoint)
    if _runs(checkpoint) > 1:
        turned = checkpoint.weights._replace(lm_head=checkpoint.weights.lm_head.transposed())
        other = verify.loss(replace(checkpoint, weights=turned))
        if other < loss - CLEARLY:
            suspicious.append(
                f"lm_head looks transposed: the loss on a sentence is {loss:.3f} as it lies and {other:.3f} on its side"
            )
    return loss if math.isfinite(loss) else None


def _statistics(tensor: Tensor) -> dict[str, Any]:
    values = tensor.load()
    if tensor.dtype not in FLOATS and tensor.dtype.kind not in "iub":
        values = np.empty(0)
    low, high, total, squares, finite = math.inf, -math.inf, 0.0, 0.0, 0
    for part in chunks(values):
        part = part.astype(np.float64)
        part = part[np.isfinite(part)]
        if part.size:
            low, high = min(low, float(part.min())), max(high, float(part.max()))
            total, squares, finite = total + float(part.sum()), squares + float(part @ part), finite + part.size
    mean = total / finite if finite else None
    std = math.sqrt(max(squares / finite - mean**2, 0.0)) if finite and low < high and mean is not None else 0.0
    return {
        "name": shown(tensor.name, 80),
        "shape": list(tensor.shape),
        "dtype": tensor.dtype.name,
        "bytes": tensor.nbytes,
        "min": low if finite else None,
        "max": high if finite else None,
        "mean": mean,
        "std": std if finite else None,
        "nonfinite": values.size - finite,
    }


def _plain(config: Any, depth: int = 0) -> Any:
    """A configuration with everything that JSON has no word for spelt out, and cut where it is long or deep."""
    if isinstance(config, dict) and depth < DEEPEST:
        few = list(config.items())[:MOST]
        return {shown(key, 80): _plain(value, depth + 1) for key, value in few}
    if config is None or isinstance(config, bool) or (isinstance(config, (int, float)) and abs(config) < 2**63):
        return config
    return shown(config if isinstance(config, str) else reprlib.repr(config), 200)


def as_table(found: dict[str, Any]) -> list[Table | str]:
    """The report for people."""
    config = found["config"] or {}
    head = f"{shown(found['path'])}: {found['dialect'] or 'no known dialect'} in {found['container']}, {found['bytes']:,} bytes"
    sizes = ", ".join(f"{key} {value}" for key, value in config.items()) or "no complete configuration"
    lines: list[Table | str] = [head, f"{sizes}; {found['parameters']:,} parameters" if found["parameters"] else sizes]
    table = Table("tensor", "shape", "dtype", "bytes", "min", "max", "mean", "std")
    for tensor in found["tensors"]:
        numbers = ["-" if tensor[key] is None else f"{tensor[key]:.4g}" for key in ("min", "max", "mean", "std")]
        table.add_row(tensor["name"], "x".join(map(str, tensor["shape"])), tensor["dtype"], f"{tensor['bytes']:,}", *numbers)
    lines.append(table)
    if found["loss"] is not None:
        lines.append(f"loss on a sentence: {found['loss']:.6f}")
    return lines + ([f"suspicious: {line}" for line in found["suspicious"]] or ["nothing suspicious"])
