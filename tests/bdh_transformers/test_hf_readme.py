"""The README's snippets for transformers run as they stand."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import bdh_transformers
from bdh_spec.checkpoint import EMBEDDED

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").split("## In Hugging Face transformers")[1].split("\n## ")[0]
GENERATE, TRAIN, PUSH = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)


def test_the_earlier_integration_s_imports_find_the_same_classes() -> None:
    names = {"configuration_bdh": ["BDHConfig"], "modeling_bdh": ["BDHForCausalLM", "BDHModel", "BDHCache"]}
    for module, found in names.items():
        there = importlib.import_module(f"bdh_transformers.models.bdh.{module}")
        assert all(getattr(there, name) is getattr(bdh_transformers, name) for name in found)
        assert all(hasattr(there, name) for name in there.__all__)


def test_versions_of_transformers_are_those_that_the_model_accepts_and_ci_tries_the_newest() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (asked,) = [Requirement(word) for word in extras["hf"] if word.startswith("transformers")]
    source = Path(inspect.getfile(bdh_transformers.BDHModel)).read_text(encoding="utf-8")
    (accepted,) = [Requirement(word) for word in re.findall(r'"(transformers[<>=][^"]*)"', source)]
    assert asked == accepted
    assert version("transformers") in asked.specifier
    bound = next(each.version for each in asked.specifier if each.operator == "<")
    assert int(bound.split(".")[1]) == int(version("transformers").split(".")[1]) + 1


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with the embedded model as bdh-convert writes it."""
    monkeypatch.chdir(tmp_path)
    subprocess.run([Path(sys.executable).with_name("bdh-convert"), "numpy-to-hf", EMBEDDED, "-o", "bdh"], check=True)
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_the_snippet_that_generates(capsys: pytest.CaptureFixture[str]) -> None:
    exec(GENERATE, {})
    said = capsys.readouterr().out
    assert "The small smooth-skinned dragon" in said
    assert "Values" in said
    assert "<pad>" not in said


def test_the_snippet_that_trains(folder: Path) -> None:
    (folder / "text.txt").write_text("the dragon hatches, and " * 100, encoding="utf-8")
    exec(TRAIN.replace("max_steps=100", "max_steps=2, report_to=[], use_cpu=True"), {})
    assert {"model.safetensors", "config.json", "tokenizer.json", "modeling_bdh.py"} <= {
        f.name for f in (folder / "trained").iterdir()
    }


@pytest.mark.usefixtures("folder")
def test_the_snippet_that_pushes(monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = []
    for kind in (PreTrainedModel, PreTrainedTokenizerBase):
        monkeypatch.setattr(kind, "push_to_hub", lambda self, name: pushed.append((type(self).__name__, name)))
    exec(PUSH, {})
    assert pushed == [("BDHForCausalLM", "me/bdh"), ("BDHTokenizer", "me/bdh")]
