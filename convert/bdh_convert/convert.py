"""From one dialect to another: read lazily, write whole, read back, and only then give the file its name."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from bdh_convert import hf_folder, verify
from bdh_convert.checkpoint import Checkpoint, open_checkpoint
from bdh_convert.containers import WRITTEN, Container, Write
from bdh_convert.dialects import DIALECTS, TARGETS, Dialect, to_dialect
from bdh_convert.metadata import about
from bdh_convert.raw import chunks
from bdh_convert.scaled import in_int8
from bdh_convert.steps import NOTHING_SAID, Wishes
from bdh_convert.tensors import Tensor
from bdh_convert.watch import Watch, ignore, watched
from bdh_spec.dtypes import TABLE, dtype_name
from bdh_spec.errors import CheckpointError, ParamsError
from bdh_spec.files import sync
from bdh_spec.params import Array, Params

DTYPES = {kind.name: kind.numpy for kind in TABLE if kind.name != "float64"}  # that files are written in


@dataclass(frozen=True)
class Settings:
    """What a user can decide about a conversion."""

    wishes: Wishes = NOTHING_SAID  # of the source
    dtype: str | None = None
    force: bool = False
    verify: bool = True
    allow_nonfinite: bool = False
    max_shard_size: int | None = None  # bytes of a file in a folder of transformers; None: as many as it would write


@dataclass(frozen=True)
class Outcome:
    """What a conversion did."""

    path: Path
    checkpoint: Checkpoint  # what was written, as read from the source
    losses: tuple[float, float] | None  # of the source and of the result, each by its own frequencies; None if not verified
    nbytes: tuple[int, int]  # of the weights in the source and in the result
    rounding: dict[str, float] | None = None  # of weights that became int8, how far the worst column is off; if verified


def convert(source: Path, target: str, output: Path | None, settings: Settings, watch: Watch = ignore) -> Outcome:
    """Write a checkpoint in the target dialect, whole or not at all."""
    dialect = DIALECTS[target]
    original = open_checkpoint(source, settings.wishes)
    _refuse_int8(source, original, dialect, settings)
    if original.config.freqs and not (dialect.freqs or dialect.own_freqs):
        raise CheckpointError(
            f"{target} files store no frequencies, so --freqs keep cannot: use --freqs reset, which writes BDH's, or convert to"
            f" {', '.join(name for name in TARGETS if DIALECTS[name].freqs or DIALECTS[name].own_freqs)}"
        )
    output = output or default_output(source, original.dialect, dialect)
    container = container_of(output, dialect)
    check_output(output, container, settings.force)
    write = _writer(container, settings)
    total = _work(original, _prepared(original, dialect, settings), settings)
    original = watched(original, total, watch)
    wanted = _prepared(original, dialect, settings)
    tensors = to_dialect(dialect, wanted.weights, wanted.config, wanted.config.freqs)
    with container.whole(output, replace=settings.force) as part:
        write(part, tensors, about(wanted.config, target, wanted.tokenizer))
        _settle(part)
        losses = _verified(part, wanted, original, target, settings, total, watch) if settings.verify else None
        rounding = verify.rounding(original, wanted) if losses and dialect.is_int8 else None
    nbytes = (_nbytes(original), _nbytes(wanted))
    return Outcome(output, _said(wanted, dialect), losses, nbytes, rounding)


def _refuse_int8(source: Path, original: Checkpoint, dialect: Dialect, settings: Settings) -> None:
    """What cannot be, or means nothing, where weights become int8."""
    if not dialect.is_int8:
        return
    if original.dialect == dialect.name:
        raise CheckpointError(
            f"{source} is in int8 already, and there is nothing to round: copy it, or convert it to a dialect of floating point"
            " numbers"
        )
    if settings.dtype:
        raise CheckpointError("--dtype is about floating point numbers, and int8 is none: leave it out")
    if settings.allow_nonfinite:
        raise CheckpointError("--allow-nonfinite cannot be: int8 has neither NaN nor infinity, so leave it out")


def _said(wanted: Checkpoint, dialect: Dialect) -> Checkpoint:
    """A checkpoint with a word on what was lost before."""
    if wanted.dialect != "int8" or dialect.is_int8:
        return wanted
    note = "its weights were rounded to int8: what is written are the rounded ones, and nothing brings the others back"
    return replace(wanted, notes=(*wanted.notes, note))


def _nbytes(checkpoint: Checkpoint) -> int:
    return sum(weight.nbytes for weight in checkpoint.weights)


def _writer(container: Container, settings: Settings) -> Write:
    """How to write, in files no larger than the user wants."""
    if settings.max_shard_size is None:
        return container.writer
    if container.name != "hf":
        raise CheckpointError("--max-shard-size is about folders of transformers: convert to hf, or leave it out")
    return partial(hf_folder.write, max_shard_size=settings.max_shard_size)


def _work(original: Checkpoint, wanted: Checkpoint, settings: Settings) -> int:
    """How many bytes of weights will be read: to write them, and to compare and run what was written."""
    read, written = _nbytes(original), _nbytes(wanted)
    return 2 * read + written + verify.traffic(original) + verify.traffic(wanted) if settings.verify else read


def _settle(part: Path) -> None:
    """Wait for the disk here, while there is work left to show, and not when all of it seems done."""
    for file in part.iterdir() if part.is_dir() else (part,):
        sync(file)


def default_output(source: Path, spoken: str, target: Dialect) -> Path:
    """A name beside the input: checkpoint.safetensors becomes checkpoint.mlx.safetensors."""
    source = source if source.name else source.resolve()
    stem = source.name if source.is_dir() else source.stem
    return source.with_name(f"{stem.removesuffix('.' + spoken)}.{target.name}{WRITTEN[target.containers[0]].suffixes[0]}")


def container_of(output: Path, dialect: Dialect) -> Container:
    """The container that a file's name asks for."""
    possible = [WRITTEN[name] for name in dialect.containers]
    found = next((row for row in possible if output.suffix.lower() in row.suffixes or "" in row.suffixes), None)
    if found is None:
        suffixes = " or ".join(suffix for row in possible for suffix in row.suffixes)
        raise CheckpointError(f"{output} is no name for a {dialect.name} file: end it in {suffixes}")
    return found


