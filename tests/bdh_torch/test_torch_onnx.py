"""examples/onnx_port.py: one program of ONNX reads any number of texts of any length, as the specification does."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bdh_conformance.yardstick.agreement import assert_agrees
from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.tolerances import expect
from bdh_spec import BDHConfig, save
from bdh_spec.model import forward
from bdh_spec.params import Array, Params

SCRIPT = Path(__file__).parents[2] / "examples" / "onnx_port.py"
SIZES = BDHConfig(n_layer=2, n_embd=8, n_head=3, mlp_internal_dim_multiplier=12, vocab_size=11)
CASES = [Case(SIZES, batch, time, seed=2, scale=10) for batch, time in ((1, 1), (2, 3), (3, 40), (1, 600))]


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """The names of the example."""
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def load(example: dict[str, Any]) -> Callable[[Params], Any]:
    """Make a port's model of weights."""
    return lambda params: example["OnnxBackend"]().load(params, SIZES)


def test_one_program_reads_texts_of_all_sizes(load: Callable[[Params], Any]) -> None:
    params = CASES[0].params
    model = load(params)
    for case in CASES:

        def specified(params: Params, case: Case = case) -> dict[str, Array]:
            return {"logits": forward(case.tokens, params, SIZES)}

        assert_agrees("onnxruntime", {"logits": model.forward(case.tokens)}, expect(specified, params, "float32"), str(case))


def test_a_program_of_other_weights_is_found(load: Callable[[Params], Any]) -> None:
    params, case = CASES[0].params, CASES[1]
    model = load(params._replace(encoder=params.encoder_v, encoder_v=params.encoder))
    expected = expect(lambda params: {"logits": forward(case.tokens, params, SIZES)}, params, "float32")
    with pytest.raises(AssertionError):
        assert_agrees("onnxruntime", {"logits": model.forward(case.tokens)}, expected, str(case))


def test_the_command_writes_a_file_and_says_how_right_it_is(
    example: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case, file = CASES[2], tmp_path / "model.onnx"
    save(tmp_path / "m.safetensors", case.params, SIZES)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path / "m.safetensors"), str(file)])
    example["main"]()
    assert f"{file}: {file.stat().st_size:,} bytes, worst row " in capsys.readouterr().out
    (logits,) = example["session"](str(file)).run(None, {"tokens": case.tokens})
    assert np.isfinite(logits).all()
    assert logits.shape == (3, 40, 11)
    with pytest.raises(SystemExit, match="exists: choose another name"):
        example["main"]()


@pytest.mark.thorough  # a program for every case of other sizes
def test_onnxruntime_passes_the_suite_in_what_it_claims() -> None:
    words = ["--tier", "smoke", "--channel", "logits,batch,mutation,refusals", "--time-limit", "600"]
    command = [Path(sys.executable).with_name("bdh-conform"), "examples.onnx_port:OnnxBackend", *words]
    done = subprocess.run(command, cwd=SCRIPT.parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "onnxruntime passes: 4 passed" in done.stdout
