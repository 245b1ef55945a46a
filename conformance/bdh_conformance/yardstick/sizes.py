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


class Sizes(NamedTuple):
    """One class: ``draw`` takes a generator and the number of tokens of the longest text."""

    name: str
    draw: Callable[[np.random.Generator, int], Shape]


def many(rng: np.random.Generator, longest: int) -> Shape:
    """More texts, heads, layers and ids than a test usually has, and an odd width.

    Wide enough for sums not to cancel: of few features and neurons, several layers make chaos, which nobody can judge.
    """
    width, n_head = 2 * int(rng.integers(8, 17)) + 1, int(rng.integers(5, 10))
    vocab_size = int(rng.choice([rng.integers(3, 40), rng.integers(257, 1500)]))
    config = BDHConfig(int(rng.integers(4, 6)), width, 0.1, n_head, multiplier(rng, width, n_head), vocab_size)
    return config, int(rng.integers(5, 10)), int(rng.integers(3, 8))


def crowd(rng: np.random.Generator, longest: int) -> Shape:
    """More of them still, an odd number of texts, and a vocabulary of two."""
    width, n_head = 2 * int(rng.integers(8, 13)), int(rng.integers(9, 17))
    config = BDHConfig(int(rng.integers(6, 8)), width, 0.1, n_head, multiplier(rng, width, n_head), 2)
    return config, 2 * int(rng.integers(5, 9)) + 1, 3


