"""Classes of sizes behind which bugs hide: where real code changes its form, or meets more than it was tried with.

A class draws a shape (configuration, texts, tokens) from a generator. It is small in all sizes but its own, so that cases stay
cheap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np

from bdh_conformance.yardstick.cases import Case
from bdh_spec.config import BDHConfig

Shape: TypeAlias = tuple[BDHConfig, int, int]

# Where code cuts texts and rows of neurons.
BLOCKS = (64, 100, 128, 256, 300, 512, 1000, 1024, 2048, 4096, 8192)
LONG = 32  # tokens beyond which a text counts as long: it is also read in blocks, and at many lengths

DEFAULT_WIDTH = Case(BDHConfig(n_layer=2), 1, 5, seed=8)  # 25 million weights


class Sizes(NamedTuple):
    """One class: ``draw`` takes a generator and the number of tokens of the longest text."""

    name: str
    draw: Callable[[np.random.Generator, int], Shape]


def many(rng: np.random.Generator, longest: int) -> Shape:
    """More texts, heads, layers and ids than a test usually has, and an odd width."""
    width, n_head = 2 * int(rng.integers(2, 9)) + 1, int(rng.integers(5, 10))
    fitting = [m for m in range(1, 30) if m * width // n_head >= 4 and m * width // n_head % 2 == 0]
    vocab_size = int(rng.choice([rng.integers(3, 40), rng.integers(257, 1500)]))
    config = BDHConfig(int(rng.integers(4, 7)), width, 0.1, n_head, int(rng.choice(fitting)), vocab_size)
    return config, int(rng.integers(5, 10)), int(rng.integers(3, 8))


def indivisible(rng: np.random.Generator, longest: int) -> Shape:
    """Neurons beyond the widest block, twice a prime number: no block divides them."""
    primes = [n for n in range(BLOCKS[-1] // 2 + 1, BLOCKS[-1] // 2 + 300) if all(n % d for d in range(2, 70))]
    return with_neurons(2 * int(rng.choice(primes)))


def in_blocks(rng: np.random.Generator, longest: int) -> Shape:
    """As many neurons as one or two blocks hold, or two more."""
    return with_neurons(int(rng.choice(BLOCKS)) * int(rng.integers(1, 3)) + 2 * int(rng.integers(0, 2)))


def with_neurons(n_neurons: int) -> Shape:
    """One layer, two heads and three tokens: few enough relus for some seed to keep all of them away from their kink."""
    return BDHConfig(1, 4, 0.1, 2, n_neurons // 2, 9), 1, 3


def a_block(rng: np.random.Generator, longest: int) -> Shape:
    """A text as long as one or two blocks."""
    return with_tokens(rng, int(rng.choice([b * n for b in BLOCKS for n in (1, 2) if b * n <= longest])))


def beside_a_block(rng: np.random.Generator, longest: int) -> Shape:
    """A text one token longer or shorter than a block."""
    return with_tokens(rng, int(rng.choice([b for b in BLOCKS if b < longest])) + int(rng.choice([-1, 1])))


def between_blocks(rng: np.random.Generator, longest: int) -> Shape:
    """A text of any length up to some 600 tokens."""
    return with_tokens(rng, int(rng.integers(LONG + 1, longest // 2)))


def beyond_a_thousand(rng: np.random.Generator, longest: int) -> Shape:
    """A text longer than 1,024 tokens."""
    return with_tokens(rng, int(rng.integers(1025, longest + 1)))


def with_tokens(rng: np.random.Generator, time: int) -> Shape:
    """A narrow model, and one text or two."""
    return BDHConfig(2, 6, 0.1, 2, 2, 11), int(rng.integers(1, 3)), time  # one model for all: JAX shares its programs


SIZES = {
    sizes.name: sizes
    for sizes in (
        Sizes("many", many),
        Sizes("indivisible", indivisible),
        Sizes("in_blocks", in_blocks),
        Sizes("a_block", a_block),
        Sizes("beside_a_block", beside_a_block),
        Sizes("between_blocks", between_blocks),
        Sizes("beyond_a_thousand", beyond_a_thousand),
    )
}
WIDTHS = ("many", "indivisible", "in_blocks")
LENGTHS = ("a_block", "beside_a_block", "between_blocks", "beyond_a_thousand")


def lengths(case: Case) -> list[int]:
    """Lengths at which a long text is also read: next to every block, and some in between. None for a short one."""
    if case.time <= LONG:
        return []
    near = {block + step for block in (32, *BLOCKS) for step in (-1, 0, 1)} | set(range(100, case.time, 100))
    drawn = np.random.default_rng(case.seed).integers(2, case.time, 8)
    return sorted({length for length in (*near, *map(int, drawn)) if 1 < length < case.time})


def pieces(case: Case) -> tuple[int, ...]:
    """A long text in pieces next to the sizes of blocks, in an order of the case's own."""
    rng, left, found = np.random.default_rng(case.seed), case.time, []
    sizes = [1, 2, *(block + step for block in BLOCKS if block < case.time for step in (-1, 0, 1))]
    while left:
        found.append(min(int(rng.choice(sizes)), left))
        left -= found[-1]
    return tuple(found)


def in_reads_of(size: int, time: int) -> tuple[int, ...]:
    """Pieces of one size, and what is left."""
    return (size,) * (time // size) + ((time % size,) if time % size else ())


def turns(case: Case) -> list[tuple[int, int]]:
    """Two turns of a long text, as the lengths of the first and of both: short and long ones after one another."""
    found = lengths(case)
    rng = np.random.default_rng(case.seed)
    firsts = [1, *map(int, rng.choice(found, min(8, len(found)), replace=False))] if found else []
    both = [(first, length) for first in firsts for length in (*map(int, rng.choice(found, 3)), case.time)]
    return sorted({(first, length) for first, length in both if first < length})
