"""A side in a process of its own: its memory is its own, and if it dies or hangs the other rows go on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from bdh_bench import machine
from bdh_bench.reference import reference
from bdh_bench.sides import AbsentError, Framework, Named, Runner, Task, find_port, framework
from bdh_spec import BackendUnavailable, BDHError, CapabilityError
from bdh_spec.params import count

LOOK = 0.05  # seconds between two looks at a process
TURN = 0.2  # seconds that a turn lasts at least, so that clocks and schedulers do not matter
MOST_REPEATS = 1000
SPARE = 0.03  # of the machine's memory, below which the process that takes it is ended
SQUARES = (1024, 2048, 4096, 8192)  # products to find the peak with
COPIED = 256 << 20  # bytes: more than a cache
BEST_OF = 5
ENOUGH = 0.5  # seconds of one product


class EndError(BDHError):
    """A side that gave no figure, and why; ``absent`` where it does not exist here."""

    def __init__(self, sentence: str, *, absent: bool = False) -> None:
        super().__init__(sentence)
        self.absent = absent


class LateError(EndError):
    """A side that was not done in its time, which is no fault: it may be slow, or the machine busy."""


@dataclass(frozen=True)
class Ready:
    """A side that is loaded and has run once."""

    first: float  # seconds of the first run, compilation included
    repeats: int  # runs in a turn
    answer: str  # a file of what is compared, or nothing


@dataclass(frozen=True)
class Limits:
    """What the machine can do at most in this framework and dtype, and what its speed depends on."""

    device: str
    flops: float  # of a square product, a second
    copy: float  # bytes read and bytes written by a copy, a second
    available: int  # bytes that the device has free
    facts: dict[str, str]


def serve(pipe: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Do the work in this process, and send what it says or why it failed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sees to it
    os.dup2(2, 1)  # what a framework prints is no answer
    # Sides take turns on one device, so none may take most of its memory in advance.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        work(pipe, *arguments)
    except (AbsentError, BackendUnavailable, CapabilityError) as error:
        pipe.send(EndError(str(error), absent=True))
    except Exception as error:  # noqa: BLE001  a port may raise anything, and the other rows go on
        pipe.send(EndError(sentence(error)))


def sentence(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text[:300] if isinstance(error, BDHError) else f"{type(error).__name__}: {text[:300]}"


def measure(pipe: Connection, task: Task, answer: str) -> None:
    """Load a side, run it once, then as often as asked for a turn; on None tell the peak of memory above the weights."""
    if task.device == "cpu":  # where a pool of compilers would compete with what is measured
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    meter = framework(task.port, task.device)
    touch(meter, task)
    weights = meter.in_use() + count(task.config) * meter.held_itemsize(task)
    runner = meter.runner(task, task.params())
    if answer:
        store(answer, runner.answer())
    meter.forget_peak()
    first = seconds(runner.run)
    repeats = 1
    if first < TURN:
        repeats = min(MOST_REPEATS, int(TURN / max(seconds(runner.run), TURN / MOST_REPEATS)) + 1)
    pipe.send(Ready(first, repeats, answer))
    asked = pipe.recv()
    if asked is not None:  # without a turn the peak is that of the first run, compilation and all
        meter.forget_peak()
    while asked is not None:
        pipe.send(turn(runner, asked))
        asked = pipe.recv()
    pipe.send(max(0, meter.peak() - weights))


def touch(meter: Framework, task: Task) -> None:
    """Run next to nothing, so that the framework's own memory is there before memory is looked at."""
    tiny = task.tiny()
    meter.runner(tiny, tiny.params()).run()


def turn(runner: Runner, repeats: int) -> float:
    """How long a run takes, of many."""
    return seconds(lambda: [runner.run() for _ in range(repeats)]) / repeats


def seconds(run: Callable[[], object]) -> float:
    """How long a run takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def limits(pipe: Connection, port: str, device: str | None, dtype: str) -> None:
    """Send what the machine can do at most, on the port's best device unless told which."""
    backend = find_port(port)
    device = device or backend.devices()[0]
    if device.split(":")[0] not in backend.devices():
        raise AbsentError(f"the {port} port has no device {device!r} here: it has {', '.join(backend.devices())}")
    if dtype not in backend.capabilities.dtypes:
        raise AbsentError(f"the {port} port has no {dtype}")
    meter = framework(port, device)
    available = meter.available()
    size = min(COPIED, available // 8)
    copy = meter.copy(size)
    copied = min(seconds(copy) for _ in range(BEST_OF + 1))
    pipe.send(Limits(device, peak_flops(meter, dtype), 2 * size / copied, available, meter.facts()))


def peak_flops(meter: Framework, dtype: str) -> float:
    """The best of square products of growing size, while they are quick."""
    best = 0.0
    for n in SQUARES:
        run = meter.product(n, dtype)
        run()
        taken = min(seconds(run) for _ in range(BEST_OF))
        best = max(best, 2 * n**3 / taken)
        if 8 * taken > ENOUGH:
            break
    return best


def refer(pipe: Connection, task: Task, path: str) -> None:
    """Write the float64 answer to a file, and send its name."""
    store(path, reference(task))
    pipe.send(path)


def store(path: str, answer: Named) -> None:
    """Write what is compared."""
    np.savez(path, **answer)  # type: ignore[arg-type]  # mypy takes any name for that of an option


def load_answer(path: str) -> Named:
    """What a process has written."""
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


class Worker:
    """A process that does one piece of work, and is ended when it takes too long or too much."""

    def __init__(self, work: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")  # frameworks do not survive a fork
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, work, arguments), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, message: Any, deadline: float) -> Any:
        """Send a message, and wait for the answer to it."""
        try:
            self.pipe.send(message)
        except OSError:
            raise self.ended() from None
        return self.answer(deadline)

    def answer(self, deadline: float) -> Any:
        """The next answer. EndError where there is none by ``deadline``, a time of ``time.monotonic``."""
        while not self.pipe.poll(LOOK):
            if time.monotonic() > deadline:
                raise LateError("it ran out of time")
            if machine.available_memory() < SPARE * machine.total_memory():
                raise EndError(f"it was ended when it had left {machine.available_memory() >> 20} MB of the machine's memory")
            if not self.process.is_alive() and not self.pipe.poll():
                raise self.ended()
        try:
            found = self.pipe.recv()
        except (EOFError, OSError):
            raise self.ended() from None
        if isinstance(found, EndError):
            raise found
        return found

    def ended(self) -> EndError:
        """How the process ended, in words."""
        self.process.join(10)
        status = self.process.exitcode
        if status is not None and status < 0:
            return EndError(f"its process died of {signal.Signals(-status).name}")
        return EndError(f"its process ended with status {status}")

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
