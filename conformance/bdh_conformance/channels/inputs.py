"""Tokens as callers hold them: every integer type, every layout, lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from bdh_conformance.channels.channel import Observed, scalar
from bdh_conformance.channels.loading import claims
from bdh_conformance.yardstick.cases import Case
from bdh_spec import Model
from bdh_spec.model import IGNORE
from bdh_spec.params import Array

INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", ">i2", ">i4", ">i8", ">u2", ">u4", ">u8")


def observe_inputs(model: Model, case: Case) -> Observed:
    """What a model says of one text in every form in which its tokens may be handed over, and of states likewise."""
    seen: Observed = {}
    for name, tokens in forms(case.tokens, case.config.vocab_size):
        seen |= {f"{name}.{key}": value for key, value in said(model, case, tokens, fitting(case, tokens)).items()}
    same = np.broadcast_to(case.tokens[:1], case.tokens.shape)  # one text for all, without a copy
    seen |= {f"broadcast.{key}": value for key, value in said(model, case, same, fitting(case, same)).items()}
    return seen | (states(model, case) if claims(model, "advance", "state") else {})


def said(model: Model, case: Case, tokens: Any, targets: Array) -> Observed:
    """Everything that takes tokens."""
    seen = {"logits": model.forward(tokens)}
    if claims(model, "advance"):
        seen["decode.logits"] = model.advance(model.init_state(case.batch), tokens)[0]
    if claims(model, "loss"):
        seen["loss"] = scalar(model.loss(tokens, targets))
    if claims(model, "gradients"):
        seen["gradients.lm_head"] = model.gradients(tokens, targets)[1].lm_head
    if claims(model, "trace"):
        seen["trace.logits"] = model.trace(tokens)["logits"]
    if claims(model, "padded"):
        seen["padded.logits"] = model.forward_padded(tokens, np.full(case.batch, case.time, np.int32))
    return seen


def fitting(case: Case, tokens: Any) -> Array:
    """Targets in the type of the tokens; one is ignored where the type knows what is less than zero."""
    kind = np.asarray(tokens).dtype
    signed = case.targets if kind.kind == "i" else np.where(case.targets == IGNORE, 0, case.targets)
    return signed.astype(kind)


def states(model: Model, case: Case) -> Observed:
    """What a state says that was handed over in other forms of the same numbers."""
    exported = model.export_state(model.advance(model.init_state(case.batch), case.tokens)[1])
    seen: Observed = {}
    for name, change in STATE_FORMS.items():
        state = model.import_state(replace(exported, layers=tuple(map(change, exported.layers))))
        seen[f"state.{name}.logits"] = model.advance(state, case.tokens)[0]
    return seen


def inputs_reference(model: Model, case: Case) -> Observed:
    """The same from whole numbers of 64 bits, and from a state that was handed over nowhere."""
    seen: Observed = {}
    kinds = {name: np.asarray(tokens).dtype.kind for name, tokens in forms(case.tokens, case.config.vocab_size)}
    by_kind = {kind: said(model, case, case.tokens, fitting(case, case.tokens.astype(f"{kind}8"))) for kind in "iu"}
    for name, kind in kinds.items():
        seen |= {f"{name}.{key}": value for key, value in by_kind[kind].items()}
    same = np.repeat(case.tokens[:1], case.batch, axis=0)
    seen |= {f"broadcast.{key}": value for key, value in said(model, case, same, fitting(case, same)).items()}
    logits = model.advance(model.advance(model.init_state(case.batch), case.tokens)[1], case.tokens)[0]
    return seen | {f"state.{name}.logits": logits for name in STATE_FORMS}


def read_only(values: Array) -> Array:
    """A copy that cannot be written."""
    fixed = values.copy()
    fixed.flags.writeable = False
    return fixed


def wider(values: Array) -> Array:
    """The same numbers in float64."""
    return values.astype(np.float64)


def other_endian(values: Array) -> Array:
    """The same numbers with their bytes the other way round."""
    return values.astype(values.dtype.newbyteorder())


STATE_FORMS: dict[str, Callable[[Array], Array]] = {
    "fortran": np.asfortranarray,
    "read_only": read_only,
    "float64": wider,
    "other_endian": other_endian,
}


def forms(tokens: Array, vocab_size: int) -> Iterator[tuple[str, Any]]:
    """The same tokens (B, T) in each type that holds every id, and in each layout."""
    for name in INTEGERS:
        if np.iinfo(name).max >= vocab_size - 1:
            yield name, tokens.astype(name)
    yield "fortran", np.asfortranarray(tokens)
    yield "strided", np.repeat(np.repeat(tokens, 2, axis=0), 3, axis=1)[::2, ::3]
    yield "backwards", tokens[:, ::-1].copy()[:, ::-1]
    yield "read_only", read_only(tokens)
    yield "list", tokens.tolist()
