"""The same mistake gets the same error and the same sentence on every port, before any work."""

from collections.abc import Callable

import numpy as np
import pytest

import bdh_spec
from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_spec import BDHError, CapabilityError, Model, ParamsError, RecurrentState, StateError, TokensError, model

CASE = Case(CONFIGS["plain"], seed=1)
GOOD = CASE.tokens
V = CASE.config.vocab_size


def with_one(array: np.ndarray, value: int) -> np.ndarray:
    changed = array.copy()
    changed[1, 2] = value
    return changed


def other_state() -> RecurrentState:
    return model.init_state(2, CONFIGS["three_heads"])


Mistake = Callable[[Model], object]
MISTAKES: dict[str, tuple[Mistake, type[BDHError], str]] = {
    "id too large": (
        lambda m: m.forward(with_one(GOOD, V)),
        TokensError,
        f"token {V} at [1, 2] is outside the vocabulary of {V}: ids run from 0 to {V - 1}",
    ),
    "id negative": (
        lambda m: m.advance(m.init_state(2), with_one(GOOD, -1)),
        TokensError,
        f"token -1 at [1, 2] is outside the vocabulary of {V}: ids run from 0 to {V - 1}",
    ),
    "target outside": (
        lambda m: m.loss(GOOD, with_one(GOOD, V)),
        TokensError,
        f"target {V} at [1, 2] is outside the vocabulary of {V}: ids run from 0 to {V - 1}",
    ),
    "no tokens": (
        lambda m: m.forward(np.zeros((2, 0), np.int64)),
        TokensError,
        "tokens have shape (2, 0): give at least one text of at least one token",
    ),
    "floats": (lambda m: m.trace(GOOD * 1.0), TokensError, "tokens are float64: give whole numbers, such as int64"),
    "booleans": (lambda m: m.forward(GOOD > 0), TokensError, "tokens are bool: give whole numbers, such as int64"),
    "one axis": (
        lambda m: m.forward(GOOD[0]),
        TokensError,
        "tokens have shape (5,): give two axes (B, T), one text as [[...]]",
    ),
    "ragged": (
        lambda m: m.forward([[1, 2], [3]]),
        TokensError,
        "tokens are rows of different lengths: give a rectangle (B, T)",
    ),
    "targets of another shape": (
        lambda m: m.gradients(GOOD, GOOD[:, 1:]),
        TokensError,
        "targets have shape (2, 4), tokens (2, 5): give one target per token, already shifted",
    ),
    "nothing counts": (
        lambda m: m.loss(GOOD, np.full_like(GOOD, -100)),
        TokensError,
        "every target is -100, which is ignored: a mean over nothing has no value",
    ),
    "empty prompt": (lambda m: m.generate("", 3), TokensError, "the prompt is empty: a text begins with at least one byte"),
    "state of another batch": (
        lambda m: m.advance(m.init_state(3), GOOD),
        StateError,
        "tokens of 2 texts, a state of 3: they must be the same texts",
    ),
    "lengths of another shape": (
        lambda m: m.forward_padded(GOOD, [5]),
        TokensError,
        "lengths have shape (1,), tokens (2, 5): give one length per text",
    ),
    "lengths of floats": (
        lambda m: m.forward_padded(GOOD, [5.0, 5.0]),
        TokensError,
        "lengths are float64: give whole numbers, such as int64",
    ),
    "length of nothing": (
        lambda m: m.forward_padded(GOOD, [5, 0]),
        TokensError,
        "length 0 of text 1 does not fit its row of 5 tokens: lengths run from 1 to 5",
    ),
    "length beyond its row": (
        lambda m: m.forward_padded(GOOD, [6, 5]),
        TokensError,
        "length 6 of text 0 does not fit its row of 5 tokens: lengths run from 1 to 5",
    ),
    "padding outside": (
        lambda m: m.forward_padded(with_one(GOOD, V), [5, 1]),
        TokensError,
        f"token {V} at [1, 2] is outside the vocabulary of {V}: ids run from 0 to {V - 1}",
    ),
    "state of no texts": (lambda m: m.init_state(0), StateError, "a state of 0 texts: ask for 1 or more"),
    "exported state of another model": (
        lambda m: m.import_state(other_state()),
        StateError,
        "the state holds [(2, 3, 18, 8), (2, 3, 18, 8), (2, 3, 18, 8)], the model 2 times (B, 2, 16, 8): it is another model's",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_clear_sentence(loaded: Callable[..., Model], mistake: str) -> None:
    make, error, sentence = MISTAKES[mistake]
    with pytest.raises(error) as raised:
        make(loaded(CASE))
    assert str(raised.value) == sentence


def test_a_state_of_another_loaded_model_is_refused(port: str, loaded: Callable[..., Model]) -> None:
    other = loaded(Case(CONFIGS["plain"], seed=2))
    with pytest.raises(StateError, match="belongs to another model: carry it over with export_state"):
        loaded(CASE).advance(other.init_state(2), GOOD)


def test_weights_that_do_not_fit_are_refused(port: str) -> None:
    backend = bdh_spec.get_backend(port)
    turned = CASE.params._replace(lm_head=CASE.params.lm_head.T)
    with pytest.raises(
        ParamsError, match=r"lm_head has shape \(11, 8\), config asks for \(8, 11\): check vocab_size and n_embd"
    ):
        backend.load(turned, CASE.config)
    with pytest.raises(ParamsError, match="embed has dtype int64: weights are floating point numbers"):
        backend.load(CASE.params._replace(embed=CASE.params.embed.astype(np.int64)), CASE.config)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"dtype": "int8"}, "no dtype 'int8'"),
        ({"device": "abacus"}, "no device 'abacus'"),
        ({"phase": "half"}, "no phase 'half'"),
    ],
    ids=["dtype", "device", "phase"],
)
def test_what_a_port_does_not_have_is_refused(port: str, asked: dict, sentence: str) -> None:
    with pytest.raises(CapabilityError, match=sentence):
        bdh_spec.get_backend(port).load(CASE.params, CASE.config, **asked)
