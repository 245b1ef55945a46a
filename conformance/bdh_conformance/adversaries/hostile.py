"""Hostile ports: no slip of an equation, but answers that a careless comparison lets through. All of them must fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bdh_conformance.adversaries.narrow import (
    DrawsNarrowly,
    KeepsNoMasters,
    LosesMasters,
    NarrowBackend,
    RoundsMoments,
    RoundsState,
)
from bdh_spec import Backend, Batch, Model, Params, RecurrentState
from bdh_spec.config import BDHConfig
from bdh_spec.numpy_backend import NumpyBackend, NumpyModel
from bdh_spec.params import Array
from bdh_spec.rope import Phase

Spoil = Callable[[Array], Array]

SEEN_BY = ("logits", "traces", "gradients", "states", "decode")  # the channels that refuse spoiled arrays


class SpoiledModel(NumpyModel):
    """The specification, of which every array passes through ``spoil`` on its way out."""

    def __init__(self, spoil: Spoil, params: Params, config: BDHConfig, *, device: str, dtype: str, phase: Phase) -> None:
        super().__init__(params, config, device=device, dtype=dtype, phase=phase)
        self.spoil = spoil

    def _forward(self, tokens: Array) -> Array:
        return self.spoil(super()._forward(tokens))

    def _advance(self, native: Any, position: int, tokens: Array, donate: bool) -> tuple[Array, Any]:
        logits, native = super()._advance(native, position, tokens, donate)
        return self.spoil(logits), native

    def _gradients(self, tokens: Array, targets: Array) -> tuple[float, Params]:
        loss, slopes = super()._gradients(tokens, targets)
        return loss, Params(*(self.spoil(slope) for slope in slopes))

    def _trace(self, tokens: Array) -> dict[str, Array]:
        return {name: self.spoil(stage) for name, stage in super()._trace(tokens).items()}

    def _export_state(self, native: Any) -> tuple[Array, ...]:
        return tuple(self.spoil(memory) for memory in super()._export_state(native))


class WritesIntoTokens(NumpyModel):
    """Pads the caller's tokens away, in a verb of its own: those of the base class hand on a copy."""

    def forward(self, tokens: Any) -> Array:
        logits = super().forward(tokens)
        tokens[:, -1] = 0
        return logits


class WritesIntoWeights(NumpyModel):
    """Works on the caller's own weights, and rounds them."""

    def __init__(self, params: Params, config: BDHConfig, *, device: str, dtype: str, phase: Phase) -> None:
        super().__init__(params, config, device=device, dtype=dtype, phase=phase)
        for weight in params:
            weight[...] = weight.astype(np.float16)


class WritesIntoState(NumpyModel):
    """Copies an imported state, and still takes the caller's arrays for memory of its own once the state is given away."""

    given: tuple[Array, ...] = ()

    def _import_state(self, state: RecurrentState) -> RecurrentState:
        self.given = state.layers
        return super()._import_state(state)

    def _advance(self, native: Any, position: int, tokens: Array, donate: bool) -> tuple[Array, Any]:
        logits, after = super()._advance(native, position, tokens, donate)
        for memory, written in zip(self.given if donate else (), after.layers, strict=False):
            memory[...] = written
        return logits, after


class TrainsFrequencies(NumpyModel):
    """Moves something that is none of the five weights: its positions stretch with every step."""

    stretch = 1

    def _train_step(self, native: Any, batches: list[Batch], rate: float) -> float:
        self.stretch += 1
        return super()._train_step(native, batches, rate)

    def _forward(self, tokens: Array) -> Array:
        spaced = np.zeros((tokens.shape[0], tokens.shape[1] * self.stretch), tokens.dtype)
        spaced[:, :: self.stretch] = tokens
        return super()._forward(spaced)[:, :: self.stretch]


class TracesNothing(NumpyModel):
    """Has no stage to compare."""

    def _trace(self, tokens: Array) -> dict[str, Array]:
        return {}


class Fails(NumpyModel):
    """Raises an error of its framework."""

    def _forward(self, tokens: Array) -> Array:
        raise RuntimeError("CUDA error: device-side assert triggered")


@dataclass(frozen=True)
class Hostile:
    """A port to be refused, and what is wrong with it."""

    name: str
    says: str
    load: Callable[..., Model]
    channels: tuple[str, ...]  # each of which refuses it
    base: type[Backend] = NumpyBackend

    def backend(self) -> Backend:
        """The port."""
        return type(self.name, (self.base,), {"name": self.name, "_load": staticmethod(self.load)})()


