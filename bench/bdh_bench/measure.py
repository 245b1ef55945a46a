"""Rows, one after another: each side in a process of its own, all sides of a row in turns."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from bdh_bench import counts, machine
from bdh_bench.conversion import conversion
from bdh_bench.reference import COMPARED, cost, worst_error
from bdh_bench.results import RowResult, SideResult
from bdh_bench.rows import Row
from bdh_bench.sides import AGAIN, COMPILED, OURS, READ, Named, Task, sides_of
from bdh_bench.worker import EndError, LateError, Limits, Ready, Worker, limits, load_answer, measure, refer, seconds
from bdh_spec import BDHConfig

Say = Callable[[str], None]

FITS = 0.9  # of the memory that is free
USUAL_SPEED = 0.3  # of its peak at which a plain form multiplies, to foresee its time
FEWEST = 3  # runs of a plain form that its share of the time must allow: the first, and two rounds
SHARE = 0.5  # of what is left of a row's time that one side may load and run once in
OUR_SHARE = 0.7
TRIES = 3  # sizes that a plain form is tried at
SOON = 10.0  # seconds in which no other size is tried
LIMIT_SECONDS = 120.0
PARTING = 10.0  # seconds to tell the peak of memory
PROBE = 512  # of the product that tells float64's speed
# By whether a side compiles.
ONLY_FIRST = {False: "one run, the first", True: "no round in time after the first run, which compiles"}


@dataclass(frozen=True)
class Settings:
    """What a run was asked for."""

    config: BDHConfig
    dtypes: tuple[str, ...] = ("float32",)
    device: str | None = None
    rounds: int = 5
    max_seconds: float = 600.0  # of a row
    budget: float = float("inf")  # of the run
    seed: int = 0


@dataclass
class Attempt:
    """A side on its way: what is run, maybe smaller than the row, and what became of it."""

    task: Task
    result: SideResult
    scale: float = 1.0  # executed FLOP of the row over those of what is run
    worker: Worker | None = None
    ready: Ready | None = None

    @property
    def again(self) -> bool:
        return self.task.side == AGAIN

    def fail(self, why: str, *, broken: bool = False) -> None:
        """No figure; ``broken`` where that is somebody's fault."""
        self.result.notes.append(why)
        self.result.failed = broken
        self.stop()

    def stop(self) -> None:
        if self.worker is not None:
            self.worker.stop()
        self.worker = None

    def shrink(self) -> bool:
        """Go on with half the work, if there is a half."""
        row, config = self.task.row, self.task.config
        less = row.shorter() if self.again else row.smaller()
        if less is None:
            return False
        before, after = (counts.executed_flop(r, config, again=self.again) for r in (row, less))
        self.task, self.scale = replace(self.task, row=less), self.scale * before / after
        return True


