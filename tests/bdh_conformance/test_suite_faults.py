"""What the suite writes and reads when disks fail, files are hostile, and people interrupt."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bdh_conformance import cli
from bdh_conformance.files import fuzzed, vectors
from bdh_conformance.files.check import check
from bdh_convert import fuzz
from bdh_spec import BDHError, CheckpointError
from bdh_spec.files import read_safetensors

READERS = {"manifest": fuzzed.MANIFEST, "outputs": fuzzed.OUTPUTS, "output": fuzzed.OUTPUT}


@pytest.mark.parametrize("name", READERS)
def test_mutated_vectors_and_outputs_are_judged_or_refused(name: str) -> None:
    figures = fuzz.fuzzed(fuzz.of_others(*READERS[name]), 60)
    assert not figures.faults
    assert figures.runs == 60
    assert figures.read > 0


def test_the_fuzzer_knows_the_readers_of_the_suite() -> None:
    assert {"vectors", "outputs", "output"} <= set(fuzz.readers())


MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no object": lambda about: [],
    "a list as schema": lambda about: about | {"schema": ["\x1b[2J"]},
    "no files": lambda about: {key: value for key, value in about.items() if key != "files"},
    "files of a number": lambda about: about | {"files": 3},
    "a file of another folder": lambda about: about | {"files": {"../../../../etc/passwd": "0" * 64}},
    "no configuration": lambda about: about | {"config": None},
    "10^9 layers": lambda about: about | {"config": about["config"] | {"n_layer": 10**9}},
    "a width of control characters": lambda about: about | {"config": about["config"] | {"n_embd": "\x1b[2J"}},
    "no plan": lambda about: about | {"decode": {}},
    "a tensor that is not there": lambda about: (
        about | {"expected": {**about["expected"], "\x1b[2J": {"shape": [], "tolerance": {}}}}
    ),
    "no tolerance": lambda about: (
        about | {"expected": {name: told | {"tolerance": {}} for name, told in about["expected"].items()}}
    ),
    "a shape of text": lambda about: (
        about | {"expected": {name: told | {"shape": "x"} for name, told in about["expected"].items()}}
    ),
    "another phase": lambda about: about | {"phase": "\x1b[2J"},
}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    fuzzed.make(tmp_path)
    return tmp_path


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_hostile_manifest_is_one_sentence(what: str, made: Path) -> None:
    path = made / "vectors" / "case_1" / "manifest.json"
    path.write_text(fuzz.as_json(MANIFESTS[what](vectors.read_manifest(path.parent))).decode())
    begun = time.process_time()
    with pytest.raises(BDHError) as refused:
        check(made / "vectors", made / "outputs")
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 700
    assert time.process_time() - begun < 2


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("option", ["--json", "--junit", "--html", "--badge"])
def test_a_report_that_cannot_be_written_leaves_the_old_one(
    option: str, call: str, error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> None:
        raise OSError(error, os.strerror(error))

    path = tmp_path / "report.json"
    path.write_text("old")
    monkeypatch.setattr(os, call, fails)
    monkeypatch.setattr(sys, "argv", ["bdh-conform", "numpy", "--case", CASE, "--channel", "loss", "--dtype", "float32"])
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--in-process", "-q", option, str(path)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert f"could not be written ({os.strerror(error)})" in capsys.readouterr().err
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


CASE = "B1 T3 L1 h1 D4 N4 V5 m1 seed=7"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("fails_at", [1, 2, 3, 4, 9, 20])
@pytest.mark.parametrize("cases", [True, False])
def test_an_export_that_fails_leaves_no_half_of_a_set(
    cases: bool, fails_at: int, error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, write = [], Path.write_bytes

    def once(path: Path, data: bytes) -> int:
        calls.append(path)
        if len(calls) == fails_at:
            raise OSError(error, os.strerror(error))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", once)
    export = partial(vectors.export_cases, tmp_path / "v", [CASE]) if cases else partial(vectors.export, tmp_path / "v")
    with pytest.raises(BDHError, match=os.strerror(error)):
        export()
    assert list(tmp_path.iterdir()) == []
    export()
    assert all(vectors.read(folder) for folder in vectors.case_folders(tmp_path / "v"))


def test_an_error_of_the_disk_under_a_state_or_vectors_names_the_file(
    tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("safetensors.safe_open", fails)
    file = made / "vectors" / "case_1" / "inputs.safetensors"
    with pytest.raises(CheckpointError, match=r"inputs\.safetensors could not be read \(Input/output error\)"):
        read_safetensors(file)
    with pytest.raises(CheckpointError, match=r"inputs\.safetensors could not be read \(Input/output error\)"):
        vectors.read(file.parent)


def test_what_is_judged_is_never_touched(made: Path) -> None:
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    check(made / "vectors", made / "outputs")
    assert {path: path.read_bytes() for path in made.rglob("*") if path.is_file()} == before


COMMANDS = (
    ("bdh-convert", "--help"),
    ("bdh-generate", "--backends"),
    ("bdh-generate", "x", "--backend", "jax", "-n", "3"),
    ("bdh-conform", "mlx", "--tier", "smoke", "--dtype", "float32", "--channel", "loss"),
)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("wait", [0.15, 0.4, 0.8, 1.3, 2.0])
def test_an_interruption_while_a_command_is_imported_is_no_traceback(
    words: tuple[str, ...], wait: float, tmp_path: Path
) -> None:
    command = [Path(sys.executable).parent / words[0], *words[1:]]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        time.sleep(wait)
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)
    if "KeyboardInterrupt" in said and "bdh_" not in said.split("import main")[-1]:
        return  # Python itself was not ready yet: no line of ours had run
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    assert child.returncode in (0, 130, -signal.SIGINT)
    assert child.returncode != 130 or said.splitlines()[-1].startswith(f"{words[0]}: interrupted")


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("bdh-conform", "nô"), 2),
        (("bdh-conform", "numpy", "--baseline", "nô"), 2),
        (("bdh-conform", "vectors", "check", "nô", "nô"), 2),
        (("bdh-conform", "vectors", "export", "nô"), 0),
        (("bdh-generate", "ü", "-n", "2", "--backend", "numpy"), 0),
        (("bdh-generate", "ü", "nô.pt"), 2),
        (("bdh-generate", "--backends"), 0),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, tuple) else str(words),
)
def test_a_terminal_of_ascii_gets_answers_from_every_command(words: tuple[str, ...], status: int, tmp_path: Path) -> None:
    command = [Path(sys.executable).parent / words[0], *words[1:]]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False, timeout=120)
    assert b"Traceback" not in done.stderr
    assert done.returncode == status
