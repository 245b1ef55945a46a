"""A port that dies, hangs or takes all memory is a finding with its case, and the other checks go on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bdh_conformance.isolation import LEAST, Isolated, Limits, Request

PORT = """
import ctypes, os, sys
import numpy as np
from bdh_spec import Capabilities
from bdh_spec.numpy_backend import NumpyBackend, NumpyModel

class Model(NumpyModel):
    def _loss(self, tokens, targets):
        {crash}
        return super()._loss(tokens, targets)

class Port(NumpyBackend):
    name = "crashing"
    capabilities = Capabilities(verbs=("forward", "loss"))
    def _load(self, params, config, **how):
        print("talk on stdout")
        return Model(params, config, **how)
"""


def conform(folder: Path, crash: str, *words: str) -> tuple[int, str, str]:
    """The command on a port that does something terrible in its loss."""
    (folder / "port.py").write_text(PORT.format(crash=crash))
    command = [sys.executable, "-m", "bdh_conformance", "port:Port", "--channel", "logits,loss,batch", "--dtype", "float32"]
    done = subprocess.run([*command, "--tier", "smoke", *words], cwd=folder, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("crash", "sentence"),
    [
        ("ctypes.string_at(0)", "the process died of SIGSEGV"),
        pytest.param("os.abort()", "the process died of SIGABRT", marks=pytest.mark.thorough),
        ("os._exit(3)", "the process ended with status 3"),
        pytest.param("sys.exit('enough')", "the process ended with status 1", marks=pytest.mark.thorough),
        pytest.param("raise KeyboardInterrupt", "the process ended with status 1", marks=pytest.mark.thorough),
        ("while True: pass", "no answer for 5 s"),
        ("self.taken = [np.ones(2**25) for _ in range(64)]", "it took more than 1 GB"),
    ],
)
def test_the_case_that_ended_a_port_is_named_and_the_other_checks_go_on(tmp_path: Path, crash: str, sentence: str) -> None:
    limit = "5" if "no answer" in sentence else "100"
    status, out, _ = conform(tmp_path, crash, "--time-limit", limit, "--memory-limit", "1")
    assert status == 1
    assert f"port:Port gives no answer in loss: {sentence}" in out
    assert "bdh-conform port:Port --channel loss --dtype float32 --case 'B2 T" in out
    assert "crashing fails: 3 passed, 1 error" in out
    assert "talk on stdout" not in out


def test_a_healthy_port_passes_and_each_check_is_told_where_nobody_watches(tmp_path: Path) -> None:
    status, out, err = conform(tmp_path, "pass")
    assert status == 0, out
    assert "loss/float32 passed after" in err
    assert "talk on stdout" in err
    assert conform(tmp_path, "pass", "--quiet")[2].count("passed") == 0


@pytest.mark.parametrize(
    ("port", "sentence"),
    [
        ("class Port(:", "port:Port cannot be imported (SyntaxError"),
        ("raise OSError('no device')", "port:Port cannot be imported (OSError: no device)"),
        ("class Port:\n    def __init__(self): raise OSError('no device')", "port:Port cannot be made (OSError: no device)"),
        ("Port = 3", "port:Port is no bdh_spec.Backend"),
        ("import os; os.abort()", "port:Port cannot be imported or made: the process died of SIGABRT"),
        ("import ctypes; ctypes.string_at(0)", "port:Port cannot be imported or made: the process died of SIGSEGV"),
    ],
)
def test_a_port_that_cannot_be_had_gets_one_sentence(tmp_path: Path, port: str, sentence: str) -> None:
    (tmp_path / "port.py").write_text(port)
    done = subprocess.run(
        [sys.executable, "-m", "bdh_conformance", "port:Port"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_port_that_dies_while_it_is_loaded_is_a_finding_of_every_check(tmp_path: Path) -> None:
    source = PORT.format(crash="pass").replace('        print("talk on stdout")', "        os.abort()")
    (tmp_path / "port.py").write_text(source)
    command = [sys.executable, "-m", "bdh_conformance", "port:Port", "--tier", "smoke", "--channel", "logits,loss"]
    done = subprocess.run([*command, "--dtype", "float32"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stdout.count("the process died of SIGABRT") == 3
    assert "crashing fails: 3 error" in done.stdout


def test_a_port_that_has_hung_waits_less_and_every_check_gets_its_turn() -> None:
    isolated = Isolated(Request("numpy", "smoke"), Limits(120.0, 1.0))
    assert isolated.patience == 120
    isolated.hangs = 2
    assert isolated.patience == 30
    isolated.hangs = 50
    assert isolated.patience == LEAST
    assert Isolated(Request("numpy", "smoke"), Limits(2.0, 1.0), hangs=9).patience == 2


# Stands before everything else in sys.meta_path, as if nobody had installed Hypothesis.
WITHOUT_HYPOTHESIS = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hypothesis":
            raise ModuleNotFoundError("No module named 'hypothesis'", name="hypothesis")
sys.meta_path.insert(0, Blocker())
from bdh_conformance.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (["numpy"], 2, "bdh-conform: hypothesis is not installed: pip install 'bdh-spec[conformance]'"),
        (["vectors", "export", "here"], 0, ""),
    ],
    ids=["suite", "vectors"],
)
def test_without_hypothesis_there_are_vectors_and_one_sentence(
    tmp_path: Path, words: list[str], status: int, sentence: str
) -> None:
    command = [sys.executable, "-c", WITHOUT_HYPOTHESIS, *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == status
    assert done.stderr.strip() == sentence