@dataclass
class Session:
    """A run: its settings, and what its rows share."""

    settings: Settings
    folder: Path
    say: Say
    started: float = field(default_factory=time.monotonic)
    references: dict[Row, Named | str] = field(default_factory=dict)
    found_limits: dict[tuple[str, str], Limits | EndError] = field(default_factory=dict)

    def rows(self, ports: Sequence[str], rows: Sequence[Row]) -> Iterator[RowResult]:
        """Every row on every port and in every dtype, as soon as it is there. A conversion has neither."""
        for row in rows:
            for port in ports if row.kind != "convert" else ["bdh-convert"]:
                for dtype in self.settings.dtypes if row.kind != "convert" else ["float32"]:
                    self.say(f"{row.name}, {port}, {dtype}")
                    yield self.row(row, port, dtype)

    def row(self, row: Row, port: str, dtype: str) -> RowResult:
        """One row on one port."""
        s = self.settings
        if time.monotonic() - self.started > s.budget:
            return RowResult(row, port, dtype, "", note=f"not measured: the {s.budget:g} s of this run were spent")
        if row.kind == "convert":
            return conversion(row, s.config, s.rounds, s.seed, self.folder)
        if row.kind == "transformers" and port != "torch":
            return RowResult(
                row, port, dtype, "", note=f"not measured: transformers has a face of the torch port, not of {port}"
            )
        known = self.limits(port, dtype)
        if isinstance(known, EndError):
            result = RowResult(row, port, dtype, "", note=f"not measured: {known}")
            result.sides = [] if known.absent else [SideResult(OURS, notes=[str(known)], failed=True)]
            return result
        config = s.config
        if row.kind == "transformers":
            config = replace(config, n_embd=int(row.variant))
        return self.measured(Task(port, OURS, row, config, dtype, known.device, s.seed), known)

    def limits(self, port: str, dtype: str) -> Limits | EndError:
        """What the machine can do, found once."""
        if (port, dtype) not in self.found_limits:
            try:
                with Worker(limits, port, self.settings.device, dtype) as worker:
                    self.found_limits[port, dtype] = worker.answer(time.monotonic() + LIMIT_SECONDS)
            except EndError as end:
                self.found_limits[port, dtype] = end
        return self.found_limits[port, dtype]

    def measured(self, task: Task, known: Limits) -> RowResult:
        """All sides of a row."""
        result = RowResult(task.row, task.port, task.dtype, task.device, limits=known)
        if task.row.kind != "transformers":
            result.needed_flop = counts.needed_flop(task.row, task.config)
            result.needed_bytes = counts.needed_bytes(task.row, task.config, task.itemsize)
        expected = self.reference(task)
        deadline = time.monotonic() + self.settings.max_seconds
        attempts = [Attempt(replace(task, side=side), SideResult(side)) for side in sides_of(task)]
        result.sides = [attempt.result for attempt in attempts]
        fitting = [attempt for attempt in attempts if fit(attempt, known, self.settings.max_seconds)]
        for group in groups(fitting, known.available):
            if attempts[0] in group or attempts[0].result.seconds:
                self.together(group, deadline)
        for attempt in attempts:
            compare(attempt, expected)
            if not attempt.result.seconds and not attempt.result.notes:
                attempt.result.notes.append("not run, because ours gave no figure")
            if len(groups(fitting, known.available)) > 1 and attempt.result.seconds:
                attempt.result.notes.append("not in turns: all sides together do not fit")
        return result

    def reference(self, task: Task) -> Named | str:
        """The float64 answer to a row, found once, or why there is none."""
        if task.row.kind not in COMPARED:
            return f"{task.row.kind} is not compared"
        if task.row not in self.references:
            self.references[task.row] = self.refer(task)
        return self.references[task.row]

    def refer(self, task: Task) -> Named | str:
        takes, needs = cost(task, float64_speed())
        if needs > FITS * machine.available_memory():
            return f"float64 does not fit: it would take {needs / 2**30:.1f} GB"
        if takes > self.settings.max_seconds * SHARE:
            return f"float64 would take about {takes:.0f} s"
        try:
            with Worker(refer, task, str(self.folder / "reference.npz")) as worker:
                return load_answer(worker.answer(time.monotonic() + self.settings.max_seconds))
        except EndError as end:
            return f"float64 gave nothing: {end}"

    def together(self, group: list[Attempt], deadline: float) -> None:
        """Sides in turns: each loaded and run once, then round after round, each its turn."""
        try:
            for attempt in group:
                self.load(attempt, deadline)
                if attempt.task.side == OURS and attempt.ready is None:
                    return
            take_turns([a for a in group if a.ready], self.settings.rounds, deadline)
            for attempt in group:
                part(attempt)
        finally:
            for attempt in group:
                attempt.stop()

    def load(self, attempt: Attempt, deadline: float) -> None:
        """Start a side, at a smaller size if a plain form breaks at this one."""
        ours = attempt.task.side == OURS
        for _ in range(1 if ours else TRIES):
            path = str(self.folder / f"{attempt.task.side}.npz") if comparable(attempt) else ""
            attempt.worker = Worker(measure, attempt.task, path)
            left = deadline - time.monotonic()
            try:
                attempt.ready = attempt.worker.answer(time.monotonic() + left * (OUR_SHARE if ours else SHARE))
            except EndError as end:
                attempt.stop()
                said = f"{attempt.task.row.name}: {end}"
                final = end.absent or ours or attempt.task.row.kind == "transformers" or time.monotonic() + SOON > deadline
                if final or not attempt.shrink():
                    attempt.fail(str(end), broken=broke(end))
                    return
                attempt.result.notes.append(said)
            else:
                return
        attempt.fail("nor at smaller sizes", broken=True)


def fit(attempt: Attempt, known: Limits, max_seconds: float) -> bool:
    """Whether a side can be run; a plain form that cannot is made smaller until it can."""
    task, room = attempt.task, FITS * known.available
    if task.row.kind == "transformers":
        return True
    if task.side == OURS:
        needs = counts.least_memory(task.row, task.config)
        if needs > room:
            attempt.fail(f"does not fit: it needs at least {needs / 2**30:.1f} GB, and {room / 2**30:.1f} are free")
        return needs <= room
    why = ""
    while reason := too_large(attempt, room, known.flops, max_seconds):
        why = why or reason
        if not attempt.shrink():
            attempt.fail(f"does not fit: {why}")
            return False
    if why:
        attempt.result.notes.append(why)
    return True


