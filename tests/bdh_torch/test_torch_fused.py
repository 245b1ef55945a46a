"""The kernels of a GPU where there is none: run by Triton's interpreter, and compiled for a GPU that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bdh_spec import BDHConfig
from bdh_torch import BDH, forms

HERE = Path(__file__).parent
COMPILE = """
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import NamedTemporaryFile
import torch
import triton
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bdh_torch import fused, fused_decode, fused_kernels

name, dtype, flag, K = *sys.argv[1:4], int(sys.argv[4])
kernel, kind = getattr(fused_kernels, name), torch.bfloat16 if dtype == "bf16" else torch.float32
if name in fused.NARROW:
    options = fused.tiles_of(name, kind, K).options(K)
else:  # for K texts
    options = fused_decode.tiles_of(K, 256, kind).options(256) | {"SOME": 32}
    options |= {"ROWS": 16, "num_warps": 4} if name == "through" else {}
constants = {each: options.pop(each) for each in ("HELD", "ROWS", "COLUMNS", "DEPTH", "SOME") if each in options}
constants |= {each: flag == "True" for each in ("DROPS", "ADDS")}
constants = {each: value for each, value in constants.items() if each in kernel.arg_names}
kinds = dict.fromkeys(("local", "shift", "state", "parts"), "*fp32") | dict.fromkeys(("p", "scale", "eps"), "fp32")
kinds |= dict.fromkeys(("h", "B", "R", "C", "D", "N", "T", "first", "span", "many"), "i32") | {"seed": "i64"}
kinds |= dict.fromkeys(constants, "constexpr")
signature = {each: kinds.get(each, "*" + dtype) for each in kernel.arg_names}
even = [each for each, kind in signature.items() if kind[0] == "*" or each in ("D", "N", "span")]
even += ["C"] * (name == "undo_turn")  # what 16 divides, as Triton would find it of the default size
attributes = {(kernel.arg_names.index(each),): [["tt.divisibility", 16]] for each in even}
source = ASTSource(kernel, signature, constants, attributes)
made = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
assert len(made.asm["cubin"]) > 0
with NamedTemporaryFile(suffix=".cubin") as binary:
    binary.write(made.asm["cubin"])
    binary.flush()
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    said = subprocess.run([tool, "-res-usage", binary.name], capture_output=True, text=True, check=True).stdout
print(made.metadata.shared, re.search(r"STACK:(\\d+)", said).group(1))
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
@pytest.mark.parametrize(("dtype", "K"), [("bf16", 256), ("bf16", 2048), ("fp32", 256)])
@pytest.mark.parametrize("kernel", ["excite", "compare", "gate", "undo_gate", "undo_turn"])
def test_every_kernel_compiles_for_a_gpu(kernel: str, dtype: str, K: int, tmp_path: Path) -> None:
    """What sums over an axis of K: at 256 the left operand is held."""
    for flag in ("False", "True") if kernel in ("gate", "undo_gate", "undo_turn") else ("False",):
        check_resources(kernel, dtype, flag, str(K), cache=tmp_path)


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("texts", [1, 64])
@pytest.mark.parametrize("kernel", ["through", "write", "norm"])
def test_every_kernel_of_a_token_compiles_for_a_gpu(kernel: str, texts: int, dtype: str, tmp_path: Path) -> None:
    for flag in ("False", "True") if kernel == "norm" else ("False",):
        check_resources(kernel, dtype, flag, str(texts), cache=tmp_path)


# Bytes of a thread that found no register, by whether it drops: without dropout the tiles that spill them were measured faster
# than those that spill none; with it they are what these tiles take, unmeasured.
FEW = {"False": 24, "True": 104}


def check_resources(kernel: str, dtype: str, flag: str, size: str, cache: Path) -> None:
    """What a program needs of a multiprocessor with compute capability 9.0 is there."""
    shared, spilled = map(int, run("-c", COMPILE, kernel, dtype, flag, size, TRITON_CACHE_DIR=str(cache)).split())
    assert shared <= 227 * 1024  # bytes that a program may share
    if dtype != "fp32":  # which a GPU reads by the library unless it is told otherwise
        assert spilled <= FEW[flag]


def test_a_cpu_reads_by_its_own_kernels() -> None:
    assert not forms.fuses(torch.zeros(1))
    model = BDH(BDHConfig(1, 4, 0.0, 1, 2, 5)).eval()
    with torch.no_grad():
        assert not forms.steps(None, None, torch.zeros(1, 1), model.weights, model.drop)
