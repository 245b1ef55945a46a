"""A disk that fails when it is told to."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class Disk:
    """The system's calls on files, one of which fails, or none; what is written and not yet synced is written down."""

    def __init__(self, patch: pytest.MonkeyPatch, fails_at: int = 10**9, error: int = errno.EIO) -> None:
        self.calls, self.fails_at, self.error = 0, fails_at, error
        self.unsynced: set[int] = set()  # files, by their number, that a power cut now would damage
        self.published: list[set[int]] = []  # those that were unsynced whenever a name was given
        self.named: list[str] = []  # the names
        for name in ("replace", "rename", "link"):
            patch.setattr(os, name, self.publishing(getattr(os, name)))
        patch.setattr(os, "fsync", self.syncing(os.fsync))
        patch.setattr(io, "open", self.open)

    def count(self) -> None:
        self.calls += 1
        if self.calls == self.fails_at:
            raise OSError(self.error, os.strerror(self.error))

    def publishing(self, call: Callable[..., None]) -> Callable[..., None]:
        def instead(*names: Any) -> None:
            self.count()
            self.published.append(set(self.unsynced))
            self.named.append(Path(names[1]).name)
            call(*names)

        return instead

    def syncing(self, call: Callable[[int], None]) -> Callable[[int], None]:
        def instead(handle: int) -> None:
            self.count()
            self.unsynced.discard(os.fstat(handle).st_ino)
            call(handle)

        return instead

    def open(self, file: Any, mode: str = "r", buffering: int = -1, *text: Any) -> Any:
        raw = Raw(file, mode.replace("b", ""), self)
        kind = io.BufferedRandom if "+" in mode else io.BufferedWriter if set(mode) & set("wax") else io.BufferedReader
        return kind(raw) if "b" in mode else io.TextIOWrapper(kind(raw), *text)


class Raw(io.FileIO):
    """A file of such a disk."""

    def __init__(self, file: Any, mode: str, disk: Disk) -> None:
        super().__init__(file, mode)
        self.disk = disk

    def write(self, data: Any) -> int:
        self.disk.count()
        self.disk.unsynced.add(os.fstat(self.fileno()).st_ino)
        return super().write(data)

    def readinto(self, room: Any) -> int:
        self.disk.count()
        return super().readinto(room)