def too_large(attempt: Attempt, room: float, flops: float, max_seconds: float) -> str:
    """Why a plain form is not run at this size, or nothing."""
    task = attempt.task
    needs = counts.plain_memory(task.row, task.config, task.itemsize, again=attempt.again)
    if needs > room:
        return f"would take {needs / 2**30:.1f} GB"
    takes = counts.executed_flop(task.row, task.config, again=attempt.again) / (USUAL_SPEED * flops)
    return f"would take about {takes:.0f} s" if FEWEST * takes > SHARE * max_seconds else ""


def groups(attempts: list[Attempt], available: int) -> list[list[Attempt]]:
    """The sides that can be in memory at once: all of them, or each by itself."""
    needs = sum(
        counts.least_memory(a.task.row, a.task.config)
        if a.task.side == OURS
        else counts.plain_memory(a.task.row, a.task.config, a.task.itemsize, again=a.again)
        for a in attempts
        if a.task.row.kind != "transformers"
    )
    return [attempts] if needs <= FITS * available else [[attempt] for attempt in attempts]


def take_turns(attempts: list[Attempt], rounds: int, deadline: float) -> None:
    """Round after round while there is time for another whole one; without any, the first run has to do."""
    found: dict[str, list[float]] = {attempt.task.side: [] for attempt in attempts}
    for done in range(rounds):
        turn = sum(max(found[a.task.side], default=first(a)) * repeats(a) for a in attempts)
        if time.monotonic() + turn > deadline:
            for attempt in attempts:
                attempt.result.notes.append(f"{done} of {rounds} rounds in time" if done else ONLY_FIRST[compiles(attempt)])
            break
        for attempt in [a for a in attempts if a.worker is not None]:
            assert attempt.worker is not None
            try:
                found[attempt.task.side].append(attempt.worker.ask(repeats(attempt), deadline + PARTING))
            except EndError as end:
                attempt.fail(str(end), broken=broke(end))
    for attempt in attempts:
        if attempt.worker is not None:
            attempt.result.first = attempt.scale * first(attempt)
            usable = [] if compiles(attempt) else [first(attempt)]
            attempt.result.seconds = [attempt.scale * s for s in found[attempt.task.side] or usable]


def compiles(attempt: Attempt) -> bool:
    """Whether the first run of a side compiles, so that its time says nothing of the next."""
    return attempt.task.side == COMPILED


def broke(end: EndError) -> bool:
    """Whether a side ended by a fault, and not because it does not exist here or was late."""
    return not end.absent and not isinstance(end, LateError)


def first(attempt: Attempt) -> float:
    assert attempt.ready is not None
    return attempt.ready.first


def repeats(attempt: Attempt) -> int:
    assert attempt.ready is not None
    return attempt.ready.repeats


def part(attempt: Attempt) -> None:
    """Ask for the peak of memory, which nobody scales, and say what was run if it was not the row."""
    if attempt.scale != 1 and attempt.result.seconds:
        attempt.result.extrapolated_from = attempt.task.row.name
    if attempt.worker is None:
        return
    try:
        peak = attempt.worker.ask(None, time.monotonic() + PARTING)
    except EndError as end:
        attempt.result.notes.append(f"no peak of memory: {end}")
    else:
        attempt.result.memory = peak if attempt.scale == 1 else None


def comparable(attempt: Attempt) -> bool:
    """Whether a side answers what the reference is asked: not where it reads another text, or a smaller one."""
    row = attempt.task.row
    return row.kind in COMPARED and attempt.scale == 1 and not (attempt.again and row.length > READ)


def compare(attempt: Attempt, expected: Named | str) -> None:
    """The error of what a side answered."""
    if attempt.ready is None or not attempt.ready.answer or isinstance(expected, str) or attempt.scale != 1:
        return
    attempt.result.error = worst_error(load_answer(attempt.ready.answer), expected)


def float64_speed() -> float:
    """FLOP a second of a float64 product in NumPy, roughly."""
    a = np.ones((PROBE, PROBE))
    return 2 * PROBE**3 / min(seconds(lambda: a @ a) for _ in range(3))


def run(settings: Settings, ports: Sequence[str], rows: Sequence[Row], say: Say) -> Iterator[RowResult]:
    """Measure, row after row."""
    with tempfile.TemporaryDirectory(prefix="bdh-bench-") as folder:
        yield from Session(settings, Path(folder), say).rows(ports, rows)
