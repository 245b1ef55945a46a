"""A checkpoint of any dialect as the specification's five weights and a configuration."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from bdh_convert import tokenizer
from bdh_convert.scaled import Scaled
from bdh_convert.steps import NOTHING_SAID, STEPS, Draft, Wishes, begin
from bdh_spec.config import BDHConfig
from bdh_spec.errors import ForeignTokensWarning
from bdh_spec.files import reading
from bdh_spec.params import Array, Params
from bdh_spec.registry import Freqs


@dataclass(frozen=True)
class Checkpoint:
    """Five weights in canonical layout that are still in their file, and what makes a model of them."""

    path: Path
    dialect: str
    weights: Params  # of Tensor
    config: BDHConfig
    own: Array | None = None  # the file's own frequencies (N,), if they are not BDH's: kept where ``config`` has them too
    tokenizer: str | None = None  # if its tokens are no bytes: the class that transformers reads them with
    notes: tuple[str, ...] = ()  # what the user should know of how the file was read

    @property
    def freqs(self) -> Freqs | None:
        """What becomes of the file's own frequencies, if it has any."""
        return None if self.own is None else "reset" if self.config.freqs is None else "keep"


def read(path: Path, n_layer: int | None = None, freqs: Freqs | None = None) -> tuple[Params, BDHConfig]:
    """The weights and configuration of a checkpoint; ``n_layer`` where nothing written tells it, ``freqs`` likewise.

    Weights in int8 are read as they are (R17).
    """
    checkpoint = open_checkpoint(path, Wishes(n_layer=n_layer, freqs=freqs))
    for note in tokenizer.notes(checkpoint.tokenizer):
        warnings.warn(f"{path}: {note}", ForeignTokensWarning, stacklevel=2)
    with reading(path):
        weights = (weight.load_int8() if isinstance(weight, Scaled) else weight.load() for weight in checkpoint.weights)
        return Params(*weights), checkpoint.config


def open_checkpoint(path: Path, wishes: Wishes = NOTHING_SAID) -> Checkpoint:
    """Understand a checkpoint without loading it; whatever makes it another model's is refused."""
    with reading(path):
        draft = begin(path, wishes)
        for step in STEPS:
            step.take(draft)
        return of(draft)


def of(draft: Draft) -> Checkpoint:
    """The checkpoint that every step has understood."""
    assert draft.dialect is not None
    assert draft.weights is not None
    assert draft.config is not None
    contents = draft.contents
    return Checkpoint(
        contents.path, draft.dialect.name, draft.weights, draft.config, draft.own, contents.tokenizer, tuple(draft.notes)
    )
