"""Examples that measure run, and print what they promise."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

SCRIPT = Path(__file__).parents[2] / "examples" / "train_speed.py"
FOUND = importlib.util.spec_from_file_location("train_speed", SCRIPT)
SPEED = importlib.util.module_from_spec(FOUND)
FOUND.loader.exec_module(SPEED)


def test_the_speed_of_training_is_told_beside_that_of_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a process takes nine seconds and, for each step, half a second in bdh-train and one in the plain loop."""

    def seconds(command: list[str]) -> float:
        is_plain = "--plain" in command
        steps = int(command[command.index("--plain" if is_plain else "--max-steps") + 1])
        return 9 + steps * (1.0 if is_plain else 0.5)

    monkeypatch.setattr(SPEED, "seconds", seconds)
    said = CliRunner().invoke(SPEED.main, ["--steps", "7", "--rounds", "2"])
    assert said.output.splitlines() == [
        "bdh-train 4,096 tokens a second of one core, the plain loop 2,048",
        "bdh-train 4,096 tokens a second of one core, the plain loop 2,048",
        "bdh-train / plain: 2.00, ratio of medians; of single rounds from 2.00 to 2.00",
    ]


@pytest.mark.thorough  # four processes that train; of one step no speed can be told, where others work as well
def test_both_loops_of_that_example_run() -> None:
    run = [sys.executable, SCRIPT, "--steps", "1", "--rounds", "1"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ratio of medians" in done.stdout
