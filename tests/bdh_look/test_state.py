"""What a state holds: rank, course, planted facts, and two compared."""

import numpy as np
import pytest

import bdh_spec
from bdh_look import LookError, state
from bdh_spec import BDHConfig, Model, RecurrentState

CONFIG = BDHConfig(n_layer=2, n_embd=12, n_head=2, mlp_internal_dim_multiplier=4)


@pytest.fixture(scope="module")
def model() -> Model:
    return bdh_spec.get_backend("numpy").load(bdh_spec.init(CONFIG, np.random.default_rng(5)), CONFIG)


def test_effective_rank_counts_equal_directions() -> None:
    assert state.effective_rank(np.zeros((3, 4))) == 0
    assert state.effective_rank(np.eye(7)[:, :4]) == pytest.approx(4)
    assert 1 < state.effective_rank(np.diag([5.0, 1.0])) < 2


def test_the_course_of_a_state_is_that_of_reading_so_far(model: Model) -> None:
    text = bytes(range(97, 123)) * 20
    rows = state.course(model, text, [300, 8])
    assert [r["bytes"] for r in rows] == [8, 300]
    for r in rows:
        _, after = model.advance(model.init_state(), np.frombuffer(text[: r["bytes"]], np.uint8)[None])
        for i, layer in enumerate(model.export_state(after).layers):
            norms = np.sqrt((layer[0].astype(float) ** 2).sum((1, 2)))
            # float32 sums in chunks of other sizes: as many roundings as bytes
            assert r["norm"][i] == pytest.approx(norms.tolist(), rel=r["bytes"] * 2.0**-24)
    with pytest.raises(LookError, match="place 521 of a text of 520"):
        state.course(model, text, [521])


class Remembering(Model):
    """A model that expects again, letter by letter, what stood between the first two quotes, for ``span`` bytes."""

    def __init__(self, span: int) -> None:
        super().__init__(CONFIG, device="cpu", dtype="float64", phase="exact")
        self.span = span

    def _init_state(self, batch: int) -> bytes:
        return b""

    def _advance(self, native: bytes, position: int, tokens: np.ndarray, donate: bool) -> tuple[np.ndarray, bytes]:
        logits = np.zeros((1, tokens.shape[1], 256))
        for t, token in enumerate(tokens[0]):
            native += bytes([token])
            word, rest = native.partition(b'"')[2].partition(b'"')[::2]
            if b'"' in rest and len(rest) < self.span and len(typed := rest.rpartition(b'"')[2]) < len(word):
                logits[0, t, word[len(typed)]] = 10
        return logits, native


@pytest.mark.parametrize("known", [False, True])
def test_a_planted_fact_is_readable_as_long_as_it_is_remembered(known: bool) -> None:
    filler = b"other words stand between here and there " * 10
    rows = state.recall(Remembering(100), filler, [0, 32, 256], np.random.default_rng(1), trials=8, known=known)
    assert [r.readable for r in rows] == [True, True, False]
    assert rows[0].gain > 5
    assert rows[-1].gain == 0


def test_a_fresh_model_recalls_nothing(model: Model) -> None:
    rows = state.recall(model, b"abc def " * 40, [0, 64], np.random.default_rng(1), trials=6)
    assert all(abs(r.gain) < 0.5 for r in rows)
    with pytest.raises(LookError, match="4 bytes of filler"):
        state.recall(model, b"abcd", [64], np.random.default_rng(1))


def test_two_states_are_compared_layer_by_layer() -> None:
    rng = np.random.default_rng(0)
    one = RecurrentState(3, tuple(rng.random((1, 2, 24, 12)) for _ in range(2)))
    other = RecurrentState(4, (one.layers[0], one.layers[1].copy()))
    other.layers[1][0, 1, 2, 3] += 7
    same, changed = state.difference(one, other)
    assert same["norms"][2] == 0
    assert same["cosine"] == pytest.approx(1)
    assert changed["norms"][2] == pytest.approx(7)
    assert changed["largest"][0] == {
        "head": 1,
        "neuron": 2,
        "feature": 3,
        "from": one.layers[1][0, 1, 2, 3],
        "to": other.layers[1][0, 1, 2, 3],
    }
    with pytest.raises(LookError, match="compare as many texts with as many"):
        state.difference(one, RecurrentState(3, tuple(np.zeros((2, 2, 24, 12)) for _ in range(2))))
