"""A checkpoint of any dialect as the specification's five weights and a configuration."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from bdh_convert import detect, tokenizer
from bdh_convert.configs import complete, is_tied, refuse_alibi
from bdh_convert.dialects import DIALECTS, GATE, Dialect, from_dialect, recognise
from bdh_convert.frequencies import deviation, is_the_table
from bdh_convert.metadata import parse_config
from bdh_convert.tensors import Contents, Tensor
from bdh_spec.config import BDHConfig
from bdh_spec.errors import ForeignTokensWarning, ParamsError
from bdh_spec.params import Params, check_params, shapes

Freqs: TypeAlias = Literal["keep", "reset"]


@dataclass(frozen=True)
class Checkpoint:
    """Five weights in canonical layout that are still in their file, and what makes a model of them."""

    path: Path
    dialect: str
    weights: Params  # of Tensor
    config: BDHConfig
    freqs: Tensor | None = None  # a frequency table that is not BDH's, kept because the user said so
    tokenizer: str | None = None  # if its tokens are no bytes: the class that transformers reads them with
    notes: tuple[str, ...] = ()  # what the user should know of how the file was read


def read(path: Path, n_layer: int | None = None) -> tuple[Params, BDHConfig]:
    """The weights and configuration of a checkpoint; ``n_layer`` where nothing written tells it."""
    checkpoint = open_checkpoint(path, n_layer=n_layer)
    for note in tokenizer.notes(checkpoint.tokenizer):
        warnings.warn(f"{path}: {note}", ForeignTokensWarning, stacklevel=2)
    return Params(*(weight.load() for weight in checkpoint.weights)), checkpoint.config


def open_checkpoint(
    path: Path,
    *,
    dialect: str | None = None,
    n_layer: int | None = None,
    dropout: float | None = None,
    freqs: Freqs | None = None,
) -> Checkpoint:
    """Understand a checkpoint without loading it; whatever makes it another model's is refused."""
    contents = with_config(detect.contents(path))
    spoken = DIALECTS[dialect] if dialect else recognise(contents.tensors, contents.container, contents.dialect)
    if spoken.name == "burn":
        refuse_alibi(contents.config)
    contents, notes = with_head(contents, spoken)
    tables, more = leftovers(contents, spoken)
    weights = from_dialect(spoken, contents.tensors)
    refuse_layers(weights)
    config, yet_more = complete(contents.config, Params(*(weight.shape for weight in weights)), n_layer, dropout)
    check_layout(weights, config)
    kept, last = _decide(tables, config, freqs)
    told = (*tokenizer.notes(contents.tokenizer), *notes, *more, *yet_more, *last)
    return Checkpoint(path, spoken.name, weights, config, kept, contents.tokenizer, told)


def with_config(contents: Contents) -> Contents:
    """What a file does not say itself stands in a config.json beside it: its configuration, and whose tokens it reads."""
    if contents.container == "hf":
        return tokenizer.with_tokenizer(contents, contents.path)
    if contents.config is not None:
        return contents
    beside = contents.path.parent / "config.json"
    config = parse_config(beside, beside.read_bytes()) if beside.is_file() else None
    return tokenizer.with_tokenizer(replace(contents, config=config), beside.parent)


def with_head(contents: Contents, dialect: Dialect) -> tuple[Contents, list[str]]:
    """transformers leaves a head out that is tied to the embedding, and ties where a configuration is silent."""
    if dialect.name != "hf":
        return contents, []
    embed, head = dialect.names.embed, dialect.names.lm_head
    tied, tensors = is_tied(contents.config), contents.tensors
    if head not in tensors and tied is not False and embed in tensors:
        note = "the head is tied to the embedding and absent: it is written out as the embedding's transpose"
        return replace(contents, tensors=tensors | {head: tensors[embed].named(head)}), [note]
    if {embed, head} <= set(tensors) and tied and not np.array_equal(tensors[head].load(), tensors[embed].load()):
        raise ParamsError(
            f"config.json ties the head to the embedding, but {head} differs from it: set tie_word_embeddings to what is right"
        )
    return contents, []


def leftovers(contents: Contents, dialect: Dialect) -> tuple[list[Tensor], list[str]]:
    """The frequency tables among the tensors that are no weights, and a word on what is left out; all else is refused."""
    rest = [tensor for name, tensor in contents.tensors.items() if name not in dialect.names]
    tables = [tensor for tensor in rest if detect.FREQS.fullmatch(tensor.name)]
    unknown = [tensor.name for tensor in rest if tensor not in tables and tensor.name != GATE]
    if unknown:
        raise ParamsError(detect.complain(unknown))
    notes = [f"{GATE} is left out: no equation uses it"] if any(tensor.name == GATE for tensor in rest) else []
    if contents.ignored:
        notes.append(f"left out, being no weights: {_some(contents.ignored)}")
    return tables, notes


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def refuse_layers(weights: Params) -> None:
    """Weights with an axis more than BDH's are one set per layer."""
    if len(weights.encoder.shape) == 4:
        raise ParamsError(
            f"encoder has shape {weights.encoder.shape}, weights per layer, which BDH has not: this is another model"
        )


def check_layout(weights: Params, config: BDHConfig) -> None:
    """Refuse shapes and dtypes that do not fit, with a word where a matrix only lies on its side."""
    for weight, shape in zip(weights, shapes(config), strict=True):
        if weight.shape != shape and weight.shape == shape[::-1] and len(shape) == 2:
            raise ParamsError(
                f"{weight.name} has shape {weight.shape}, its dialect stores {shape}: it is transposed, so mend the file"
            )
    check_params(weights, config)


def _decide(tables: list[Tensor], config: BDHConfig, freqs: Freqs | None) -> tuple[Tensor | None, list[str]]:
    foreign = [stored for stored in tables if not is_the_table(stored, config)]
    if not foreign:
        return None, []
    off = f"{foreign[0].name} differs from BDH's frequency table by up to {deviation(foreign[0], config):.3g} of a value"
    if freqs is None:
        raise ParamsError(
            f"{off}, so it was trained or belongs to another model: --freqs reset writes BDH's table, --freqs keep this one"
        )
    if freqs == "reset":
        return None, [f"{off}: BDH's table is written instead, which changes what the model computes"]
    return foreign[0].row(), [f"{off}: it is kept, and the result is not BDH"]
