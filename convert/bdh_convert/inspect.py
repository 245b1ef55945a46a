"""What a checkpoint holds, and whatever about it should make its owner look twice."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from bdh_convert import detect, tokenizer, verify
from bdh_convert.checkpoint import Checkpoint, check_layout, leftovers, refuse_layers, with_config, with_head
from bdh_convert.configs import complete, refuse_alibi
from bdh_convert.dialects import Dialect, from_dialect, recognise
from bdh_convert.frequencies import deviation, is_the_table
from bdh_convert.raw import chunks
from bdh_convert.tensors import Contents, Tensor
from bdh_spec.config import BDHConfig
from bdh_spec.errors import BDHError
from bdh_spec.params import Params, count

CLEARLY = 0.5  # nats per byte by which a head must do better lying on its side before anyone is told


def report(path: Path) -> dict[str, Any]:
    """Everything --inspect tells, under keys that stay."""
    contents = with_config(detect.contents(path))
    suspicious = tokenizer.notes(contents.tokenizer)
    dialect = _recognised(contents, suspicious)
    checkpoint = _understood(contents, dialect, suspicious) if dialect else None
    tensors = [_statistics(tensor) for tensor in contents.tensors.values()]
    suspicious += _in_values(tensors)
    loss = _run(checkpoint, suspicious) if checkpoint else None
    return {
        "path": str(path),
        "container": contents.container,
        "dialect": dialect.name if dialect else None,
        "config": checkpoint.config.as_dict() if checkpoint else None,
        "config_as_written": _plain(contents.config),
        "tokenizer": contents.tokenizer,
        "parameters": count(checkpoint.config) if checkpoint else None,
        "bytes": sum(tensor.nbytes for tensor in contents.tensors.values()),
        "loss": loss,
        "tensors": tensors,
        "suspicious": suspicious,
    }


def _recognised(contents: Contents, suspicious: list[str]) -> Dialect | None:
    with _Noted(suspicious):
        return recognise(contents.tensors, contents.container, contents.dialect)
    return None


def _understood(contents: Contents, dialect: Dialect, suspicious: list[str]) -> Checkpoint | None:
    """The checkpoint if it is one; each thing in the way is noted, and not only the first."""
    weights, config = None, None
    if dialect.name == "burn":
        with _Noted(suspicious):
            refuse_alibi(contents.config)
    with _Noted(suspicious):
        contents, notes = with_head(contents, dialect)
        suspicious += notes
    with _Noted(suspicious):
        suspicious += leftovers(contents, dialect)[1]
    with _Noted(suspicious):
        weights = from_dialect(dialect, contents.tensors)
        refuse_layers(weights)
    if weights is None:
        return None
    with _Noted(suspicious):
        config, notes = complete(contents.config, Params(*(weight.shape for weight in weights)))
        suspicious += notes
        check_layout(weights, config)
        suspicious += _in_frequencies(contents, config)
        return Checkpoint(contents.path, dialect.name, weights, config)
    return None


class _Noted:
    """What would refuse a conversion is a line in a report."""

    def __init__(self, suspicious: list[str]) -> None:
        self._suspicious = suspicious

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, BDHError):
            self._suspicious.append(str(error))
        return isinstance(error, BDHError)


def _in_frequencies(contents: Contents, config: BDHConfig) -> list[str]:
    tables = [tensor for name, tensor in contents.tensors.items() if detect.FREQS.fullmatch(name)]
    return [
        f"{stored.name} differs from BDH's frequency table by up to {deviation(stored, config):.3g} of a value"
        for stored in tables
        if not is_the_table(stored, config)
    ]


def _in_values(tensors: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"{tensor['name']} holds {tensor['nonfinite']:,} values that are not finite"
        for tensor in tensors
        if tensor["nonfinite"]
    ]
    return lines + [
        f"{tensor['name']} is {tensor['min']} everywhere" for tensor in tensors if tensor["std"] == 0 and not _unused(tensor)
    ]


def _unused(tensor: dict[str, Any]) -> bool:
    return tensor["name"] == "lm_gate"


def _run(checkpoint: Checkpoint, suspicious: list[str]) -> float | None:
    """The specification's loss on a sentence, with a look at the head from the side where it is square."""
    loss = verify.loss(checkpoint)
    if checkpoint.config.vocab_size == checkpoint.config.n_embd:
        turned = checkpoint.weights._replace(lm_head=checkpoint.weights.lm_head.transposed())
        other = verify.loss(replace(checkpoint, weights=turned))
        if other < loss - CLEARLY:
            suspicious.append(
                f"lm_head looks transposed: the loss on a sentence is {loss:.3f} as it lies and {other:.3f} on its side"
            )
    return loss if math.isfinite(loss) else None


def _statistics(tensor: Tensor) -> dict[str, Any]:
    values = tensor.load()
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
        "name": tensor.name,
        "shape": list(tensor.shape),
        "dtype": tensor.dtype.name,
        "bytes": tensor.nbytes,
        "min": low if finite else None,
        "max": high if finite else None,
        "mean": mean,
        "std": std if finite else None,
        "nonfinite": values.size - finite,
    }


def _plain(config: Any) -> Any:
    """A configuration with everything that JSON has no word for spelt out."""
    if isinstance(config, dict):
        return {str(key): _plain(value) for key, value in config.items()}
    return config if config is None or isinstance(config, (str, int, float, bool)) else str(config)


def as_table(found: dict[str, Any]) -> list[Table | str]:
    """The report for people."""
    config = found["config"] or {}
    head = f"{found['path']}: {found['dialect'] or 'no known dialect'} in {found['container']}, {found['bytes']:,} bytes"
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
