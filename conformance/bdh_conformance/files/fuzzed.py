"""What ``python -m bdh_convert.fuzz`` changes of the suite's files: the manifest of vectors, and what a port wrote for them."""

from __future__ import annotations

from pathlib import Path

from bdh_conformance.files.check import check
from bdh_conformance.files.vectors import export_cases, unpack
from bdh_spec.files import read_safetensors, write_safetensors

RAW = "logits"  # the tensor that is in a file of its own
CASE = "B1 T3 L1 h1 D4 N4 V5 m1 seed=7"


def make(path: Path) -> None:
    """Vectors of one small case, and outputs that agree with them."""
    export_cases(path / "vectors", [CASE])
    (case,) = (path / "vectors").iterdir()
    expected, _ = read_safetensors(case / "expected.safetensors")
    outputs = path / "outputs" / case.name
    unpack({RAW: expected.pop(RAW)}, outputs)
    write_safetensors(outputs / "others.safetensors", expected, {})


def use(path: Path) -> None:
    """Judge the outputs by the vectors."""
    check(path / "vectors", path / "outputs")


MANIFEST = ("m/vectors/case_1/manifest.json", make, use)
OUTPUT = ("m/outputs/case_1/logits.f64", make, use)
OUTPUTS = ("m/outputs/case_1/others.safetensors", make, use)
