"""bdh-bench as its user runs it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bdh_bench.cli import main
from bdh_bench.results import SCHEMA

TINY = ["--size", "hatchling", "--n-layer", "1", "--n-embd", "8", "--mlp-internal-dim-multiplier", "4", "--rounds", "2"]

PORTS = """
import os, sys, time
from bdh_spec.numpy_backend import NumpyBackend, NumpyModel

def port(crash):
    class Model(NumpyModel):
        def _forward(self, tokens):
            if tokens.shape[1] > 8:
                crash()
            return super()._forward(tokens)

    class Port(NumpyBackend):
        def _load(self, params, config, **how):
            print("talk on stdout")
            return Model(params, config, **how)

    return Port

Aborting, Exiting, Raising = port(os.abort), port(lambda: os._exit(3)), port(lambda: [][1])
Sleeping = port(lambda: time.sleep(1000))
"""

ROW_KEYS = {
    "name",
    "kind",
    "batch",
    "length",
    "variant",
    "port",
    "dtype",
    "device",
    "needed_flop",
    "needed_bytes",
    "note",
    "sides",
    "ratios",
}
SIDE_KEYS = {
    *("side", "seconds", "first", "median", "tokens_per_second", "memory", "of_peak", "of_copy", "error"),
    *("extrapolated_from", "note", "failed"),
}


def bench(folder: Path, *words: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "bdh_bench.cli", *words], cwd=folder, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "b.json").read_text())
    return found


def test_rows_are_measured_shown_and_written(tmp_path: Path) -> None:
    rows = "forward T=128,decode B=8 context=16,convert unverified"
    status, out, err = bench(
        tmp_path, *TINY, "--backend", "numpy", "--rows", rows, "--json", "b.json", "--plot", "b.svg", "--dtype", "f32,bf16"
    )
    assert status == 0, err
    assert "the numpy port has no bfloat16" in out
    assert "decode B=8 context=16" in out
    assert "GFLOP/s, copies" in out
    assert "forward T=128, numpy, float32" in err
    assert (tmp_path / "b.svg").stat().st_size > 1000
    found = read(tmp_path)
    assert found["schema"] == SCHEMA
    assert found["config"]["n_embd"] == 8
    assert found["settings"]["rows"] == ["forward T=128", "decode B=8 context=16", "convert unverified"]
    assert [row["name"] for row in found["rows"]] == [
        *["forward T=128"] * 2,
        *["decode B=8 context=16"] * 2,
        "convert unverified",
    ]
    for row in found["rows"]:
        assert set(row) == ROW_KEYS
        assert all(set(side) == SIDE_KEYS for side in row["sides"])
    forward, narrow, decode, _, convert = found["rows"]
    assert narrow["note"] == "not measured: the numpy port has no bfloat16"
    for row in (forward, decode):
        assert [side["side"] for side in row["sides"]] == ["ours", "plain"]
        for side in row["sides"]:
            assert len(side["seconds"]) == 2
            assert 0 < side["error"] < 1e-5
            assert 0 <= side["memory"] < 2**27
            assert 0 < side["of_peak"] < 2
            assert not side["failed"]
        assert row["ratios"]["plain"]["of_medians"] > 0
    assert [side["side"] for side in convert["sides"]] == ["ours", "cp"]
    assert all(len(side["seconds"]) == 2 for side in convert["sides"])
    (tmp_path / "other.json").write_text((tmp_path / "b.json").read_text().replace('"n_embd": 8', '"n_embd": 16'))
    status, out, err = bench(tmp_path, "show", "b.json", "b.json", "--markdown", "--plot", "again.svg")
    assert (status, err) == (0, "")
    assert "GFLOP/s, copies" in out
    assert out.count("| forward T=128 | numpy | float32 |") == out.count("| convert unverified |") == 2
    assert (tmp_path / "again.svg").stat().st_size > 1000
    status, out, _ = bench(tmp_path, "show", "b.json")
    assert status == 0
    assert "decode B=8 context=16" in out
    status, out, err = bench(tmp_path, "show", "b.json", "other.json")
    assert (status, out) == (2, "")
    assert err.startswith("bdh-bench: other.json is of another machine, of other versions or of another model than b.json")


def test_ports_that_break_are_said_each_with_its_end(tmp_path: Path) -> None:
    (tmp_path / "port.py").write_text(PORTS)
    names = "port:Aborting,port:Exiting,port:Raising"
    status, out, err = bench(tmp_path, "forward", *TINY, "--backend", names, "--rows", "forward T=128", "--json", "b.json")
    assert status == 1, err
    assert "talk on stdout" not in out
    ours, plain = zip(*(row["sides"] for row in read(tmp_path)["rows"]), strict=True)
    assert [side["note"] for side in ours] == [
        "its process died of SIGABRT",
        "its process ended with status 3",
        "IndexError: list index out of range",
    ]
    assert all(side["failed"] and not side["seconds"] for side in ours)
    assert {side["note"] for side in plain} == {"not run, because ours gave no figure"}


def test_a_row_that_hangs_is_ended_and_the_others_go_on(tmp_path: Path) -> None:
    (tmp_path / "port.py").write_text(PORTS)
    rows = ["--rows", "forward T=128,prefill T=128", "--max-seconds", "8", "--json", "b.json"]
    status, _, err = bench(tmp_path, "forward", *TINY, "--backend", "port:Sleeping", *rows)
    assert status == 0, err  # it may be slow, or the machine busy
    broken, whole = read(tmp_path)["rows"]
    assert broken["sides"][0]["note"] == "it ran out of time"
    assert len(whole["sides"][0]["seconds"]) == 2


def test_a_port_that_cannot_be_made_is_said_in_its_rows(tmp_path: Path) -> None:
    (tmp_path / "port.py").write_text("raise OSError('no such chip')")
    status, out, _ = bench(tmp_path, "forward", *TINY, "--backend", "port:Port", "--rows", "forward T=128")
    assert status == 1
    assert "port:Port cannot be made (OSError: no such chip)" in " ".join(out.replace("│", " ").split())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["forward", "--backend", "tensorflow"], "no port is named 'tensorflow': there are numpy, "),
        (["forward", "--dtype", "int8"], "no dtype is named 'int8': there are float32, bfloat16"),
        (["forward", "--backend", ","], "no port is named"),
        (["forward", "--size", "huge"], "'huge' is not one of"),
        (["--rounds", "0"], "0 is not in the range"),
        (["forward", "--rows", "decode*"], "no row matches 'decode*'"),
        (["forward", "--plot", "b.gif"], "b.gif is no picture that can be drawn: end it in .png or .svg"),
        (["decode", "--plot", "b.png"], "--plot draws forward rows over T"),
        (["forward", "--json", "no/such/b.json"], "no/such is not a folder"),
        (["forward", "--n-embd", "7", "--mlp-internal-dim-multiplier", "1", "--n-head", "7"], "neurons per head"),
        (["show", "absent.json"], "'absent.json' does not exist"),
        (["show"], "Missing argument 'FILES...'"),
        (["sideways"], "No such command 'sideways'"),
    ],
)
def test_misuse_is_one_sentence_and_exits_2(
    words: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bdh-bench", *words])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its own handlers
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr()
    assert end.value.code == 2
    assert said.out == ""
    assert said.err.startswith("bdh-bench: ")
    assert sentence in said.err
    assert len(said.err.splitlines()) == 1


def test_a_device_that_is_not_here_is_said(tmp_path: Path) -> None:
    status, out, _ = bench(tmp_path, "forward", *TINY, "--backend", "numpy", "--rows", "forward T=128", "--device", "tpu")
    assert status == 0
    assert "the numpy port has no device 'tpu' here: it has cpu" in out


def test_memory_of_decoding_is_the_same_at_every_position(tmp_path: Path) -> None:
    status, out, err = bench(tmp_path, "memory", "--backend", "numpy", "--more", "200")
    assert status == 0, err
    (line,) = [line for line in out.splitlines() if "numpy" in line]
    before, near, far, later = map(float, line.split("│")[2:6])
    assert before <= near <= far <= later < before + 60


def test_errors_are_shares_of_the_allowed_ones(tmp_path: Path) -> None:
    status, out, err = bench(tmp_path, "errors", "--backend", "numpy", "--seeds", "1")
    assert status == 0, err
    (line,) = [line for line in out.splitlines() if "float32" in line]
    shares = [float(cell) for cell in line.split("│")[4:11:2]]
    assert all(0 < share < 1 for share in shares)
