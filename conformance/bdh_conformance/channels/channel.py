"""What a channel is: what a model is made to compute, what is expected of it, and what may differ.

``observe`` works on any model of the protocol: a port, a mistake, the specification itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache, partial, reduce
from typing import Literal

import numpy as np

from bdh_conformance.files.vectors import Vector
from bdh_conformance.yardstick.agreement import Comparison, compare
from bdh_conformance.yardstick.cases import POOL, Case
from bdh_conformance.yardstick.reference import Rounding, Specification, Stepwise
from bdh_conformance.yardstick.sizes import LONG, Shape
from bdh_conformance.yardstick.tolerances import NOISE_RUNS, Expectation, expect
from bdh_spec import BDHConfig, Model, Params
from bdh_spec.dtypes import DTYPES, WIDE
from bdh_spec.params import Array
from bdh_spec.rope import Phase

Observed = dict[str, Array]
Reader = Callable[[Params, BDHConfig, Phase], Specification]
Judge = Callable[[Observed, Case, str, Phase], list[Comparison]]

FIRST_NOISE_RUNS, LONG_NOISE_RUNS = 1, 3
REMEMBERED = 256  # expectations: those of a case that is made smaller, explained, or put to one planted bug after another


@dataclass(frozen=True)
class Channel:
    """One thing that ports get wrong: what is computed, what is expected, and what a port must claim for it."""

    name: str
    level: str  # that it counts for, where the dtype is the port's first
    says: str
    verbs: tuple[str, ...]
    observe: Callable[[Model, Case], Observed]
    judge: Judge | None = None  # None: against the specification, with the tolerance of rounding
    dtypes: tuple[str, ...] = DTYPES
    prepare: Callable[[Case], Case | None] = lambda case: case  # the case as this channel needs it; None: not fit for it
    min_time: int = 1
    reference: Callable[[Model, Case], Observed] | None = None  # the same by a shorter way, where all ways are one
    shapes: tuple[Shape, ...] = POOL  # of structured and of generated cases
    sizes: tuple[str, ...] = ()  # classes of sizes that cases are drawn from as well
    narrow_sizes: tuple[str, ...] = ()  # the same in the narrow types
    special: tuple[Case, ...] = ()  # where else some mistakes hide
    only: tuple[Case, ...] = ()  # instead of structured cases, where just these will do
    only_compiled: tuple[Case, ...] = ()  # fewer of them, for a port that compiles each in seconds
    both_ways: bool = False  # a port may read a text through a state, though the verbs do not say so
    kinked: Callable[[Case], bool] = lambda case: False  # whether it shows that float32 rounding flips a relu
    partial: bool = False  # asks for more than its verbs where a port claims more
    cost: int = 1  # how many times dearer a case is than one of logits
    smoke: Literal["", "first dtype", "every dtype"] = ""  # whether smoke has time for it
    vectors: tuple[str, ...] = ("three_heads",)  # the published vectors that smoke reads, by their names
    published: Callable[[Model, Vector], Observed] | None = None  # what they hold for it; None: their cases are taken alone
    smoke_weights: str = ""  # other weights than those of the vectors' cases
    smoke_special: tuple[Case, ...] = ()  # what smoke looks at beside them
    once: bool = False  # looks at choices and not at rounding: the first dtype is enough
    relative: bool = False  # rests on an offset of positions changing nothing, which phases in float32 do not keep
    every_phase: bool = False  # has something to say of phases in which a port is not at home

    def expected(self, case: Case, dtype: str, phase: Phase = "exact", *, first: bool = False) -> dict[str, Expectation]:
        """What a port of this dtype must compute, for the channels that have no judge of their own.

        With ``first`` by one way to read and few draws of noise: no tolerance is larger than the whole one, or hardly any.
        """
        compute = self.reference or self.observe
        whole = Specification if dtype in WIDE else rounding(dtype)
        readers = (whole, Stepwise) if "advance" in self.verbs or self.both_ways else (whole,)
        runs = FIRST_NOISE_RUNS if first else noise_runs(case)
        kinked = dtype == "float32" and self.kinked(case)
        return expect_of(readers[:1] if first else readers, compute, case, dtype, phase, runs, kinked=kinked)

    def compare(self, observed: Observed, case: Case, dtype: str, phase: Phase = "exact") -> list[Comparison]:
        """Every array of an observation against what it should be, in the specification's order.

        Noise is dear, and more of it only allows more: what agrees with the first tolerances needs no others.
        """
        if self.judge:
            return self.judge(observed, case, dtype, phase)
        compared: list[Comparison] = []
        for first in (True, False):
            expected = self.expected(case, dtype, phase, first=first)
            if self.partial:
                expected = {name: expectation for name, expectation in expected.items() if name in observed}
            compared = against(observed, expected)
            if not any(comparison.complaint for comparison in compared):
                break
        return compared


@cache
def rounding(dtype: str) -> Reader:
    """The specification over weights of a narrow dtype: training moves what they were before they were rounded (R16)."""
    return partial(Rounding, held=dtype)


def against(observed: Mapping[str, Array], expected: Mapping[str, Expectation]) -> list[Comparison]:
    """All that is expected, then a complaint about anything else."""
    compared = [compare(name, observed.get(name), expectation) for name, expectation in expected.items()]
    if unknown := [name for name in observed if name not in expected]:
        compared.append(complaint("names", f"unknown stages {', '.join(unknown)}"))
    elif list(observed) != list(expected) and set(observed) == set(expected):
        compared.append(complaint("names", f"the stages come as {', '.join(observed)}: keep the order of computation"))
    return compared


@lru_cache(maxsize=REMEMBERED)
def expect_of(
    readers: tuple[Reader, ...],
    compute: Callable[[Model, Case], Observed],
    case: Case,
    dtype: str,
    phase: Phase,
    runs: int | None = None,
    *,
    kinked: bool = False,
) -> dict[str, Expectation]:
    """What is expected, with the largest tolerance of these ways to read a text: a port may go any of them."""
    drawn = noise_runs(case) if runs is None else runs

    def by(reader: Reader) -> dict[str, Expectation]:
        def run(params: Params) -> Observed:
            return compute(reader(params, case.config, phase), case)

        return expect(run, case.params, dtype, seed=case.seed, runs=drawn, kinked=kinked)

    ways = [by(reader) for reader in readers]
    return {
        name: Expectation(
            expectation.reference,
            reduce(np.maximum, (way[name].allowed for way in ways)),  # of each row, or of all alike
            max(way[name].allowed_slope for way in ways),
        )
        for name, expectation in ways[0].items()
    }


def noise_runs(case: Case) -> int:
    """How often rounding is drawn: the worst of a thousand rows needs no eight runs to be found."""
    return NOISE_RUNS if case.time <= LONG else LONG_NOISE_RUNS


def complaint(stage: str, sentence: str) -> Comparison:
    """A comparison that no number tells."""
    return Comparison(stage, float("inf"), 0.0, sentence)


def scalar(value: float) -> Array:
    return np.array(value, np.float64)
