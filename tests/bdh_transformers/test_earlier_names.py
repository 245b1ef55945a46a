"""Who comes from the earlier integration finds its names, and who has another transformers is told."""

import importlib
import inspect
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

import bdh_transformers

ROOT = Path(__file__).parents[2]


def test_versions_of_transformers_are_those_that_the_model_accepts_and_ci_tries_the_newest() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (asked,) = [Requirement(word) for word in extras["hf"] if word.startswith("transformers")]
    source = Path(inspect.getfile(bdh_transformers.BDHModel)).read_text(encoding="utf-8")
    (accepted,) = [Requirement(word) for word in re.findall(r'"(transformers[<>=][^"]*)"', source)]
    assert asked == accepted
    assert version("transformers") in asked.specifier
    bound = next(each.version for each in asked.specifier if each.operator == "<")
    assert int(bound.split(".")[1]) == int(version("transformers").split(".")[1]) + 1


def test_the_earlier_integration_s_imports_find_the_same_classes() -> None:
    names = {"configuration_bdh": ["BDHConfig"], "modeling_bdh": ["BDHForCausalLM", "BDHModel", "BDHCache"]}
    for module, found in names.items():
        there = importlib.import_module(f"bdh_transformers.models.bdh.{module}")
        assert all(getattr(there, name) is getattr(bdh_transformers, name) for name in found)
        assert all(hasattr(there, name) for name in there.__all__)