def check_output(output: Path, container: Container, force: bool) -> None:
    """Refuse to write over what is there, or to where nothing can be."""
    if not output.parent.is_dir():
        raise CheckpointError(f"{output.parent} is no folder, so {output.name} cannot be written there: create it first")
    if not os.path.lexists(output):
        return
    if output.exists() and output.is_dir() != (container.name == "hf"):
        kind = "a folder" if output.is_dir() else "a file"
        raise CheckpointError(f"{output} is {kind}: choose another name with -o")
    if not force:
        kind = "exists" if output.exists() else "is a link to nothing"
        raise CheckpointError(f"{output} {kind}: choose another name with -o, or --force to replace it")


def _prepared(original: Checkpoint, dialect: Dialect, settings: Settings) -> Checkpoint:
    """The checkpoint with every weight in the dtype asked for, or in int8, each checked when it is read."""
    if dialect.is_int8:
        return replace(original, weights=Params(*map(in_int8, original.weights)))
    weights = original.weights if settings.allow_nonfinite else map(_finite, original.weights)
    dtype = DTYPES[dtype_name(settings.dtype)] if settings.dtype else None
    return replace(original, weights=Params(*(weight.cast(dtype or weight.dtype) for weight in weights)))


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


def _verified(
    part: Path, wanted: Checkpoint, original: Checkpoint, target: str, settings: Settings, total: int, watch: Watch
) -> tuple[float, float]:
    """Read the file back, compare every bit, and run both sides."""
    written = watched(open_checkpoint(part, Wishes(dialect=target, freqs=settings.wishes.freqs)), total, watch)
    verify.compare(written, wanted)
    return verify.loss(original, original.own), verify.loss(written)
