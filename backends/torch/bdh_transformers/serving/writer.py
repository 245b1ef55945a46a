"""The thread that writes, and what of each text may be shown."""

from __future__ import annotations

import asyncio
import codecs
import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from bdh_spec.sampling import Sampling
from bdh_transformers.batching import ContinuousBatch, Text
from bdh_transformers.serving.asked import Wish

BYTES = 256  # ids below are bytes, and special tokens come after them


@dataclass
class Piece:
    """Some more of a text; with a reason, the last of it."""

    index: int
    text: str
    reason: Literal["stop", "length"] | None = None
    error: str | None = None


@dataclass(eq=False)
class Choice:
    """A text that a client waits for: what it goes on from, how it is written, and what of it may be shown."""

    index: int
    prompt: list[int]
    wish: Wish
    row: int
    most: int
    stops: tuple[bytes, ...]
    ends: frozenset[int]
    to: asyncio.Queue[Piece]
    tokens: int = 0
    held: bytes = b""  # what may turn out to be the beginning of a stop
    text: Text | None = None
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    @property
    def how(self) -> Sampling:
        """How tokens are drawn (R14)."""
        return Sampling(self.wish.temperature, self.wish.top_k, self.wish.seed)

    def take(self, token: int) -> Piece:
        """One more token of the text."""
        self.tokens += 1
        if token in self.ends:
            return self._last(self.held, "stop")
        self.held += bytes([token]) if token < BYTES else b""
        if found := [at for stop in self.stops if (at := self.held.find(stop)) >= 0]:
            return self._last(self.held[: min(found)], "stop")
        if self.tokens == self.most:
            return self._last(self.held, "length")
        sure = len(self.held) - max((overlap(self.held, stop) for stop in self.stops), default=0)
        shown, self.held = self.held[:sure], self.held[sure:]
        return Piece(self.index, self.decoder.decode(shown))

    def _last(self, shown: bytes, reason: Literal["stop", "length"]) -> Piece:
        return Piece(self.index, self.decoder.decode(shown, final=True), reason)


def overlap(text: bytes, stop: bytes) -> int:
    """How many of a text's last bytes are the first ones of a stop."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Writer(threading.Thread):
    """The one thread that uses the model: it writes all texts that there are places for, and lets the others wait."""

    def __init__(self, batch: ContinuousBatch, places: int, deliver: Callable[[list[tuple[Choice, Piece]]], None]) -> None:
        super().__init__(name="writer", daemon=True)
        self.batch, self.places, self.deliver = batch, places, deliver
        self.orders: queue.SimpleQueue[tuple[str, Choice | None]] = queue.SimpleQueue()
        self.waiting: deque[Choice] = deque()
        self.writing: dict[Text, Choice] = {}
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while self._obey():
                while self.waiting and len(self.writing) < self.places:
                    choice = self.waiting.popleft()
                    choice.text = self.batch.join(choice.prompt, choice.how, top_p=choice.wish.top_p, row=choice.row)
                    self.writing[choice.text] = choice
                if pieces := [self._piece(*drawn) for drawn in self.batch.step()]:
                    self.deliver(pieces)
        except BaseException as error:  # noqa: BLE001  # the thread ends with it, and all who wait must know
            self.failure = error
            self.deliver([])

    def _obey(self) -> bool:
        """Carry out what was ordered, if nothing else is to be done the next one that will be; False at the end."""
        while not self.orders.empty() or not (self.writing or self.waiting):
            order, choice = self.orders.get()
            if choice is None:
                return False
            if order == "join":
                self.waiting.append(choice)
            else:
                self._drop(choice)
        return True

    def _drop(self, choice: Choice) -> None:
        if choice in self.waiting:
            self.waiting.remove(choice)
        if choice.text is not None and choice.text in self.writing:
            del self.writing[choice.text]
            self.batch.leave(choice.text)

    def _piece(self, text: Text, token: Any) -> tuple[Choice, Piece]:
        choice = self.writing[text]
        piece = choice.take(token) if isinstance(token, int) else Piece(choice.index, "", error=str(token))
        if piece.reason or piece.error:
            self._drop(choice)
        return choice, piece