def multiplier(rng: np.random.Generator, width: int, n_head: int) -> int:
    """One that makes a few dozen neurons in each head."""
    return int(rng.choice([m for m in range(1, 80) if 16 <= m * width // n_head <= 40 and m * width // n_head % 2 == 0]))


def wide(rng: np.random.Generator, longest: int) -> Shape:
    """A wide embedding, as wide as there are ids."""
    width = int(rng.choice([17, 31, 33, 48, 63, 64, 65, 96, 100, 127, 128, 129, 200]))
    return BDHConfig(2, width, 0.1, 2, 4, width), 2, 6


def one_id(rng: np.random.Generator, longest: int) -> Shape:
    """A vocabulary of a single id."""
    return BDHConfig(2, int(rng.integers(4, 9)), 0.1, 2, 4, 1), 2, 4


def many_ids(rng: np.random.Generator, longest: int) -> Shape:
    """More ids than a table on the way may have, next to a power of two."""
    return BDHConfig(1, 6, 0.1, 2, 2, 2 ** int(rng.integers(10, 13)) + int(rng.integers(1, 200))), 2, 5


def indivisible(rng: np.random.Generator, longest: int) -> Shape:
    """Neurons beyond the widest block, twice a prime number: no block divides them."""
    primes = [n for n in range(BLOCKS[-1] // 2 + 1, BLOCKS[-1] // 2 + 300) if all(n % d for d in range(2, 70))]
    return with_neurons(2 * int(rng.choice(primes)))


def in_blocks(rng: np.random.Generator, longest: int) -> Shape:
    """As many neurons as one or two blocks hold, or two more."""
    return with_neurons(int(rng.choice(BLOCKS)) * int(rng.integers(1, 3)) + 2 * int(rng.integers(0, 2)))


def default_width(rng: np.random.Generator, longest: int) -> Shape:
    """The widths of a default model, with its 25 million weights, and of its layers two: they share the weights."""
    return BDHConfig(n_layer=2), 1, int(rng.integers(3, 8))


def with_neurons(n_neurons: int) -> Shape:
    """One layer, two heads and three tokens: few enough relus for some seed to keep all of them away from their kink."""
    return BDHConfig(1, 4, 0.1, 2, n_neurons // 2, 9), 1, 3


def a_block(rng: np.random.Generator, longest: int) -> Shape:
    """A text as long as one or two blocks."""
    return with_tokens(2, int(rng.choice([b * n for b in BLOCKS for n in (1, 2) if b * n <= longest])))


def beside_a_block(rng: np.random.Generator, longest: int) -> Shape:
    """A text one token longer or shorter than a block."""
    return with_tokens(1, int(rng.choice([b for b in BLOCKS if b < longest])) + int(rng.choice([-1, 1])))


def between_blocks(rng: np.random.Generator, longest: int) -> Shape:
    """A text of any length up to some 600 tokens."""
    return with_tokens(3, int(rng.integers(LONG + 1, longest // 2)))


def beyond_a_thousand(rng: np.random.Generator, longest: int) -> Shape:
    """A text longer than 1,024 tokens."""
    return with_tokens(2, int(rng.integers(1025, longest + 1)))


def with_tokens(batch: int, time: int) -> Shape:
    """A narrow model, and a few texts."""
    return BDHConfig(2, 6, 0.1, 2, 2, 11), batch, time  # one model for all: JAX shares its programs


def long_and_wide(rng: np.random.Generator, longest: int) -> Shape:
    """A text longer than 1,024 tokens for a narrow type, whose rounding turns some relus on any port.

    One neuron of a hundred that turns is little beside the others; of a dozen it makes another row, and no two ports agree.
    """
    return BDHConfig(2, 16, 0.1, 2, 8, 11), 2, int(rng.integers(1025, longest + 1))


SIZES = {
    sizes.name: sizes
    for sizes in (
        Sizes("many", many),
        Sizes("crowd", crowd),
        Sizes("wide", wide),
        Sizes("one_id", one_id),
        Sizes("many_ids", many_ids),
        Sizes("indivisible", indivisible),
        Sizes("in_blocks", in_blocks),
        Sizes("default_width", default_width),
        Sizes("a_block", a_block),
        Sizes("beside_a_block", beside_a_block),
        Sizes("between_blocks", between_blocks),
        Sizes("beyond_a_thousand", beyond_a_thousand),
        Sizes("long_and_wide", long_and_wide),
    )
}
WIDTHS = ("many", "crowd", "wide", "one_id", "many_ids", "indivisible", "in_blocks")
LENGTHS = ("a_block", "beside_a_block", "between_blocks", "beyond_a_thousand")


def lengths(case: Case) -> list[int]:
    """Lengths at which a long text is also read: next to blocks, next to multiples of others, and any. None for a short one.

    A length that is no block's shows what pads to blocks; one beyond a multiple of many shows what lies at their edges.
    """
    if case.time <= LONG:
        return []
    rng = np.random.default_rng(case.seed)
    near = {block + step for block in (32, *BLOCKS) for step in (-1, 0, 1)} | {3 * 2**k + 1 for k in range(3, 10)}
    beyond = {int(rng.integers(1, 9)) * int(k) + 1 for k in rng.integers(65, 200, 6)}
    drawn = rng.integers(2, case.time, 10)
    return sorted({length for length in (*near, *beyond, *map(int, drawn)) if 1 < length < case.time})


def few_lengths(case: Case) -> list[int]:
    """Some of them."""
    found = lengths(case)
    return (
        sorted(map(int, np.random.default_rng(case.seed + 1).choice(found, min(10, len(found)), replace=False)))
        if found
        else []
    )


def pieces(case: Case) -> tuple[int, ...]:
    """A long text in pieces next to the sizes of blocks, in an order of the case's own."""
    rng, left, found = np.random.default_rng(case.seed), case.time, []
    sizes = reads(case)
    while left:
        found.append(min(int(rng.choice(sizes)), left))
        left -= found[-1]
    return tuple(found)


def reads(case: Case) -> tuple[int, ...]:
    """Sizes of pieces: few of them, because some ports compile each, and none of a class of their own."""
    rng = np.random.default_rng(case.seed + 2)
    steps = [int(block) + int(rng.integers(-1, 2)) for block in rng.choice([b for b in BLOCKS if b < 1000], 3, replace=False)]
    return tuple(sorted({1, 2, int(rng.integers(3, 17)), 129, 257, 513, *steps}))


def in_reads_of(size: int, time: int) -> tuple[int, ...]:
    """Pieces of one size, and what is left."""
    return (size,) * (time // size) + ((time % size,) if time % size else ())


def turns(case: Case) -> list[tuple[int, int]]:
    """Two turns of a long text, as the lengths of the first and of both: short and long ones after one another."""
    if case.time <= LONG:
        return []
    sizes = (*reads(case), *(b for b in (700, 1000) if b < case.time))
    fitting = [(first, first + second) for first in sizes for second in sizes if first + second < case.time]
    chosen = np.random.default_rng(case.seed).choice(len(fitting), min(24, len(fitting)), replace=False)
    long_first = [pair for pair in fitting if pair[0] >= 512]
    return sorted({*(fitting[int(i)] for i in chosen), *long_first})
