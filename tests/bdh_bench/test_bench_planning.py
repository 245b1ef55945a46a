"""What is run, at which size, in which order; and what is said where something is not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bdh_bench import counts, measure
from bdh_bench.machine import available_memory, facts, forget_peak, peak, resident
from bdh_bench.measure import Attempt, Session, Settings, fit, groups, take_turns
from bdh_bench.plot import plot
from bdh_bench.results import RowResult, SideResult, ratio, read_json, write_json
from bdh_bench.rows import KINDS, Row, RowsError, chosen, standard
from bdh_bench.sides import AGAIN, COMPILED, OURS, PLAIN, READ, BenchError, Task
from bdh_bench.table import markdown
from bdh_bench.worker import EndError, Limits, Ready
from bdh_spec import BDHConfig

Made = Callable[..., Task]
BASE = BDHConfig()


def attempt(task: Task) -> Attempt:
    return Attempt(task, SideResult(task.side))


def test_the_rows_are_those_of_the_table() -> None:
    names = [row.name for row in standard(KINDS)]
    assert names[:6] == [*(f"forward T={T}" for T in (128, 512, 2048, 8192, 32768)), "prefill T=128"]
    assert [name for name in names if name.startswith("train")] == [
        "train B=2 T=256",
        "train B=4 T=512",
        "train B=1 T=2048",
        "train B=1 T=8192",
    ]
    assert len([name for name in names if name.startswith("decode")]) == 12
    assert {"decode B=1 context=16", "decode B=64 context=100000", "transformers D=64", "convert verified"} <= set(names)
    assert "train B=32 T=512" in [row.name for row in standard(["train"], accelerated=True)]
    assert "train B=32 T=512" not in names


def test_rows_are_chosen_by_pattern_and_a_pattern_that_matches_nothing_is_refused() -> None:
    rows = standard(["decode", "train"])
    assert [row.name for row in chosen(rows, ["decode B=1 *=16", "train B=2*"])] == ["train B=2 T=256", "decode B=1 context=16"]
    assert chosen(rows, []) == rows
    with pytest.raises(RowsError, match=r"no row matches 'forward\*': there are train B=2 T=256, "):
        chosen(rows, ["decode*", "forward*"])


def test_a_port_that_cannot_fit_is_not_run(task: Made, limits: Limits) -> None:
    ours = attempt(task("torch", OURS, Row("decode", 64, 4096), config=BASE))
    assert not fit(ours, limits, 600)
    assert ours.result.notes == ["does not fit: it needs at least 12.0 GB, and 0.9 are free"]
    assert not ours.result.failed
    assert fit(attempt(task("torch", OURS, Row("forward", 1, 8192), config=BASE)), limits, 600)  # it may be clever


def test_a_plain_form_that_cannot_fit_is_run_smaller_and_scaled_by_flop(task: Made, limits: Limits) -> None:
    plain = attempt(task("torch", PLAIN, Row("forward", 1, 8192), config=BASE))
    assert fit(plain, limits, 1e9)
    assert plain.task.row == Row("forward", 1, 512)
    assert counts.plain_memory(Row("forward", 1, 1024), BASE, 4) > 0.9 * limits.available
    whole, part = (counts.executed_flop(row, BASE) for row in (Row("forward", 1, 8192), plain.task.row))
    assert plain.scale == pytest.approx(whole / part)
    assert plain.result.notes == ["would take 9.0 GB"]  # 6 of width N, 2 of squares, 1 of tables


def test_a_plain_form_that_would_take_too_long_is_run_smaller(task: Made, limits: Limits) -> None:
    roomy = replace(limits, available=2**40)
    plain = attempt(task("torch", PLAIN, Row("forward", 1, 2048), config=BASE))
    assert fit(plain, roomy, 600)
    assert plain.task.row.length == 512  # 2.3 TFLOP at 3 GFLOP/s are 750 s, and those of T = 512 are 90
    assert "would take about" in plain.result.notes[0]
    again = attempt(task("mlx", AGAIN, Row("decode", 1, 100_000), config=BASE))
    assert fit(again, roomy, 600)
    assert again.task.row.length < 1000
    assert again.task.row.batch == 1


def test_what_is_decoded_shrinks_by_texts_and_what_cannot_shrink_is_said(task: Made, limits: Limits) -> None:
    plain = attempt(task("torch", PLAIN, Row("decode", 64, 512), config=BASE))
    assert fit(plain, limits, 600)
    assert plain.task.row == Row("decode", 2, 512)
    assert plain.scale == 32
    hopeless = attempt(task("torch", PLAIN, Row("decode", 1, 512), config=BASE))
    assert not fit(hopeless, replace(limits, available=2**20), 600)
    assert hopeless.result.notes == ["does not fit: would take 0.4 GB"]


def test_sides_that_do_not_fit_together_are_not_in_turns(task: Made) -> None:
    two = [attempt(task("torch", side, Row("decode", 1, 512), config=BASE)) for side in (OURS, PLAIN)]
    assert groups(two, 2**30) == [two]
    assert groups(two, 2**29) == [[two[0]], [two[1]]]


class Talking:
    """A side that answers, and writes down when it was asked."""

    def __init__(self, name: str, log: list[str], fails: int = -1, slow: float = 0) -> None:
        self.name, self.log, self.fails, self.slow = name, log, fails, slow

    def ask(self, message: object, deadline: float) -> float:
        if self.log.count(self.name) == self.fails:
            raise EndError("its process died of SIGSEGV")
        self.log.append(self.name)
        time.sleep(self.slow)
        return 1.0

    def stop(self) -> None:
        self.log.append(f"{self.name} stopped")


def talking(task: Made, log: list[str], side: str, first: float = 0.01, **how: float) -> Attempt:
    made = attempt(task("torch", side, Row("forward", 1, 8)))
    made.worker, made.ready = Talking(side, log, **how), Ready(first, 1, "")  # type: ignore[arg-type,assignment]
    return made


def test_sides_take_turns(task: Made) -> None:
    log: list[str] = []
    sides = [talking(task, log, side) for side in (OURS, PLAIN)]
    take_turns(sides, 3, time.monotonic() + 100)
    assert log == [OURS, PLAIN] * 3
    assert [side.result.seconds for side in sides] == [[1.0] * 3] * 2


def test_a_side_that_dies_in_its_turn_is_said_and_the_other_goes_on(task: Made) -> None:
    log: list[str] = []
    ours, plain = talking(task, log, OURS), talking(task, log, PLAIN, fails=1)
    take_turns([ours, plain], 3, time.monotonic() + 100)
    assert len(ours.result.seconds) == 3
    assert plain.result.failed
    assert plain.result.notes == ["its process died of SIGSEGV"]
    assert plain.result.seconds == []


def test_rounds_end_with_the_time_and_the_first_run_counts_where_there_is_none(task: Made) -> None:
    log: list[str] = []
    late = [talking(task, log, side, first=50.0) for side in (OURS, PLAIN, COMPILED)]
    take_turns(late, 3, time.monotonic() + 149)
    assert log == []
    assert [side.result.seconds for side in late] == [[50.0], [50.0], []]  # the last of which has spent its first on compiling
    assert late[0].result.notes == ["one run, the first"]
    assert late[2].result.notes == ["no round in time after the first run, which compiles"]
    some = talking(task, log, OURS)
    take_turns([some], 3, time.monotonic() + 0.5)
    assert some.result.notes == ["1 of 3 rounds in time"]


def test_seconds_of_a_smaller_run_are_scaled(task: Made) -> None:
    plain = talking(task, [], PLAIN)
    plain.scale = 16.0
    take_turns([plain], 2, time.monotonic() + 100)
    assert plain.result.seconds == [16.0, 16.0]


def test_a_ratio_is_of_medians_and_its_spread_of_rounds() -> None:
    assert ratio([2.0, 30.0, 4.0], [1.0, 2.0, 2.0]).of_medians == 2.0
    assert ratio([2.0, 30.0, 4.0], [1.0, 2.0, 2.0]).low == 2.0
    assert ratio([2.0, 30.0, 4.0], [1.0, 2.0, 2.0]).high == 8.5
    assert ratio([3.0], [2.0]).low == 1.5


def test_a_run_whose_budget_is_spent_says_so(tmp_path: Path) -> None:
    session = Session(Settings(BASE, budget=0.0), tmp_path, print)
    session.started -= 1
    (found,) = session.rows(["numpy"], [Row("forward", 1, 128)])
    assert found.note == "not measured: the 0 s of this run were spent"
    assert not found.failed


def test_a_reference_that_does_not_fit_or_takes_long_is_said(
    task: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(Settings(BASE, max_seconds=10), tmp_path, print)
    monkeypatch.setattr(measure, "float64_speed", lambda: 1e10)
    said = session.reference(task("torch", OURS, Row("forward", 1, 32768), config=BASE))
    assert isinstance(said, str)
    assert said.startswith("float64 would take about 6")
    monkeypatch.setattr(measure.machine, "available_memory", lambda: 2**30)
    said = session.reference(task("torch", OURS, Row("train", 4, 512), config=BASE))
    assert isinstance(said, str)
    assert said.startswith("float64 does not fit: it would take 17.6 GB")


def test_the_tokens_of_a_context_are_read_up_to_a_length_and_all_texts_are_one_text(task: Made) -> None:
    far = task("mlx", OURS, Row("decode", 2, 4096))
    assert far.tokens().shape == (2, READ)
    assert far.text().shape == (2, 4097)
    near = task("mlx", OURS, Row("decode", 2, 16))
    assert (near.text()[:, :-1] == near.tokens()).all()
    assert (near.text()[:, -1:] == near.next()).all()


def test_the_peak_of_memory_is_seen_and_forgotten() -> None:
    before = resident()
    held = bytearray(200 << 20)
    del held
    assert peak() >= before + (190 << 20)
    forget_peak()
    if Path("/proc/self/clear_refs").exists():
        assert peak() < before + (100 << 20)
    assert 0 < available_memory() < 2**62
    assert {"cpu", "cores", "memory", "python", "numpy"} <= set(facts())


def result(length: int, limits: Limits, **plain: object) -> RowResult:
    row = Row("forward", 1, length)
    found = RowResult(row, "torch", "float32", "cpu", limits=limits, needed_flop=10**9, needed_bytes=10**8)
    found.sides = [SideResult(OURS, [0.5, 1.0, 1.5], memory=2**20, error=1e-7), SideResult(PLAIN, [2.0, 2.0, 3.0])]
    for name, value in plain.items():
        setattr(found.sides[1], name, value)
    return found


def test_shares_are_of_the_limits_that_were_measured(limits: Limits) -> None:
    found = result(512, limits)
    assert found.of_peak(found.sides[0]) == pytest.approx(10**9 / 1.0 / 1e10)
    assert found.of_copy(found.sides[1]) == pytest.approx(10**8 / 2.0 / 1e10)
    assert found.tokens_per_second(found.sides[1]) == 256
    assert found.ratios()[PLAIN].of_medians == 2.0


def test_a_file_says_what_a_machine_needs_and_holds_no_number_that_is_none(limits: Limits, tmp_path: Path) -> None:
    rows = [
        result(512, limits, error=float("inf")),
        RowResult(Row("convert", variant="verified"), "bdh-convert", "float32", "cpu"),
    ]
    write_json(tmp_path / "b.json", facts(), BASE, {"rounds": 3}, rows)
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["schema"] == 1
    assert found["limits"][0] | {"facts": {}} == {
        "port": "torch",
        "dtype": "float32",
        "device": "cpu",
        "flops": 1e10,
        "copy": 1e10,
        "available": 2**30,
        "facts": {},
    }
    assert found["rows"][0]["sides"][1]["error"] == "not finite"
    assert found["rows"][0]["ratios"]["plain"]["of_medians"] == 2.0
    assert found["rows"][1]["sides"] == []


def test_a_file_is_read_as_it_was_written(limits: Limits, tmp_path: Path) -> None:
    rows = [
        result(512, limits, error=float("inf"), notes=["one run, the first"]),
        RowResult(Row("convert", variant="verified"), "bdh-convert", "float32", "cpu", note="no room"),
    ]
    write_json(tmp_path / "b.json", facts(), BASE, {"rounds": 3}, rows)
    assert read_json(tmp_path / "b.json") == (facts(), BASE, rows)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"machine": {}, "config": {}, "limits": [], "rows": [{}]}', '{"limits": [1]}']
)
def test_another_file_is_refused_in_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(BenchError, match="is no file that --json of this bdh-bench wrote"):
        read_json(tmp_path / "b.json")


def test_a_page_has_a_line_to_a_row(limits: Limits) -> None:
    without = RowResult(Row("train", 2, 64), "torch", "float32", "cpu")
    rows = [result(512, limits), result(2048, limits, extrapolated_from="forward T=2048"), without]
    assert markdown(rows) == [
        "| row | port | dtype | ours | plain | of peak | of copy | MB above weights | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| forward T={T} | torch | float32 | 1 s | 2 s (2.00{how}) | 10% | 1% | 1, - | 1.0e-07 |"
            for T, how in ((512, ""), (2048, ", by FLOP"))
        ),
    ]


@pytest.mark.parametrize("name", ["b.png", "b.svg"])
def test_a_plot_is_drawn(limits: Limits, tmp_path: Path, name: str) -> None:
    rows = [result(T, limits, extrapolated_from="forward T=512" if T > 512 else None) for T in (128, 512, 2048)]
    plot(tmp_path / name, rows, BASE)
    head = (tmp_path / name).read_bytes()[:8]
    assert head.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")


class Process:
    """A side's process that breaks where a text is longer than 64, or at every size."""

    hopeless = False

    def __init__(self, work: object, asked: Task, answer: str) -> None:
        self.asked = asked

    def answer(self, deadline: float) -> Ready:
        if self.hopeless or self.asked.row.length > 64:
            raise EndError("out of memory")
        return Ready(0.5, 1, "")

    def ask(self, message: object, deadline: float) -> float | int:
        return 7 if message is None else 0.5

    def stop(self) -> None:
        pass


