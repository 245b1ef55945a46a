"""The specification as a port of itself: it reads long texts in pieces, and writes a donated state in place."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from bdh_spec import BDHConfig, Frequencies, Model, get_backend, init, model, numpy_backend
from bdh_spec.rope import PHASES, Phase

CONFIG = BDHConfig(2, 6, 0.0, 2, 8, 11)
OWN = Frequencies(np.random.default_rng(0).normal(size=CONFIG.n_neurons).astype(np.float32))  # pairs that differ


def load(config: BDHConfig = CONFIG, phase: Phase = "exact", dtype: str = "float64") -> Model:
    params = type(weights := init(config, np.random.default_rng(0)))(*(10 * weight for weight in weights))
    return get_backend("numpy").load(params, config, dtype=dtype, phase=phase)


def text(B: int, T: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 11, (B, T))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which the smallest models are cut everywhere."""
    for name, size in {"CHUNK": 8, "WHOLE": 10, "ROWS": 5}.items():
        monkeypatch.setattr(numpy_backend, name, size)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, freqs=OWN)], ids=["table", "pairs that differ"])
@pytest.mark.parametrize("T", [1, 8, 10, 11, 16, 37])
def test_texts_of_any_length_have_the_logits_of_the_equations(T: int, config: BDHConfig, phase: Phase) -> None:
    port, tokens = load(config, phase), text(2, T)
    expected = model.forward(tokens, port.params(), config, phase=phase)
    np.testing.assert_allclose(port.forward(tokens), expected, rtol=0, atol=1e-11 * float(np.abs(expected).max()))


@pytest.mark.usefixtures("small_pieces")
def test_r13_states_are_those_of_the_equations() -> None:
    port, tokens = load(), text(2, 37)
    _, state = port.advance(port.init_state(2), tokens, donate=True)
    _, expected = model.advance(model.init_state(2, CONFIG, np.float64), tokens, port.params(), CONFIG)
    for memory, other in zip(port.export_state(state).layers, expected.layers, strict=True):
        np.testing.assert_allclose(memory, other, rtol=0, atol=1e-11 * float(np.abs(other).max()))


def test_r13_a_donated_state_is_written_in_place_and_another_is_not() -> None:
    port = load()
    _, state = port.advance(port.init_state(2), text(2, 3))
    before = port.export_state(state)
    _, later = port.advance(state, text(2, 2))
    assert all(np.array_equal(a, b) for a, b in zip(before.layers, state.native.layers, strict=True))
    _, last = port.advance(later, text(2, 1), donate=True)
    assert all(a is b for a, b in zip(later.native.layers, last.native.layers, strict=True))


def peak(work: Callable[[], object]) -> int:
    """Bytes that are held at once beyond those before."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_long_text_takes_the_memory_of_a_piece_and_of_its_logits() -> None:
    config = BDHConfig(2, 8, 0.0, 2, 128, 11)
    port = load(config, dtype="float32")
    held = {T: peak(lambda T=T: port.forward(text(1, T))) for T in (2048, 4096)}
    assert held[4096] < 1.2 * held[2048] + 8 * 4096 * 11
    assert held[2048] < peak(lambda: model.forward(text(1, 2048), port.params(), config)) / 8


def test_r13_a_token_is_read_without_a_second_state() -> None:
    config = BDHConfig(2, 64, 0.0, 2, 128, 11)
    port = load(config, dtype="float32")
    state = port.init_state()
    size = sum(memory.nbytes for memory in state.native.layers)
    assert peak(lambda: port.advance(state, text(1, 1), donate=True)) < size / 4
