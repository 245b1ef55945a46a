"""Runs on several processes are those of one, and go on on another number of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import Said, launched

import bdh_spec
from bdh_conformance.yardstick.tolerances import FLOAT64
from bdh_spec import Spread, Team
from bdh_train import TrainConfig, TrainError
from bdh_train.cli import command
from bdh_train.together import spread_of

SIZES = ["--n-layer", "2", "--n-embd", "8", "--n-head", "2", "--mlp-internal-dim-multiplier", "4", "--dropout", "0"]
RECIPE = ["--block-size", "16", "--min-block-size", "4", "--batch-size", "4", "--accumulate", "2", "--schedule", "constant"]
OFTEN = ["--eval-every", "2", "--eval-batches", "2", "--checkpoint-every", "2", "--warmup-steps", "0", "--dtype", "float64"]


def trained(out: Path, processes: int, *words: str, port: str = "torch") -> Said:
    """A run of bdh-train in the folder ``out``, by a framework's own launcher."""
    return launched(port, processes, "-m", "bdh_train", *of(out, port), *words)


def of(out: Path, port: str = "torch") -> list[str]:
    return ["--out", str(out), "--backend", port]


def begun(text: Path, steps: int) -> list[str]:
    """The words of a run that begins."""
    return ["--data", str(text), "--max-steps", str(steps), *SIZES, *RECIPE, *OFTEN]


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_is_the_run(out: Path, whole: Path) -> None:
    """The same steps, each once, with the same losses, and the same model at the end."""
    assert [line["step"] for line in lines(out)] == [1, 2, 3, 4]
    for ours, theirs in zip(lines(out), lines(whole), strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(
            theirs, rel=FLOAT64
        )  # one that ends is measured once more
    for ours, theirs in zip(*(bdh_spec.read(folder / "model.safetensors")[0] for folder in (out, whole)), strict=True):
        assert np.linalg.norm(ours - theirs) <= FLOAT64 * np.linalg.norm(theirs)


@pytest.fixture
def whole(text: Path, tmp_path: Path) -> Path:
    """The run of this process alone."""
    command.main([*of(tmp_path / "whole"), *begun(text, 4), "-q"], standalone_mode=False)
    return tmp_path / "whole"


@pytest.mark.parametrize("port", ["torch", "jax", "mlx"])
def test_a_run_of_two_processes_is_that_of_one(text: Path, tmp_path: Path, whole: Path, port: str) -> None:
    """Of this port, and within rounding of float64 also that of PyTorch."""
    two = tmp_path / "two"
    done = trained(two, 2, *begun(text, 4), port=port)
    assert_is_the_run(two, whole)
    answers = [line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")]  # JAX's, of its connections
    assert answers == [str(two / "model.safetensors")], "it is said once"
    assert "shared 2 x 1" in done.stderr


def test_a_run_goes_on_on_another_number_of_processes(
    text: Path, tmp_path: Path, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    trained(run, 2, *begun(text, 2), "--neuron-parallel", "2")
    command.main([*of(run), "--resume", "--max-steps", "3", "--neuron-parallel", "1"], standalone_mode=False)
    said = capfd.readouterr().err
    assert "torch on cpu, float64, shared 1 x 2 made the steps so far, torch on cpu, float64 goes on" in said
    trained(run, 2, "--resume", "--max-steps", "4", "--shard-weights")
    assert_is_the_run(run, whole)


@pytest.mark.thorough
def test_what_two_processes_of_jax_keep_in_shares_goes_on_in_one(
    text: Path, tmp_path: Path, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    trained(run, 2, *begun(text, 2), "--shard-weights", port="jax")
    command.main([*of(run, "jax"), "--resume", "--max-steps", "4"], standalone_mode=False)
    said = capfd.readouterr().err
    assert "jax on cpu, float64, shared 2 x 1 with weights made the steps so far, jax on cpu, float64 goes on" in said
    assert_is_the_run(run, whole)


@pytest.mark.thorough
def test_a_run_of_four_processes_is_that_of_one(text: Path, tmp_path: Path, whole: Path) -> None:
    four = tmp_path / "four"
    trained(four, 4, *begun(text, 4), "--neuron-parallel", "2", "--shard-weights")
    assert_is_the_run(four, whole)


class Many(Team):
    rank, size = 1, 4


class OfTwoDevicesEach(Many):
    places = 8


def test_the_processes_of_a_launcher_share_batches_unless_told_otherwise() -> None:
    assert spread_of(TrainConfig(), Team()) is None
    assert spread_of(TrainConfig(), Many()) == Spread(4, 1)
    assert spread_of(TrainConfig(neuron_parallel=2, shard_weights=True), Many()) == Spread(2, 2, True)
    assert spread_of(TrainConfig(data_parallel=2), Team()) == Spread(2, 1)
    with pytest.raises(TrainError, match="data_parallel 2 x neuron_parallel 1 is not 4, the number of processes"):
        spread_of(TrainConfig(data_parallel=2), Many())
    assert spread_of(TrainConfig(neuron_parallel=2), OfTwoDevicesEach()) == Spread(4, 2)
    with pytest.raises(TrainError, match="data_parallel 4 x neuron_parallel 1 is not 8, the number of their devices"):
        spread_of(TrainConfig(data_parallel=4), OfTwoDevicesEach())
    with pytest.raises(TrainError, match="batch_size is 6, which does not divide among 4"):
        spread_of(TrainConfig(batch_size=6), Many())
