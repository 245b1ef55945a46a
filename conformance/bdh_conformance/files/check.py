"""Judge what a port in another language wrote against the vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from bdh_conformance.adversaries.diagnosis import explanations
from bdh_conformance.adversaries.mistakes import Mistake
from bdh_conformance.files.vectors import (
    SUFFIXES,
    Judged,
    VectorsError,
    case_folders,
    in_pairs,
    observe,
    paired,
    paired_name,
    read,
)
from bdh_conformance.yardstick.agreement import Comparison, compare
from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.tolerances import Expectation
from bdh_spec import Model
from bdh_spec.files import read_safetensors, reading
from bdh_spec.params import Array

AGREES, DIFFERS, NOT_CLAIMED = "agrees", "differs", "not claimed"
OF_MODELS = ("forward", "gradients", "decode")  # the branches that a model of the protocol shows
BRANCHES = ("frequencies", "phases", "gradients", "decode", "sampling")  # any other name belongs to forward


@dataclass(frozen=True)
class Verdict:
    """One tensor of one case, and by which dtype's tolerance it was judged."""

    name: str
    dtype: str = ""
    comparison: Comparison | None = None  # with the specification; None where the port wrote nothing

    @property
    def status(self) -> str:
        if self.comparison is None:
            return NOT_CLAIMED
        return DIFFERS if self.comparison.complaint else AGREES

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: an error that no number tells is null."""
        told = asdict(self.comparison) if self.comparison else {}
        for name in ("stage", "by_token"):
            told.pop(name, None)
        if told.get("error") == float("inf"):
            told["error"] = None
        return {"name": self.name, "status": self.status, "dtype": self.dtype, **told}


@dataclass(frozen=True)
class CaseReport:
    """What became of one case: a verdict on every expected tensor, in the specification's order."""

    judged: Judged
    actual: Mapping[str, Array]
    verdicts: tuple[Verdict, ...]
    expected: Mapping[str, Mapping[str, Expectation]]  # the vector's, with states by pairs of neurons

    @property
    def case(self) -> str:
        return self.judged.vector.name

    def having(self, status: str) -> list[Verdict]:
        return [found for found in self.verdicts if found.status == status]

    def as_dict(self) -> dict[str, Any]:
        about = {"case": self.case, "made_from": self.judged.vector.origin}
        return {**about, "tensors": [found.as_dict() for found in self.verdicts]}


def check(vectors: Path, outputs: Path, dtype: str | None = None) -> list[CaseReport]:
    """Every case of a set; a case without a folder in ``outputs`` is not claimed. ``dtype`` overrules that of the files."""
    folders = case_folders(vectors)
    if not outputs.is_dir():
        raise VectorsError(f"{outputs} is no folder: name the one with a folder for each case")
    names = [folder.name for folder in folders]
    if unknown := sorted(path.name for path in outputs.iterdir() if path.is_dir() and path.name not in names):
        raise VectorsError(f"{outputs / unknown[0]} is no case of {vectors}: its cases are {', '.join(names)}")
    reports = [check_case(read(folder), outputs / folder.name, dtype) for folder in folders]
    if not any(report.actual for report in reports):
        raise VectorsError(f"{outputs} holds nothing to check: write {names[0]}/logits.f32 there, or any other expected tensor")
    return reports


def check_case(judged: Judged, folder: Path, dtype: str | None) -> CaseReport:
    """Every tensor of a case."""
    with reading(folder):
        return _checked(judged, folder, dtype)


def _checked(judged: Judged, folder: Path, dtype: str | None) -> CaseReport:
    actual, pairs = read_outputs(folder, judged), in_pairs(judged).expected
    verdicts = [verdict(name, actual.get(name), by_dtype, pairs, dtype) for name, by_dtype in judged.expected.items()]
    return CaseReport(judged, actual, tuple(verdicts), pairs)


