"""The kernels of a GPU where there is none: run by Triton's interpreter, and compiled for a GPU that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bdh_torch import forms

HERE = Path(__file__).parent
COMPILE = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bdh_torch import fused, fused_kernels

name, dtype, flag = sys.argv[1:]
kernel, tiles = getattr(fused_kernels, name), (fused.NARROW if dtype == "bf16" else fused.WIDE)[name]
constants = {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "DEPTH": tiles.depth}
constants |= {each: flag == "True" for each in ("DROPS", "ADDS") if each in kernel.arg_names}
kinds = {"local": "*fp32", "shift": "*fp32", "p": "fp32", "scale": "fp32", "seed": "i64"}
kinds |= dict.fromkeys(("R", "C", "D", "N", "T", "first"), "i32") | dict.fromkeys(constants, "constexpr")
signature = {each: kinds.get(each, "*" + dtype) for each in kernel.arg_names}
options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
made = compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32), options=options)
assert len(made.asm["cubin"]) > 0
print(made.metadata.shared)
"""


def run(*command: str | Path, **environment: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_interpreter_finds_the_kernels_right() -> None:
    """In a process of its own, because Triton decides what runs its kernels when it is imported."""
    options = "-q", "-p", "no:cacheprovider", "-p", "no:xdist"
    said = run("-m", "pytest", *options, HERE / "fused_interpreted.py", TRITON_INTERPRET="1")
    assert "passed" in said
    assert "skipped" not in said


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kernel", ["excite", "compare", "gate", "undo_gate", "undo_turn"])
def test_every_kernel_compiles_for_a_gpu(kernel: str, dtype: str, tmp_path: Path) -> None:
    for flag in ("False", "True") if kernel in ("gate", "undo_gate", "undo_turn") else ("False",):
        shared = int(run("-c", COMPILE, kernel, dtype, flag, TRITON_CACHE_DIR=str(tmp_path)))
        assert shared <= 227 * 1024  # bytes that a program may have on compute capability 9.0


def test_a_cpu_reads_by_its_own_kernels() -> None:
    assert not forms.fuses(torch.zeros(1))
