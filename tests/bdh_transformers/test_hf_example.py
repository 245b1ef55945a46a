"""examples/train_transformers.py as its user runs it: a process that trains, measures, writes, saves, and can be stopped."""

from __future__ import annotations

import importlib.util
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import bdh_transformers

SCRIPT = Path(__file__).parents[2] / "examples" / "train_transformers.py"
SMALL = ["--steps", "200", "--window", "32", "--width", "16", "--multiplier", "4", "--layers", "2"]


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a text that is soon learned."""
    file = tmp_path_factory.mktemp("texts") / "dragon"
    file.write_text("The dragon hatches, and the dragon flies. " * 100)
    return file


def start(file: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), "--file", str(file), "--out", str(out), *SMALL, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace")


class Run(NamedTuple):
    """A run that has come to its end."""

    out: Path
    answer: str
    talk: str


@pytest.fixture(scope="module")
def run(short: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "out"
    process = start(short, out)
    answer, talk = process.communicate()
    assert process.returncode == 0, talk
    return Run(out, answer, talk)


def test_a_run_measures_and_writes(run: Run) -> None:
    measure, text = run.answer.split("\n", 1)
    perplexity, bits = re.fullmatch(r"held out: perplexity (\S+) per byte, (\S+) bits per byte", measure).groups()
    assert float(perplexity) == pytest.approx(2 ** float(bits), rel=0.01)
    assert float(bits) < 2  # of 8 before it has learned anything
    assert text.startswith("The ")
    assert f"step 200 of 200: held out {bits} bits per byte" in run.talk


def test_what_a_run_saves_is_what_from_pretrained_loads(run: Run) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run.out), AutoTokenizer.from_pretrained(run.out)
    assert isinstance(model, bdh_transformers.BDHForCausalLM)
    ids = tokenizer("The dragon hatches", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [list(b"The dragon hatches")]
    with torch.no_grad():
        assert model(ids, labels=ids).loss < 2


def test_ctrl_c_saves_and_resume_ends_with_the_weights_of_a_run_that_went_through(
    run: Run, short: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stopped = start(short, out)
    while "step 50 of 200" not in stopped.stderr.readline():
        assert stopped.poll() is None
    stopped.send_signal(signal.SIGINT)
    _, talk = stopped.communicate()
    assert stopped.returncode == 130
    (step,) = re.findall(r"train_transformers: stopped after step (\d+), which is saved: go on with --resume", talk)
    assert (out / f"checkpoint-{step}").is_dir()
    resumed = start(short, out, "--resume")
    _, talk = resumed.communicate()
    assert resumed.returncode == 0
    assert "step 50 of 200" not in talk
    weights = load_file(out / "model.safetensors")
    for name, weight in load_file(run.out / "model.safetensors").items():
        torch.testing.assert_close(weights[name], weight)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one sentence of a run that was refused."""
    found = importlib.util.spec_from_file_location("train_transformers", SCRIPT)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)

    def sentence(*options: object) -> str:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, options)])
        with pytest.raises(SystemExit) as stopped:
            module.main()
        assert stopped.value.code == 2
        answer, talk = capsys.readouterr()
        assert answer == ""
        assert talk.count("\n") == 1
        return talk

    return sentence


def test_bad_input_gets_one_sentence(refused: Callable[..., str], short: Path, tmp_path: Path) -> None:
    missing, few, out = tmp_path / "none", tmp_path / "few", tmp_path / "out"
    few.write_text("few")
    assert "'--file'" in refused("--file", missing, "--out", out)
    assert "the text has 3 bytes: give at least 2560" in refused("--file", few, "--out", out)
    assert "is not empty: give another --out" in refused("--file", short, "--out", tmp_path)
    assert "no checkpoint to go on from" in refused("--file", short, "--resume", "--out", out)
    assert "341 neurons per head" in refused("--file", short, "--heads", 3, "--out", out)
    assert "'--attn'" in refused("--attn", "sdpa")
    assert not out.exists()


@pytest.mark.thorough  # two more trainings
def test_the_flags_of_the_script_that_it_replaces(short: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = ["--batch_size", "4", "--learning_rate", "1e-2", "--weight_decay", "0.05", "--validation", "0.25", "--best-model"]
    process = start(short, out, *recipe, "--steps", "8")
    answer, talk = process.communicate()
    assert process.returncode == 0, talk
    arguments = torch.load(out / "training_args.bin", weights_only=False)
    assert (arguments.per_device_train_batch_size, arguments.learning_rate, arguments.weight_decay) == (4, 1e-2, 0.05)
    assert arguments.load_best_model_at_end
    measured = [float(bits) for bits in re.findall(r"held out (\S+) bits per byte", talk)]
    assert float(re.findall(r"(\S+) bits per byte", answer)[0]) == min(measured)
    refused = start(short, tmp_path / "other", "--validation", "1")
    _, said = refused.communicate()
    assert refused.returncode == 2
    assert said.strip().endswith("leaves nothing to learn or nothing to measure on: give a share such as 0.1")
