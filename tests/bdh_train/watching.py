"""Who listens to a run, and who stops it."""

from __future__ import annotations

from collections.abc import Callable

from bdh_train.show import Talk


class Heard(Talk):
    """What would have been said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.sentences: list[str] = []
        self.samples: list[bytes] = []

    def sample(self, text: bytes) -> None:
        self.samples.append(text)

    def say(self, sentence: str) -> None:
        self.sentences.append(sentence)


def after(steps: int) -> Callable[[], bool]:
    """A wish to stop after some steps."""
    made = iter(range(1, 1000))
    return lambda: next(made) >= steps


def doing(steps: int, what: Callable[[], None]) -> Callable[[], bool]:
    """Somebody who never wishes to stop a run, and does something to it after some steps."""
    is_time = after(steps)

    def watch() -> bool:
        if is_time():
            what()
        return False

    return watch
