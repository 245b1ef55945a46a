"""A port in a process of its own: one that dies, hangs or takes all memory is a finding, and the other checks go on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from bdh_conformance.files.vectors import Judged, origin
from bdh_conformance.outcomes import Outcome, Result
from bdh_conformance.plan import TIERS, Check, plan
from bdh_conformance.ports import PortError, find_port
from bdh_conformance.runner import Run, share
from bdh_conformance.yardstick.cases import Case
from bdh_spec import Backend, BDHError, Capabilities
from bdh_spec.rope import Phase

LOOK = 0.1  # seconds between two looks at the process
SUITE = 120.0  # seconds, at least, in which the suite does its own work between two cases, or a port is imported
LEAST = 10.0  # seconds that a port has for a case, however often it has hung
GIGABYTE = 2**30


@dataclass(frozen=True)
class Request:
    """What the command was asked for, in words that another process can read."""

    port: str
    tier: str
    device: str | None = None
    seed: int | None = None
    dtypes: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()
    phases: tuple[Phase, ...] = ()
    case: str | None = None
    minutes: float | None = None  # for which cases are drawn
    begun: float = field(default_factory=time.time)  # on the clock of all processes

    @property
    def until(self) -> float | None:
        """When the last case is drawn; None: when all are."""
        minutes = self.minutes or TIERS[self.tier].minutes
        return self.begun + 60 * minutes if minutes else None

    def run(self, kind: type[Run] = Run) -> Run:
        """The port, loaded, and nothing known of it yet."""
        return kind(find_port(self.port), self.device, self.seed, self.port)

    def checks(self, backend: Backend) -> list[Check]:
        """Everything that is looked at."""
        case = Case.parse(self.case) if self.case else None
        tier, capabilities = TIERS[self.tier].for_minutes(self.minutes), backend.capabilities
        return plan(tier, capabilities, dtypes=self.dtypes, channels=self.channels, phases=self.phases, case=case)


@dataclass(frozen=True)
class Limits:
    """What a port may take for one case."""

    seconds: float
    gigabytes: float


@dataclass(frozen=True)
class Introduction:
    """What a port says of itself."""

    name: str
    version: str
    devices: tuple[str, ...]
    capabilities: Capabilities

    def backend(self) -> Backend:
        """The port as it is known where its code is not: it answers for itself and loads nothing."""
        answers = {"version": lambda _: self.version, "devices": lambda _: self.devices, "_load": absent}
        known = {"name": self.name, "capabilities": self.capabilities}
        distant: Backend = type("Distant", (Backend,), answers | known)()
        return distant


def absent(*_: Any, **__: Any) -> Any:
    raise PortError("this port runs in another process: nothing can be loaded here")


class Announcing(Run):
    """A run that says which case it begins, and when the port is done with it."""

    pipe: Connection

    def judged(self, check: Check, judged: Judged) -> Outcome:
        with self.announced(str(origin(judged))):
            return super().judged(check, judged)

    def compared(self, check: Check, case: Case) -> Outcome:
        with self.announced(str(case)):
            return super().compared(check, case)

    @contextmanager
    def announced(self, case: str) -> Iterator[None]:
        self.pipe.send(case)
        yield
        self.pipe.send("")


def serve(request: Request, pipe: Connection) -> None:
    """Introduce the port, then run the checks whose numbers come through the pipe. The work of the other process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sees to it
    os.dup2(2, 1)  # what a port prints is no answer
    try:
        run = request.run(Announcing)
        backend = run.backend
        introduction = Introduction(backend.name, backend.version(), tuple(backend.devices()), backend.capabilities)
    except Exception as error:  # noqa: BLE001  a port may raise anything
        pipe.send(str(error) if isinstance(error, BDHError) else f"{request.port} fails: {type(error).__name__}: {error}")
        return
    assert isinstance(run, Announcing)
    run.pipe, checks = pipe, request.checks(run.backend)
    pipe.send(introduction)
    while True:
        run.coverage.clear()
        number = pipe.recv()
        result = run.run(checks[number], share(checks, number, request.until))
        worst = result.worst and replace(result.worst, compared=())
        pipe.send((replace(result, worst=worst), run.coverage))


