"""Node, where this machine has it, and questions to the port in JavaScript."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import bdh_spec
from bdh_look.live import JAVASCRIPT
from bdh_spec import BDHConfig, Params

Ask = Callable[..., bytes]


@pytest.fixture(scope="session")
def node() -> str:
    found = shutil.which("node")
    if found is None:
        pytest.skip("no node, which runs the port in JavaScript: install nodejs")
    return found


@pytest.fixture(scope="session")
def ask(node: str) -> Ask:
    """Ask the port something: the bytes of its answer."""

    def asked(*question: object, folder: Path = JAVASCRIPT) -> bytes:
        run = [node, str(Path(__file__).with_name("ask.mjs")), str(folder), *map(str, question)]
        done = subprocess.run(run, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    return asked


@pytest.fixture(scope="session")
def refusal(node: str) -> Callable[..., str]:
    """Ask the port something that it must refuse: its one sentence."""

    def asked(*question: object) -> str:
        run = [node, str(Path(__file__).with_name("ask.mjs")), str(JAVASCRIPT), *map(str, question)]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr or "it was not refused"
        (sentence,) = done.stderr.splitlines()
        return sentence

    return asked


@pytest.fixture(scope="session")
def small() -> tuple[Params, BDHConfig]:
    """A model with an odd multiplier and three heads, whose weights are large enough for its texts to differ."""
    config = BDHConfig(n_layer=3, n_embd=22, n_head=3, mlp_internal_dim_multiplier=6)
    return Params(*(20 * weight for weight in bdh_spec.init(config, np.random.default_rng(5)))), config
