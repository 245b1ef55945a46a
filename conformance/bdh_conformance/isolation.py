"""A port in a process of its own: one that dies, hangs or takes all memory is a finding, and the other checks go on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from bdh_conformance.files.vectors import Judged, origin
from bdh_conformance.outcomes import Outcome, Result
from bdh_conformance.plan import TIERS, Check, plan
from bdh_conformance.ports import find_port
from bdh_conformance.runner import Run
from bdh_conformance.yardstick.cases import Case
from bdh_spec import Backend
from bdh_spec.rope import Phase

LOOK = 0.1  # seconds between two looks at the process
HANGS = 3  # after which a port is not waited for any more
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

    def run(self, kind: type[Run] = Run) -> Run:
        """The port, loaded, and nothing known of it yet."""
        return kind(find_port(self.port), self.device, self.seed, self.port)

    def checks(self, backend: Backend) -> list[Check]:
        """Everything that is looked at."""
        case = Case.parse(self.case) if self.case else None
        tier, capabilities = TIERS[self.tier], backend.capabilities
        return plan(tier, capabilities, dtypes=self.dtypes, channels=self.channels, phases=self.phases, case=case)


@dataclass(frozen=True)
class Limits:
    """What a port may take for one case."""

    seconds: float
    gigabytes: float


class Announcing(Run):
    """A run that says which case it begins."""

    pipe: Connection

    def judged(self, check: Check, judged: Judged) -> Outcome:
        self.pipe.send(str(origin(judged)))
        return super().judged(check, judged)

    def compared(self, check: Check, case: Case) -> Outcome:
        self.pipe.send(str(case))
        return super().compared(check, case)


def serve(request: Request, pipe: Connection) -> None:
    """Run the checks whose numbers come through the pipe; send back what was found. The work of the other process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sees to it
    os.dup2(2, 1)  # what a port prints is no answer
    run = request.run(Announcing)
    assert isinstance(run, Announcing)
    run.pipe, checks = pipe, request.checks(run.backend)
    while True:
        run.coverage.clear()
        result = run.run(checks[pipe.recv()])
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

    def run(self, number: int, check: Check) -> Result:
        """One check; an error with its case if the process did not survive it."""
        empty = Result(check.channel.name, check.level, check.dtype, check.phase, reason=check.reason)
        if check.reason:
            return empty
        if self.hangs >= HANGS:
            return self.failed(empty, "", f"it was not run: the port has hung {HANGS} times")
        if self.process is None:
            self.start()
        assert self.process is not None
        assert self.pipe is not None
        begun, case = time.perf_counter(), ""
        try:
            self.pipe.send(number)
            while not isinstance(case := self.answer(case), tuple):
                pass
        except EndError as end:
            self.stop()
            return self.failed(replace(empty, seconds=time.perf_counter() - begun), end.case, end.sentence)
        result, coverage = case
        self.coverage.update(coverage)
        return result

    def answer(self, case: str) -> Any:
        """The next message, or the end of the process while it worked on ``case``."""
        assert self.process is not None
        assert self.pipe is not None
        deadline = time.monotonic() + self.limits.seconds
        while not self.pipe.poll(LOOK):
            if not self.process.is_alive():
                raise EndError(case, died(self.process.exitcode))
            if time.monotonic() > deadline:
                self.hangs += 1
                raise EndError(case, f"no answer for {self.limits.seconds:g} s: --time-limit allows more")
            if resident(self.process.pid) > self.limits.gigabytes * GIGABYTE:
                raise EndError(case, f"it took more than {self.limits.gigabytes:.3g} GB: --memory-limit allows more")
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join(self.limits.seconds)
            raise EndError(case, died(self.process.exitcode)) from None

    def failed(self, result: Result, case: str, sentence: str) -> Result:
        """A finding about a process that gave no answer."""
        r, again = self.request, f" --case '{case}'" if case else ""
        device = f" --device {r.device}" if r.device else ""
        line = f"bdh-conform {r.port}{device} --channel {result.channel} --dtype {result.dtype}{again} --in-process"
        message = f"{r.port} gives no answer in {result.channel}: {sentence}\n  {line}"
        where = (result.channel, result.dtype, result.phase, case)
        result.add(Outcome(*where, "", "error", float("inf"), 0.0, message))
        return result

    def start(self) -> None:
        """A fresh process: spawned, because frameworks do not survive a fork."""
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(self.request, theirs), daemon=True)
        self.process.start()
        theirs.close()

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
