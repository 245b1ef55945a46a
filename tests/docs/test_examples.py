"""Examples that measure run, and print what they promise."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.thorough  # four processes that train
def test_the_speed_of_training_is_told_beside_that_of_a_plain_loop() -> None:
    run = [sys.executable, EXAMPLES / "train_speed.py", "--steps", "1", "--rounds", "1"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours, theirs, ratio = (
        float(number.replace(",", ""))
        for number in re.search(
            r"bdh-train ([\d,]+) tokens a second of one core, the plain loop ([\d,]+)\nbdh-train / plain: ([\d.]+), ratio of",
            done.stdout,
        ).groups()
    )
    assert ratio == pytest.approx(ours / theirs, rel=0.02)
