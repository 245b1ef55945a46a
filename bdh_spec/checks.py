"""Refusals that every port shares, made on NumPy arrays before any framework sees them."""

from __future__ import annotations

from typing import Any

import numpy as np

from bdh_spec.config import BDHConfig
from bdh_spec.errors import OptimizerError, StateError, TokensError
from bdh_spec.model import IGNORE, RecurrentState
from bdh_spec.optimizer import OptimizerState
from bdh_spec.params import Array, Params, shapes
from bdh_spec.rope import MAX_POSITION


def check_tokens(tokens: Any, config: BDHConfig) -> Array:
    """Tokens as an int64 array (B, T) with every id inside the vocabulary."""
    ids = _whole_numbers(tokens, "tokens")
    _demand_range(ids, (ids < 0) | (ids >= config.vocab_size), "token", config)
    return np.array(ids, np.int64, order="C")  # a copy: frameworks refuse negative strides, even of an axis of one


def check_targets(targets: Any, tokens: Array, config: BDHConfig) -> Array:
    """Targets as an int64 array of the tokens' shape: ids, or -100 for those that do not count, of which some must."""
    ids = check_ids_of_targets(targets, tokens, config)
    if (ids == IGNORE).all():
        raise TokensError(f"every target is {IGNORE}, which is ignored: a mean over nothing has no value")
    return ids


def check_ids_of_targets(targets: Any, tokens: Array, config: BDHConfig) -> Array:
    """The same, where none need count: in one batch of a step that has others."""
    ids = _whole_numbers(targets, "targets")
    if ids.shape != tokens.shape:
        raise TokensError(f"targets have shape {ids.shape}, tokens {tokens.shape}: give one target per token, already shifted")
    _demand_range(ids, ((ids < 0) & (ids != IGNORE)) | (ids >= config.vocab_size), "target", config)
    return np.array(ids, np.int64, order="C")  # a copy: frameworks refuse negative strides, even of an axis of one


def check_recurrent_state(state: RecurrentState, config: BDHConfig) -> RecurrentState:
    """A state whose matrices fit the model."""
    shapes = [tuple(memory.shape) for memory in state.layers]
    fit = (config.n_head, config.n_neurons, config.n_embd)
    if len(shapes) != config.n_layer or any(len(s) != 4 or s[1:] != fit or s[0] != shapes[0][0] for s in shapes):
        raise StateError(
            f"the state holds {shapes}, the model {config.n_layer} times (B, {', '.join(map(str, fit))}): it is another model's"
        )
    if not 0 <= state.position < MAX_POSITION:
        raise StateError(f"the state is at position {state.position}: positions run from 0 to 2^63 - 1")
    return state


def check_optimizer_state(state: OptimizerState, config: BDHConfig) -> OptimizerState:
    """What an optimiser remembers, in the shapes of the model's weights."""
    if isinstance(state.step, bool) or not isinstance(state.step, (int, np.integer)) or state.step < 0:
        raise OptimizerError(f"the optimiser made {state.step!r} steps: give a whole number of at least 0")
    for what, held in (("first", state.first), ("second", state.second), ("masters", state.masters)):
        for name, values, shape in zip(Params._fields, held or (), shapes(config), strict=held is not None):
            if tuple(np.shape(values)) != shape:
                raise OptimizerError(
                    f"{what}.{name} has shape {tuple(np.shape(values))}, the weight {shape}: it is another model's optimiser"
                )
            if np.asarray(values).dtype not in (np.float32, np.float64):
                raise OptimizerError(f"{what}.{name} has dtype {np.asarray(values).dtype}: give float32 or float64")
    return state


def _whole_numbers(values: Any, what: str) -> Array:
    try:
        ids = np.asarray(values)
    except ValueError:
        raise TokensError(f"{what} are rows of different lengths: give a rectangle (B, T)") from None
    if ids.ndim != 2:
        raise TokensError(f"{what} have shape {ids.shape}: give two axes (B, T), one text as [[...]]")
    if ids.size == 0:
        raise TokensError(f"{what} have shape {ids.shape}: give at least one text of at least one token")
    if ids.dtype.kind not in "iu":
        raise TokensError(f"{what} are {ids.dtype}: give whole numbers, such as int64")
    return ids


def _demand_range(ids: Array, outside: Array, what: str, config: BDHConfig) -> None:
    if outside.any():
        b, t = np.argwhere(outside)[0]
        ids_run = f"ids run from 0 to {config.vocab_size - 1}"
        raise TokensError(f"{what} {ids[b, t]} at [{b}, {t}] is outside the vocabulary of {config.vocab_size}: {ids_run}")
