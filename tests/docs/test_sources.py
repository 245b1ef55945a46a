"""What the pages say of the sources: examples in docstrings run, and ports can be read beside the specification."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("", "backends/torch", "backends/mlx", "backends/jax", "conformance", "convert", "generate", "train", "bench", "look")
MODULES = sorted(
    ".".join(path.relative_to(ROOT / room).with_suffix("").parts).removesuffix(".__init__")
    for room in ROOMS
    for package in (ROOT / room).glob("bdh_*")
    for path in package.rglob("*.py")
    if re.search(r"(?m)^ *>>> ", path.read_text(encoding="utf-8"))
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_give_what_they_show(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted
    assert not result.failed


def names(*files: str) -> list[str]:
    """The functions of some files, in order."""
    bodies = (ast.parse((ROOT / file).read_text(encoding="utf-8")).body for file in files)
    return [node.name for body in bodies for node in body if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("port", ["backends/mlx/bdh_mlx", "backends/jax/bdh_jax"])
def test_the_functions_of_a_port_stand_in_the_specification_s_order(port: str) -> None:
    for files in (["rope.py"], ["layer.py", "model.py"]):
        spec = names(*(f"bdh_spec/{file}" for file in files if file != "layer.py"))
        shared = [name for name in names(*(f"{port}/{file}" for file in files)) if name in spec]
        assert shared == sorted(shared, key=spec.index)
        assert len(shared) >= 3


def test_a_layer_of_the_torch_port_goes_through_the_rules_in_order() -> None:
    text = (ROOT / "backends/torch/bdh_torch/layer.py").read_text(encoding="utf-8")
    body = text[text.index("def gated(") : text.index("def undo_norm(")]
    rules = [int(rule) for rule in re.findall(r"\bR(\d+)\b", re.sub(r'""".*?"""', "", body, flags=re.DOTALL))]
    assert rules == sorted(rules)
    assert set(rules) >= {3, 4, 5, 6, 7, 8, 9}
