"""A BDH in PyTorch's own wrappers, in a loop of one's own, learns as it does alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bdh_conformance import assert_agrees
from bdh_conformance.yardstick.tolerances import FLOAT64, Expectation

sys.path.insert(0, str(Path(__file__).parent))
from wrapped_on_many import stepped

SCRIPT, TORCHRUN = Path(__file__).parent / "wrapped_on_many.py", Path(sys.executable).parent / "torchrun"


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_a_wrapped_model_learns_as_alone(wrapper: str, processes: int, tmp_path: Path) -> None:
    command = [TORCHRUN, "--standalone", "--nproc-per-node", str(processes), SCRIPT, wrapper, tmp_path / "weights.pt"]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    together = torch.load(tmp_path / "weights.pt")
    alone = {name: Expectation(weight.numpy(), FLOAT64, FLOAT64) for name, weight in stepped("", 0, 1).items()}
    assert_agrees(wrapper, {name: together[name].numpy() for name in alone}, alone)
