"""R4: the frequency table and its phases, against arithmetic in whole numbers and in decimal."""

import hashlib
from decimal import Decimal, getcontext
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdh_spec.rope import frequencies, rotation, turns
from bdh_spec.stored_table import is_the_table

PI = Decimal("3.14159265358979323846264338327950288419716939937510")


@pytest.mark.parametrize("N", [2, 6, 34, 64, 100, 1024, 8192])
def test_r4_the_table_is_the_formula_to_five_roundings(N: int) -> None:
    getcontext().prec = 40
    exact = [Decimal(65536) ** (Decimal(-(n // 2 * 2)) / N) / (2 * PI) for n in range(N)]
    table = frequencies(N)
    assert table.dtype == np.float32
    assert max(abs(Decimal(float(f)) / e - 1) for f, e in zip(table, exact, strict=True)) < 5 * Decimal(2) ** -24 * 2
    assert (table[0::2] == table[1::2]).all()


def test_r4_the_table_is_frozen() -> None:
    digest = hashlib.sha256(b"".join(frequencies(N).astype("<f4").tobytes() for N in (2, 6, 34, 1024, 8192))).hexdigest()
    assert digest == "3f57c052ea5646ea4ad73953cbcc163861874a4ecf3b8de06409654d0398ac7c"


@pytest.mark.parametrize("N", [2, 6, 100, 8192])
def test_r4_every_frequency_is_a_whole_multiple_of_2_to_the_minus_64(N: int) -> None:
    assert all((Fraction(float(f)) * 2**64).denominator == 1 for f in frequencies(N))


@given(st.one_of(st.integers(0, 2**63 - 1), st.sampled_from([0, 1, 10**4, 10**6, 2**24 + 1, 2**40, 2**63 - 1])))
def test_r4_exact_phases_are_exact_at_every_position(t: int) -> None:
    exact = [float(Fraction(float(f)) * t % 1) for f in frequencies(12)]
    np.testing.assert_allclose(turns(np.array([t], np.uint64), frequencies(12), "exact")[0], exact, rtol=0, atol=2.0**-53)


@given(st.integers(0, 2**24))
def test_r4_float32_phases_round_the_product_once(t: int) -> None:
    rounded = [float(Fraction(float(np.float32(float(f) * t))) % 1) for f in frequencies(12)]
    assert turns(np.array([t], np.uint64), frequencies(12), "float32")[0].tolist() == rounded


def test_r4_both_phases_agree_at_the_start_and_part_later() -> None:
    for start, apart in ((0, 1e-6), (10**6, 1e-2)):
        exact, single = (rotation(start, 4, frequencies(64), np.float64, phase)[0] for phase in ("exact", "float32"))
        assert (np.abs(exact - single).max() > apart) == (start > 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_r4_a_stored_table_is_known_again_in_any_dtype(dtype: type) -> None:
    kind, table = ml_dtypes.finfo(dtype), frequencies(64)
    spacing = float(kind.eps), float(kind.smallest_subnormal)
    assert is_the_table(table.astype(dtype), *spacing)
    for wrong in (table * 2 * np.pi, table - 5e-5 * (1 + np.arange(64) % 3 * 30), np.where(np.arange(64) == 3, np.nan, table)):
        assert not is_the_table(wrong.astype(dtype), *spacing)
    if dtype in (np.float32, np.float64):
        assert not is_the_table(table * (1 + 3e-4), *spacing)