def verdict(
    name: str,
    actual: Array | None,
    by_dtype: Mapping[str, Expectation],
    pairs: Mapping[str, Mapping[str, Expectation]],
    dtype: str | None,
) -> Verdict:
    """One tensor, held to the dtype of its file; a state by pairs of neurons if its shape is right."""
    if actual is None:
        return Verdict(name)
    held_to = dtype or (actual.dtype.name if actual.dtype.name in by_dtype else "float32")
    if actual.shape != by_dtype[held_to].reference.shape:
        return Verdict(name, held_to, compare(name, actual, by_dtype[held_to]))
    ((judged_as, values),) = paired({name: actual}).items()
    return Verdict(name, held_to, compare(judged_as, values, pairs[judged_as][held_to]))


def read_outputs(folder: Path, judged: Judged) -> dict[str, Array]:
    """The tensors that a port wrote: raw files named as the expected ones, or safetensors files that hold them."""
    found: dict[str, Array] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        for name, value in read_file(path).items():
            if name not in judged.expected:
                raise VectorsError(f"{path} is no tensor of this case{suggestion(name, judged)}")
            if name in found:
                raise VectorsError(f"{path} holds {name}, and another file does too: leave one of them")
            found[name] = shaped(value, judged.expected[name]["float64"].reference.shape)
    return found


def read_file(path: Path) -> dict[str, Array]:
    """The tensors of one file; none of a file that is neither raw nor safetensors."""
    name, _, suffix = path.name.rpartition(".")
    if suffix == "safetensors":
        return read_safetensors(path)[0]
    if suffix not in SUFFIXES:
        return {}
    dtype, data = np.dtype(SUFFIXES[suffix]), path.read_bytes()
    return {name: np.frombuffer(data[: len(data) // dtype.itemsize * dtype.itemsize], dtype)}


def shaped(value: Array, shape: tuple[int, ...]) -> Array:
    """A flat array of the right size in its shape; whole numbers as float64, which is what they are compared in."""
    whole = value.astype(np.float64) if value.dtype.kind in "iu" else value
    return whole.reshape(shape) if whole.ndim <= 1 and whole.size == np.prod(shape) else whole


def suggestion(name: str, judged: Judged) -> str:
    close = get_close_matches(name, judged.expected, n=1)
    return f": did you mean {close[0]}?" if close else ": its manifest lists what is expected"


def branch_of(name: str) -> str:
    """The chain of computation that a tensor belongs to: one can go wrong without the others."""
    first = name.split(".")[0]
    return first if first in BRANCHES else "forward"


def diagnosis(reports: list[CaseReport]) -> list[list[Mistake]] | None:
    """The known mistakes that explain every case that differs, those that no case tells apart together.

    Where none explains all branches, because a port has two mistakes or one that the specification could make in one branch
    only, those that explain the first branch that differs. None where no model of the protocol shows what differs.
    """
    differing = {branch_of(found.name): True for report in reports for found in report.having(DIFFERS)}
    shown = [branch for branch in OF_MODELS if branch in differing]
    if not shown:
        return None
    return narrowed(reports, OF_MODELS) or narrowed(reports, (shown[0],))


def narrowed(reports: list[CaseReport], branches: tuple[str, ...]) -> list[list[Mistake]]:
    """The known mistakes that compute what the port wrote of these branches, in every case where it differs in them."""
    groups: list[list[Mistake]] | None = None
    for report in reports:
        if any(branch_of(found.name) in branches for found in report.having(DIFFERS)):
            among = None if groups is None else [mistake for group in groups for mistake in group]
            groups = explain(report, branches, among)
    return groups or []


def explain(report: CaseReport, branches: tuple[str, ...], among: list[Mistake] | None) -> list[list[Mistake]]:
    """The known mistakes that explain one case."""
    vector = report.judged.vector
    claimed = {v.name: v.dtype for v in report.verdicts if v.comparison and branch_of(v.name) in branches}

    def observe_claimed(model: Model, _: Case) -> dict[str, Array]:
        inputs = {name: value.copy() for name, value in vector.inputs.items()}  # a mistake may overwrite what it is given
        seen = observe(model, replace(vector, inputs=inputs))
        return paired({name: seen[name] for name in claimed})

    actual = paired({name: report.actual[name] for name in claimed})
    expected = {paired_name(name): report.expected[paired_name(name)][dtype] for name, dtype in claimed.items()}
    dtype = "float32" if "float32" in claimed.values() else "float64"
    return explanations(actual, observe_claimed, vector, dtype, vector.phase, expected, among)
