"""Settings that all tests share."""

import gc
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from chromium import chromium as started
from hypothesis import settings

# A shell lets what it starts in the background ignore Ctrl-C, which programs that the tests start would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples on every run: a red CI must be the change's doing. `--hypothesis-profile=explore` draws new ones.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("fixed")


def pytest_collection_finish() -> None:
    """What imports have made stays for good: the collector of garbage need not look through it again and again."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """At the end it may, or extension modules complain of what they find left."""
    gc.unfreeze()


@pytest.fixture(scope="module")  # an event loop runs as long as it is there, which other modules may not expect
def chromium() -> Iterator[Any]:
    """The browser of this machine; without one a test is skipped."""
    with started() as browser:
        yield browser