@dataclass
class Isolated:
    """The checks of a request, run one after another in a process that is made anew whenever it ends."""

    request: Request
    limits: Limits
    process: BaseProcess | None = None
    pipe: Connection | None = None
    hangs: int = 0
    coverage: Counter[str] = field(default_factory=Counter)

    def introduced(self) -> Backend:
        """The port as it says it is."""
        try:
            return self.start().backend()
        except EndError as end:
            self.stop()
            raise PortError(f"{self.request.port} cannot be imported or made: {end.sentence}") from None

    def run(self, number: int, check: Check) -> Result:
        """One check; an error with its case if the process did not survive it."""
        empty = Result(check.channel.name, check.level, check.dtype, check.phase, reason=check.reason)
        if check.reason:
            return empty
        begun, case = time.perf_counter(), ""
        try:
            if self.process is None:
                self.start()
            assert self.pipe is not None
            self.pipe.send(number)
            while not isinstance(answer := self.answer(case), tuple):
                case = answer
        except EndError as end:
            self.stop()
            return self.failed(replace(empty, seconds=time.perf_counter() - begun), end.case, end.sentence)
        result, coverage = answer
        self.coverage.update(coverage)
        return result

    def found(self, run: Run, number: int, check: Check) -> Result:
        """The same, kept by the run of this process, with what its cases covered."""
        result = self.run(number, check)
        run.results.append(result)
        run.coverage.update(self.coverage)
        self.coverage.clear()
        return result

    def answer(self, case: str) -> Any:
        """The next message, or the end of the process while it worked on ``case``; on none, it is the suite that works."""
        assert self.process is not None
        assert self.pipe is not None
        seconds = self.patience if case else max(SUITE, self.limits.seconds)
        deadline = time.monotonic() + seconds
        while not self.pipe.poll(LOOK):
            if not self.process.is_alive():
                raise EndError(case, died(self.process.exitcode))
            if time.monotonic() > deadline:
                self.hangs += 1
                raise EndError(case, f"no answer for {seconds:g} s: --time-limit allows more")
            self.weigh(case)
        self.weigh(case)
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join(self.limits.seconds)
            raise EndError(case, died(self.process.exitcode)) from None

    @property
    def patience(self) -> float:
        """Seconds for one case: less for a port that has hung before, so that all checks get their turn."""
        return max(self.limits.seconds / 2**self.hangs, min(self.limits.seconds, LEAST))

    def weigh(self, case: str) -> None:
        """The end of a process that has become too large."""
        assert self.process is not None
        if resident(self.process.pid) > self.limits.gigabytes * GIGABYTE:
            raise EndError(case, f"it took more than {self.limits.gigabytes:.3g} GB: --memory-limit allows more")

    def failed(self, result: Result, case: str, sentence: str) -> Result:
        """A finding about a process that gave no answer."""
        r, again = self.request, f" --case '{case}'" if case else ""
        device = f" --device {r.device}" if r.device else ""
        phase = f" --phase {result.phase}" if result.phase != "exact" else ""
        line = f"bdh-conform {r.port}{device} --channel {result.channel} --dtype {result.dtype}{phase}{again} --in-process"
        message = f"{r.port} gives no answer in {result.channel}: {sentence}\n  {line}"
        where = (result.channel, result.dtype, result.phase, case)
        result.add(Outcome(*where, "", "error", float("inf"), 0.0, message))
        return result

    def start(self) -> Introduction:
        """A fresh process: spawned, because frameworks do not survive a fork."""
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(self.request, theirs), daemon=True)
        self.process.start()
        theirs.close()
        answer = self.answer("")
        if isinstance(answer, str):
            self.stop()
            raise PortError(answer)
        introduction: Introduction = answer
        return introduction

    def stop(self) -> None:
        """End the process, whatever it does."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
        self.process = self.pipe = None


class EndError(Exception):
    """The process has ended, or had to be ended."""

    def __init__(self, case: str, sentence: str) -> None:
        super().__init__(sentence)
        self.case, self.sentence = case, sentence


def died(status: int | None) -> str:
    """How a process ended, in words."""
    if status is not None and status < 0:
        return f"the process died of {signal.Signals(-status).name}"
    return f"the process ended with status {status}"


def resident(pid: int | None) -> int:
    """The bytes of memory that a process has, where the system tells it in a file."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)


def memory_of_the_machine() -> float:
    """Gigabytes, or any number where the system does not tell."""
    names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
    if sys.platform == "win32" or any(name not in os.sysconf_names for name in names):
        return float("inf")
    pages, size = (os.sysconf(name) for name in names)
    return pages * size / GIGABYTE
