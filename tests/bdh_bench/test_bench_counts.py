"""Counts by hand, for a model of pencil and paper, and against what the design states of the default size."""

from __future__ import annotations

import pytest

from bdh_bench import counts
from bdh_bench.rows import Row
from bdh_spec import BDHConfig
from bdh_spec.params import count

# D 2, nh 1, N 2, V 3. A token: 3 products of 2*2*2 = 8, and logits 2*2*3 = 12. A pair: 2*2 over N and 2*2 over D. A state: 2*8.
SMALL = BDHConfig(n_layer=1, n_embd=2, n_head=1, mlp_internal_dim_multiplier=1, vocab_size=3)
BASE = BDHConfig()


@pytest.mark.parametrize(
    ("row", "flop"),
    [
        (Row("forward", 1, 3), 3 * 36 + 3 * 8),  # 3 earlier pairs cost less than 3 states of 16
        (Row("forward", 2, 3), 2 * (3 * 36 + 3 * 8)),
        (Row("forward", 1, 9), 9 * 36 + 9 * 16),  # 36 pairs cost more than 9 states
        (Row("prefill", 1, 3), 3 * 36 + 3 * 8 + 3 * 8),  # and the state is written
        (Row("prefill", 1, 9), 9 * 36 + 9 * 16),
        (Row("train", 1, 3), 3 * (3 * 36 + 3 * 8)),
        (Row("decode", 1, 1), 36 + 8),
        (Row("decode", 4, 5), 4 * (36 + 16)),
    ],
)
def test_needed_flop_of_a_small_model_by_hand(row: Row, flop: int) -> None:
    assert counts.needed_flop(row, SMALL) == flop


@pytest.mark.parametrize(
    ("row", "again", "flop"),
    [
        (Row("forward", 1, 3), False, 3 * 36 + 9 * 8),  # the whole square
        (Row("prefill", 1, 3), False, 3 * 36 + 9 * 8 + 3 * 8),
        (Row("train", 2, 3), False, 3 * 2 * (3 * 36 + 9 * 8)),
        (Row("decode", 1, 5), False, 36 + 16),
        (Row("decode", 1, 5), True, 6 * 36 + 36 * 8),  # the context and the token
    ],
)
def test_executed_flop_of_the_plain_form_by_hand(row: Row, again: bool, flop: int) -> None:
    assert counts.executed_flop(row, SMALL, again=again) == flop


def test_the_counts_at_the_default_size_are_those_of_the_design() -> None:
    heads = 3 * 16.8e6 * BASE.n_layer
    assert counts.token_flop(BASE) - 2 * 256 * 256 == pytest.approx(heads, rel=2e-3)
    assert 2 * BASE.n_head * BASE.n_neurons == 65_536
    assert counts.pair_flop(BASE) == 65_536 + 2 * 4 * 256
    assert counts.state_flop(BASE) == pytest.approx(33.5e6, rel=2e-3)


def test_every_layer_and_head_counts() -> None:
    deep = BDHConfig(n_layer=5, n_embd=2, n_head=1, mlp_internal_dim_multiplier=1, vocab_size=3)
    assert counts.needed_flop(Row("forward", 1, 3), deep) == 3 * (5 * 24 + 12) + 5 * 24
    two = BDHConfig(n_layer=1, n_embd=2, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=3)  # N is 4
    assert counts.token_flop(two) == 3 * 2 * 2 * 8 + 12
    assert counts.pair_flop(two) == 2 * 2 * (4 + 2)


def test_needed_bytes_by_hand() -> None:
    weights, state = count(SMALL), 2 * 2
    assert counts.needed_bytes(Row("forward", 1, 3), SMALL, 2) == 2 * weights + 3 * 3 * 4
    assert counts.needed_bytes(Row("prefill", 1, 3), SMALL, 4) == 4 * weights + 3 * 3 * 4 + 4 * state
    assert counts.needed_bytes(Row("decode", 1, 100), SMALL, 4) == 4 * weights + 3 * 4 + 2 * 4 * state
    assert counts.needed_bytes(Row("decode", 1, 1), SMALL, 4) == 4 * weights + 3 * 4 + 4 * (2 + 2)  # rows are less than a state
    assert counts.needed_bytes(Row("train", 1, 3), SMALL, 4) == 8 * 4 * weights


def test_what_a_form_takes_grows_as_it_should() -> None:
    def plain(T: int, kind: str = "forward") -> int:
        return counts.plain_memory(Row(kind, 1, T), BASE, 4)

    assert plain(32768) > 32 * 2**30  # two squares of four heads
    assert plain(512, "train") > 6 * plain(512)
    assert counts.plain_memory(Row("decode", 8, 512), BASE, 4) == 2 * counts.state_bytes(8, BASE)
    assert counts.plain_memory(Row("decode", 1, 511), BASE, 4, again=True) == plain(512)
    assert counts.least_memory(Row("forward", 1, 32768), BASE) < plain(32768) / 100
    assert counts.least_memory(Row("decode", 1, 16), BASE) < counts.least_memory(Row("decode", 1, 100_000), BASE)
