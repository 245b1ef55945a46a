"""Hypothesis as the suite uses it: for a case that fails, and for a smaller one that fails too."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import hypothesis
from hypothesis import HealthCheck, settings
from hypothesis.errors import HypothesisException
from hypothesis.strategies import SearchStrategy

T = TypeVar("T")


class FoundError(Exception):
    """What Hypothesis shrinks."""


class Enough(BaseException):  # no error: Hypothesis lets it pass
    """There is no time for more examples."""


def failing(
    strategy: SearchStrategy[T], fails: Callable[[T], bool], examples: int, seed: int | None = None, *, shrinks: bool = True
) -> bool:
    """Whether one of these many examples fails; the last call that failed was with the smallest that does, if it shrinks.

    Without a seed the examples are the same every time.
    """

    def holds(example: T) -> None:
        if fails(example):
            raise FoundError

    phases = (hypothesis.Phase.generate, hypothesis.Phase.shrink)[: 1 + shrinks]
    how = settings(quiet(), max_examples=examples, derandomize=seed is None, phases=phases)
    test = how(hypothesis.given(strategy)(holds))
    try:
        (test if seed is None else hypothesis.seed(seed)(test))()
    except (FoundError, HypothesisException):  # a port that answers now so, now so, makes Hypothesis give up
        return True
    except Enough:
        return False
    return False


def smallest(strategy: SearchStrategy[T], fails: Callable[[T], bool], examples: int) -> T | None:
    """The smallest of these many examples that fails, if one does."""
    try:
        return hypothesis.find(strategy, fails, settings=settings(quiet(), max_examples=examples, derandomize=True))
    except HypothesisException:
        return None


def quiet() -> settings:
    """Hypothesis without a database, deadlines or talk."""
    return settings(
        database=None,
        deadline=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        verbosity=hypothesis.Verbosity.quiet,
    )
