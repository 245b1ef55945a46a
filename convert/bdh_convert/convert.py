"""From one dialect to another: read lazily, write whole, read back, and only then give the file its name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bdh_convert import hf_folder, npz_file, pickle_file, safetensors_file, tokenizer, verify
from bdh_convert.checkpoint import Checkpoint, Freqs, open_checkpoint
from bdh_convert.dialects import DIALECTS, Dialect, to_dialect
from bdh_convert.metadata import about
from bdh_convert.raw import chunks
from bdh_convert.tensors import BF16, F16, F32, Tensor
from bdh_spec.errors import CheckpointError, ParamsError
from bdh_spec.files import whole_file
from bdh_spec.params import Array, Params

DTYPES = {"f32": F32, "bf16": BF16, "f16": F16}
WRITERS = {
    "safetensors": safetensors_file.write,
    "pt": pickle_file.write,
    "npz": npz_file.write,
}

Watch = Callable[[int, int], object]  # told how many bytes are done, and of how many


@dataclass(frozen=True)
class Settings:
    """What a user can decide about a conversion."""

    source: str | None = None  # the dialect, where it is not to be detected
    n_layer: int | None = None
    dropout: float | None = None
    dtype: str | None = None
    freqs: Freqs | None = None
    force: bool = False
    verify: bool = True
    allow_nonfinite: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a conversion did."""

    path: Path
    checkpoint: Checkpoint  # what was written, as read from the source
    losses: tuple[float, float] | None  # of the source and of the result; None if not verified


def convert(
    source: Path, target: str, output: Path | None, settings: Settings, watch: Watch = lambda done, total: None
) -> Outcome:
    """Write a checkpoint in the target dialect, whole or not at all."""
    dialect = DIALECTS[target]
    original = open_checkpoint(
        source, dialect=settings.source, n_layer=settings.n_layer, dropout=settings.dropout, freqs=settings.freqs
    )
    if original.freqs and not dialect.freqs:
        raise CheckpointError(
            f"{target} files store no frequencies, so --freqs keep cannot: use --freqs reset, or torch or mlx"
        )
    output = output or default_output(source, original.dialect, dialect)
    container = container_of(output, dialect)
    check_output(output, container, settings.force)
    wanted = _prepared(original, settings, watch)
    tensors = to_dialect(dialect, wanted.weights, wanted.config, wanted.freqs)
    with _whole(output, container) as part:
        _write(part, container, tensors, wanted, target)
        losses = _verified(part, wanted, original, target, settings) if settings.verify else None
    return Outcome(output, wanted, losses)


def default_output(source: Path, spoken: str, target: Dialect) -> Path:
    """A name beside the input: checkpoint.safetensors becomes checkpoint.mlx.safetensors."""
    source = source if source.name else source.resolve()
    stem = source.name if source.is_dir() else source.stem
    return source.with_name(f"{stem.removesuffix('.' + spoken)}.{target.name}{target.suffixes[0]}")


def container_of(output: Path, dialect: Dialect) -> str:
    """The container that a file's name asks for."""
    if dialect.name == "hf":
        return "hf"
    if output.suffix not in dialect.suffixes:
        raise CheckpointError(f"{output} is no name for a {dialect.name} file: end it in {' or '.join(dialect.suffixes)}")
    return {".safetensors": "safetensors", ".npz": "npz"}.get(output.suffix, "pt")


def check_output(output: Path, container: str, force: bool) -> None:
    """Refuse to write over what is there, or to where nothing can be."""
    if not output.parent.is_dir():
        raise CheckpointError(f"{output.parent} is no folder, so {output.name} cannot be written there: create it first")
    if not output.exists():
        return
    if output.is_dir() != (container == "hf"):
        kind = "a folder" if output.is_dir() else "a file"
        raise CheckpointError(f"{output} is {kind}: choose another name with -o")
    if not force:
        raise CheckpointError(f"{output} exists: choose another name with -o, or --force to replace it")


def _prepared(original: Checkpoint, settings: Settings, watch: Watch) -> Checkpoint:
    """The checkpoint with every weight in the dtype asked for, each checked and counted when it is read."""
    weights = original.weights if settings.allow_nonfinite else map(_finite, original.weights)
    total = sum(weight.nbytes for weight in original.weights) * (2 if settings.verify else 1)  # written, then read back
    counted = (_counted(weight, total, watch) for weight in weights)
    dtype = DTYPES[settings.dtype] if settings.dtype else None
    return replace(original, weights=Params(*(weight.cast(dtype or weight.dtype) for weight in counted)))


def _finite(tensor: Tensor) -> Tensor:
    def fetch() -> Array:
        values = tensor.load()
        if not all(np.isfinite(part).all() for part in chunks(values)):
            where = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
            raise ParamsError(
                f"{tensor.name} holds {float(values[where])} at {list(where)}: --allow-nonfinite converts it all the same"
            )
        return values

    return replace(tensor, fetch=fetch)


def _counted(tensor: Tensor, total: int, watch: Watch) -> Tensor:
    def fetch() -> Array:
        values = tensor.fetch()
        watch(tensor.nbytes, total)
        return values

    return replace(tensor, fetch=fetch)


def _write(part: Path, container: str, tensors: list[Tensor], wanted: Checkpoint, target: str) -> None:
    said = about(wanted.config, target, wanted.tokenizer)
    if container == "hf":
        hf_folder.write(part, tensors, said, wanted.config)
        tokenizer.write(part, wanted.tokenizer)
    else:
        WRITERS[container](part, tensors, said)


def _whole(output: Path, container: str) -> AbstractContextManager[Path]:
    return hf_folder.whole_folder(output) if container == "hf" else whole_file(output)


def _verified(part: Path, wanted: Checkpoint, original: Checkpoint, target: str, settings: Settings) -> tuple[float, float]:
    """Read the file back, compare every bit, and run both sides."""
    written = open_checkpoint(part, dialect=target, freqs=settings.freqs)
    verify.compare(written, wanted)
    return verify.loss(original), verify.loss(written)