def test_a_plain_form_that_breaks_is_tried_at_half_the_size(
    task: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "Worker", Process)
    session = Session(Settings(BASE, rounds=2), tmp_path, print)
    ours, plain = (attempt(task("torch", side, Row("forward", 1, 64 * (1 + i)))) for i, side in enumerate((OURS, PLAIN)))
    session.together([ours, plain], time.monotonic() + 100)
    assert ours.result.memory == 7
    assert plain.result.notes == ["forward T=128: out of memory"]
    assert plain.result.extrapolated_from == "forward T=64"
    assert plain.result.memory is None  # nobody can scale it
    assert plain.result.median == pytest.approx(0.5 * plain.scale)
    assert plain.scale > 2


def test_a_side_that_breaks_at_every_size_is_said_and_ours_is_tried_once(
    task: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "Worker", Process)
    monkeypatch.setattr(Process, "hopeless", True)
    session = Session(Settings(BASE, rounds=2), tmp_path, print)
    for side, tries in ((PLAIN, 3), (OURS, 1)):
        one = attempt(task("torch", side, Row("forward", 1, 1024)))
        session.load(one, time.monotonic() + 100)
        assert one.result.failed
        assert one.ready is None
        assert len(one.result.notes) == (1 if side == OURS else tries + 1)
