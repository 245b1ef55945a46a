"""Exact phases without 64-bit integers."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bdh_spec.rope
from bdh_jax import rope
from bdh_spec.rope import PHASES, frequencies

N, T = 16, 4
word = st.integers(0, 2**32 - 1)
edges = st.sampled_from([0, 1, 2**16, 2**24 + 1, 2**32 - 2, 2**32 - 1, 2**32, 2**40, 2**53 + 1, 2**63 - T])
near_ties = st.builds(  # 25 bits of which the last is set, and one more or less far below
    lambda odd, shift, nudge: ((2 * odd + 1) << shift) + nudge,
    st.integers(2**23, 2**24 - 1),
    st.integers(8, 38),
    st.integers(-1, 1),
)
position = edges | st.integers(0, 2**63 - T)

TABLES = {
    "published": frequencies(N),
    "own": np.where(np.arange(N) % 3 == 0, -1.7, 1) * frequencies(N) + np.float32(1e-3) * np.arange(N, dtype=np.float32),
}


@partial(jax.jit, static_argnums=(1, 2, 3))
def rotation(start, table, dtype, phase):
    return rope.rotation(start, T, TABLES[table].astype(np.float32), dtype, phase)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("phase", PHASES)
@settings(deadline=None, max_examples=200)
@given(start=position)
def test_r4_rotations_agree_in_float64_at_every_position(table, phase, start):
    with jax.enable_x64(True):
        actual = rotation(rope.words(start), table, jnp.float64, phase)
    expected = bdh_spec.rope.rotation(start, T, TABLES[table].astype(np.float32), np.float64, phase)
    for mine, reference in zip(actual, expected, strict=True):
        np.testing.assert_allclose(mine, reference, rtol=0, atol=4e-15)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("phase", PHASES)
@settings(deadline=None, max_examples=200)
@given(start=position)
def test_r4_rotations_agree_in_float32_at_every_position(table, phase, start):
    actual = rotation(rope.words(start), table, jnp.float32, phase)
    expected = bdh_spec.rope.rotation(start, T, TABLES[table].astype(np.float32), np.float64, phase)
    for mine, reference in zip(actual, expected, strict=True):
        np.testing.assert_allclose(mine, reference, rtol=0, atol=4e-7)  # half a turn rounds by 2 pi 2^-25


@settings(deadline=None, max_examples=300)
@given(a=word, b=word)
def test_the_product_of_two_words_is_exact(a, b):
    high, low = rope.full_product(jnp.uint32(a), jnp.uint32(b))
    assert int(high) << 32 | int(low) == a * b


@settings(deadline=None, max_examples=300)
@given(number=position | near_ties)
def test_a_position_rounds_to_float32_once(number):
    words = rope.words(number)
    assert float(rope.to_float32(words[0], words[1])) == float(np.uint64(number).astype(np.float32))


@settings(deadline=None, max_examples=50)
@given(start=position)
def test_a_position_moves_on_across_the_border_of_its_words(start):
    high, low = (int(part) for part in rope.later(rope.words(start), T))
    assert high << 32 | low == start + T
