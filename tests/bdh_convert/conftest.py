"""Models to convert, and the command itself as a child process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import bdh_spec
from bdh_convert.cli import main
from bdh_spec import BDHConfig, Params
from bdh_spec.params import init

# Every shape that hides a transposition or a rounding: V = D, V != D, N = D, one head, three heads, odd multipliers.
CONFIGS = {
    "V=D": BDHConfig(n_layer=2, n_embd=8, n_head=2, mlp_internal_dim_multiplier=3, vocab_size=8, dropout=0.0),
    "V!=D": BDHConfig(n_layer=1, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=11, dropout=0.25),
    "N=D": BDHConfig(n_layer=3, n_embd=8, n_head=2, mlp_internal_dim_multiplier=2, vocab_size=5, dropout=0.1),
    "nh=1": BDHConfig(n_layer=2, n_embd=6, n_head=1, mlp_internal_dim_multiplier=3, vocab_size=6, dropout=0.1),
    "nh=3": BDHConfig(n_layer=2, n_embd=8, n_head=3, mlp_internal_dim_multiplier=7, vocab_size=256, dropout=0.5),
    "nh=3, N=D": BDHConfig(n_layer=2, n_embd=8, n_head=3, mlp_internal_dim_multiplier=3, vocab_size=8, dropout=0.1),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request: pytest.FixtureRequest) -> BDHConfig:
    """One configuration after another."""
    return request.param


@pytest.fixture
def small() -> BDHConfig:
    """A configuration in which every axis has another length."""
    return CONFIGS["V!=D"]


@pytest.fixture
def weights() -> Callable[[BDHConfig], Params]:
    """Float32 weights large enough for every one of them to move the loss."""
    return lambda config: Params(*(weight * np.float32(20) for weight in init(config, np.random.default_rng(7))))


@pytest.fixture
def canonical(tmp_path: Path, weights: Callable[[BDHConfig], Params]) -> Callable[[BDHConfig], Path]:
    """Write a canonical checkpoint named checkpoint.safetensors."""

    def write(config: BDHConfig) -> Path:
        path = tmp_path / "checkpoint.safetensors"
        bdh_spec.save(path, weights(config), config)
        return path

    return write


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """bdh-convert in this very process, which is quicker."""

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["bdh-convert", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        return subprocess.CompletedProcess(words, int(left.value.code or 0), *capfd.readouterr())

    return run


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """bdh-convert as a child process in the test's folder."""

    def child(*words: object, through: tuple[str, ...] = (), **options: object) -> subprocess.CompletedProcess[str]:
        command = [*through, sys.executable, "-c", "from bdh_convert.cli import main; main()", *map(str, words)]
        defaults = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 60}
        return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **(defaults | options))

    return child