def spoiled(name: str, says: str, make: Callable[[], Spoil], *channels: str) -> Hostile:
    """A port of which each model spoils its answers in a way of its own."""
    return Hostile(name, says, lambda *args, **kwargs: SpoiledModel(make(), *args, **kwargs), channels or SEEN_BY)


def one_bad(value: float) -> Callable[[Array], Array]:
    """Replace the last value."""

    def spoil(answer: Array) -> Array:
        changed = answer.copy()
        changed.flat[-1] = value
        return changed

    return spoil


def shared_buffers() -> Spoil:
    """One buffer for each shape, which the next answer overwrites."""
    buffers: dict[tuple[int, ...], Array] = {}

    def spoil(answer: Array) -> Array:
        buffer = buffers.setdefault(answer.shape, np.empty_like(answer))
        buffer[...] = answer
        return buffer

    return spoil


def previous_answers() -> Spoil:
    """The answer to the question before, if it had this shape."""
    last: dict[tuple[int, ...], Array] = {}

    def spoil(answer: Array) -> Array:
        before = last.get(answer.shape, answer)
        last[answer.shape] = answer
        return before

    return spoil


ALL = (
    spoiled("zeros", "answers zeros", lambda: np.zeros_like),
    spoiled("ones", "answers ones", lambda: np.ones_like),
    spoiled("nan", "answers NaN", lambda: lambda a: np.full_like(a, np.nan)),
    spoiled("one_nan", "answers one NaN", lambda: one_bad(np.nan)),
    spoiled("one_infinity", "answers one infinity", lambda: one_bad(np.inf)),
    spoiled("one_zero", "answers one zero", lambda: one_bad(0.0)),
    spoiled("float16", "answers in float16", lambda: lambda a: a.astype(np.float16)),
    spoiled("integers", "answers in whole numbers", lambda: lambda a: a.astype(np.int64)),
    spoiled("complex", "answers in complex numbers", lambda: lambda a: a.astype(np.complex128)),
    spoiled("objects", "answers in Python objects", lambda: lambda a: a.astype(object)),
    spoiled("lists", "answers lists", lambda: lambda a: a.tolist()),
    spoiled("axes_swapped", "answers with its last two axes swapped", lambda: lambda a: a.swapaxes(-1, -2)),
    spoiled("axis_added", "answers with an axis too many, which would broadcast", lambda: lambda a: a[None]),
    spoiled("axes_lost", "answers a single number, which would broadcast", lambda: lambda a: a.ravel()[:1]),
    spoiled("last_dropped", "answers one row too few", lambda: lambda a: a[:, :-1]),
    spoiled("batch_reversed", "answers for the texts in reverse order", lambda: lambda a: a[::-1]),
    spoiled(
        "buffers_shared",
        "answers in a buffer that the next answer overwrites",
        shared_buffers,
        "determinism",
        "traces",
        "gradients",
    ),
    spoiled("previous_answer", "answers the question before", previous_answers, "determinism", "batch"),
    Hostile("tokens_overwritten", "writes into the caller's tokens", WritesIntoTokens, ("mutation",)),
    Hostile("weights_overwritten", "writes into the caller's weights", WritesIntoWeights, ("mutation",)),
    Hostile("state_overwritten", "writes into the arrays a state was imported from", WritesIntoState, ("mutation",)),
    Hostile("frequencies_trained", "trains something beside the five weights", TrainsFrequencies, ("training",)),
    Hostile("masters_missing", "steps from the rounded weights", KeepsNoMasters, ("masters",), NarrowBackend),
    Hostile("masters_lost", "exports rounded weights", LosesMasters, ("masters", "resumption"), NarrowBackend),
    Hostile("moments_rounded", "keeps its moments in the weights' dtype", RoundsMoments, ("masters",), NarrowBackend),
    Hostile("state_rounded", "keeps its state in the weights' dtype", RoundsState, ("states", "decode"), NarrowBackend),
    Hostile("draws_rounded", "adds probabilities up in the weights' dtype", DrawsNarrowly, ("odds",), NarrowBackend),
    Hostile("nothing_traced", "traces nothing", TracesNothing, ("traces",)),
    Hostile("raises", "raises the framework's own error", Fails, ("logits",)),
)
HOSTILE = {hostile.name: hostile for hostile in ALL}
