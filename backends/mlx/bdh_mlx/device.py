"""The device that MLX computes on: one for all threads of a process, so threads that need different ones take turns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, Lock

import mlx.core as mx


class SharedDevice:
    """MLX's default device, lent to any number of threads that want the same one.

    ``mx.stream`` would set it under the hands of threads that have set another. Streams need no such care: every thread has its
    own, which is why an array must be evaluated before another thread uses it.
    """

    def __init__(self) -> None:
        self._queue = Lock()  # newcomers stand behind who waits, or a stream of them would keep the device for ever
        self._changed = Condition()
        self._users = 0
        self._device = self._former = mx.default_device()

    @contextmanager
    def __call__(self, device: mx.Device) -> Iterator[None]:
        """Compute on ``device``; the last to leave puts the former one back. Not to be nested."""
        with self._queue, self._changed:
            self._changed.wait_for(lambda: self._users == 0 or self._device == device)
            if self._users == 0:
                self._former = mx.default_device()
                mx.set_default_device(device)
                self._device = device
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                if self._users == 0:
                    mx.set_default_device(self._former)
                    self._changed.notify_all()


computing_on = SharedDevice()
