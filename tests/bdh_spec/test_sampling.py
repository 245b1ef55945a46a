"""R14: draws, distributions, ties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bdh_spec import SamplingError
from bdh_spec.sampling import Sampling, check_length, probabilities, sample, uniform

LOGITS = arrays(np.float32, st.integers(1, 40), elements=st.floats(-30, 30, width=32))
DRAWS = st.floats(0, 1, exclude_max=True)


def philox4x64(counter: list[int], key: list[int]) -> int:
    """The first word of the generator's published definition (Salmon et al., SC 2011), in whole numbers."""
    for _ in range(10):
        high = [0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]]
        counter = [
            (high[1] >> 64) ^ counter[1] ^ key[0],
            high[1] % 2**64,
            (high[0] >> 64) ^ counter[3] ^ key[1],
            high[0] % 2**64,
        ]
        key = [(key[0] + 0x9E3779B97F4A7C15) % 2**64, (key[1] + 0xBB67AE8584CAA73B) % 2**64]
    return counter[0]


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**63 - 1), st.integers(0, 1000))
def test_r14_a_draw_is_the_published_generator_at_its_place(seed: int, position: int, row: int) -> None:
    word = philox4x64([1, 0, position, row], [seed, 0])
    assert uniform(seed, position, row) == (word >> 11) / 2**53


@given(LOGITS, DRAWS, st.floats(1e-3, 10), st.integers(0, 50))
def test_r14_a_draw_falls_inside_its_share_of_the_distribution(
    logits: np.ndarray, u: float, temperature: float, k: int
) -> None:
    how = Sampling(temperature, k)
    p = probabilities(logits, how)
    token = sample(logits, u, how)
    assert p[token] > 0
    assert p[:token].sum() <= u + 1e-12
    assert p[: token + 1].sum() >= u - 1e-12


@given(LOGITS, st.integers(1, 50))
def test_r14_top_k_keeps_ties_and_nothing_below(logits: np.ndarray, k: int) -> None:
    kept = probabilities(logits, Sampling(5.0, k)) > 0
    kth = np.sort(logits)[::-1][min(k, logits.size) - 1]
    assert (kept == (logits >= kth)).all()
    assert kept.sum() >= min(k, logits.size)


def test_r14_ties_at_the_kth_value_all_stay() -> None:
    assert probabilities(np.array([1.0, 3, 1, 2, 1]), Sampling(top_k=3)).tolist() == pytest.approx(
        (np.exp([1, 3, 1, 2, 1]) / np.exp([1, 3, 1, 2, 1]).sum()).tolist()
    )


@given(LOGITS)
def test_r14_no_k_a_zero_k_and_a_large_k_keep_all(logits: np.ndarray) -> None:
    whole = probabilities(logits, Sampling())
    assert (probabilities(logits, Sampling(top_k=0)) == whole).all()
    assert (probabilities(logits, Sampling(top_k=logits.size + 1)) == whole).all()


def test_r14_greedy_takes_the_lowest_id_of_a_tie() -> None:
    assert sample(np.array([0.0, 7, 3, 7]), 0.99, Sampling(0)) == 1


def test_r14_the_coldest_temperature_does_not_overflow() -> None:
    assert sample(np.array([0.0, 7, 3]), 0.5, Sampling(1e-300)) == 1


def test_r14_many_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4]))
    counts = np.bincount([sample(logits, uniform(7, t), Sampling()) for t in range(4000)], minlength=4)
    assert np.abs(counts / 4000 - [0.1, 0.2, 0.3, 0.4]).max() < 0.03


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_r14_a_diverged_model_is_refused(bad: float) -> None:
    with pytest.raises(SamplingError, match="diverged"):
        sample(np.array([0.0, bad]), 0.5, Sampling())


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -2}, "top_k is -2"),
        ({"seed": 2**64}, "seed is"),
    ],
)
def test_settings_that_define_no_distribution_are_refused(settings: dict, word: str) -> None:
    with pytest.raises(SamplingError, match=word):
        Sampling(**settings)


def test_a_text_does_not_shrink() -> None:
    with pytest.raises(SamplingError, match="max_new_tokens is -1"):
        check_length(-1)


def test_without_a_seed_every_text_is_a_new_one() -> None:
    assert len({Sampling().seed for _ in range(4)}) == 4
