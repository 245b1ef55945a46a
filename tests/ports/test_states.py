"""A recurrent state: kept, donated, branched from, and carried from port to port (R13)."""

from collections.abc import Callable

import numpy as np
import pytest

import bdh_spec
from bdh_conformance import assert_agrees, expect
from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_spec import Model, StateError, model

Load = Callable[..., Model]
CASE = Case(CONFIGS["plain"], time=6, seed=1, scale=20)


def test_a_state_that_was_not_donated_stays_intact(port: str, loaded: Load) -> None:
    reader = loaded(CASE)
    _, state = reader.advance(reader.init_state(2), CASE.tokens[:, :3])
    before = reader.export_state(state).layers
    first, _ = reader.advance(state, CASE.tokens[:, 3:])
    second, _ = reader.advance(state, CASE.tokens[:, 3:])
    assert np.array_equal(first, second)
    assert all(np.array_equal(a, b) for a, b in zip(before, reader.export_state(state).layers, strict=True))


def test_two_texts_branch_from_one_state(port: str, loaded: Load) -> None:
    reader = loaded(CASE)
    _, state = reader.advance(reader.init_state(2), CASE.tokens[:, :3])
    for tail in (CASE.tokens[:, 3:], CASE.tokens[:, :0:-1][:, :3]):
        whole = np.concatenate([CASE.tokens[:, :3], tail], axis=1)
        expected = expect(
            lambda p, whole=whole: {"logits": model.forward(whole, p, CASE.config)[:, 3:]}, CASE.params, "float32"
        )
        assert_agrees(port, {"logits": reader.advance(state, tail)[0]}, expected)


def test_tokens_may_lie_backwards_in_memory(port: str, loaded: Load) -> None:
    for tokens in (CASE.tokens[:, ::-1], CASE.tokens[:1][::-1], CASE.tokens[::-1]):
        assert np.array_equal(loaded(CASE).forward(tokens), loaded(CASE).forward(tokens.copy()))


def test_a_donated_state_cannot_be_used_again(port: str, loaded: Load) -> None:
    reader = loaded(CASE)
    state = reader.init_state(2)
    reader.advance(state, CASE.tokens, donate=True)
    with pytest.raises(StateError, match="was donated"):
        reader.advance(state, CASE.tokens)
    with pytest.raises(StateError, match="was donated"):
        reader.export_state(state)


@pytest.mark.parametrize("target", ["numpy", "torch", "jax", "mlx"])
def test_r13_a_state_moves_to_another_port(port: str, loaded: Load, target: str) -> None:
    here = loaded(CASE)
    there = bdh_spec.get_backend(target).load(CASE.params, CASE.config, device="cpu")
    _, state = here.advance(here.init_state(2), CASE.tokens[:, :4])
    logits, _ = there.advance(there.import_state(here.export_state(state)), CASE.tokens[:, 4:])
    expected = expect(lambda p: {"logits": model.forward(CASE.tokens, p, CASE.config)[:, 4:]}, CASE.params, "float32")
    assert_agrees(f"{port} to {target}", {"logits": logits}, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_r13_a_state_is_float32_and_fixed_in_size(port: str, loaded: Load, claims: Callable[[str], None], dtype: str) -> None:
    claims(dtype)
    reader = loaded(CASE, dtype)
    _, state = reader.advance(reader.init_state(2), CASE.tokens)
    shape = (2, CASE.config.n_head, CASE.config.n_neurons, CASE.config.n_embd)
    for memory in reader.export_state(state).layers:
        assert memory.dtype == np.float32
        assert memory.shape == shape


def test_an_exported_state_is_a_copy(port: str, loaded: Load) -> None:
    reader = loaded(CASE)
    _, state = reader.advance(reader.init_state(2), CASE.tokens)
    exported = reader.export_state(state)
    kept = exported.layers[0].copy()
    again = reader.import_state(exported)
    reader.advance(state, CASE.tokens, donate=True)
    reader.advance(again, CASE.tokens, donate=True)
    assert np.array_equal(exported.layers[0], kept)
