"""Tokens as callers hold them: every integer type, every layout, lists."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bdh_conformance.channels.channel import Observed, scalar
from bdh_conformance.channels.loading import claims
from bdh_conformance.yardstick.cases import Case
from bdh_spec import Model
from bdh_spec.model import IGNORE
from bdh_spec.params import Array

INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", ">i2", ">i4", ">i8")


def observe_inputs(model: Model, case: Case) -> Observed:
    """The logits of one text in every form in which its tokens may be handed over; losses and decoding as well."""
    seen: Observed = {}
    for name, tokens in forms(case.tokens, case.config.vocab_size):
        seen[f"{name}.logits"] = model.forward(tokens)
        if claims(model, "advance"):
            seen[f"{name}.decode.logits"] = model.advance(model.init_state(case.batch), tokens)[0]
        if claims(model, "loss"):
            targets = np.where(case.targets == IGNORE, 0, case.targets).astype(np.asarray(tokens).dtype)
            seen[f"{name}.loss"] = scalar(model.loss(tokens, targets))
    return seen


def inputs_reference(model: Model, case: Case) -> Observed:
    """The same from whole numbers of 64 bits."""
    plain = {"logits": model.forward(case.tokens)}
    plain["decode.logits"] = model.advance(model.init_state(case.batch), case.tokens)[0]
    plain["loss"] = scalar(model.loss(case.tokens, np.where(case.targets == IGNORE, 0, case.targets)))
    names = [name for name, _ in forms(case.tokens, case.config.vocab_size)]
    return {f"{name}.{stage}": value for name in names for stage, value in plain.items()}


def forms(tokens: Array, vocab_size: int) -> Iterator[tuple[str, Array]]:
    """The same tokens (B, T) in each type that holds every id, and in each layout."""
    for name in INTEGERS:
        if np.iinfo(name).max >= vocab_size - 1:
            yield name, tokens.astype(name)
    yield "fortran", np.asfortranarray(tokens)
    yield "strided", np.repeat(np.repeat(tokens, 2, axis=0), 3, axis=1)[::2, ::3]
    yield "backwards", tokens[:, ::-1].copy()[:, ::-1]
    fixed = tokens.copy()
    fixed.flags.writeable = False
    yield "read_only", fixed
    yield "list", tokens.tolist()
