"""Every bdh-look line of README and docs has flags that exist, and the page of claims has a place for its figures."""

import importlib
import re
import shlex
from pathlib import Path
from types import ModuleType

import click
import numpy as np
import pytest

import bdh_spec
from bdh_look.cli import PAGE, command

ROOT = Path(__file__).parents[2]
LINES = [
    pytest.param(line, id=f"{page.stem}-{i}")
    for page in (ROOT / "README.md", ROOT / "docs" / "look.md")
    for i, line in enumerate(re.findall(r"(?m)^\$ (bdh-look [^\n<#]*)", page.read_text(encoding="utf-8")))
]


@pytest.mark.parametrize("line", LINES)
def test_a_command_line_is_one_that_the_command_takes(line: str) -> None:
    first, *rest = shlex.split(line)[1:]
    name, words = (first, rest) if first in command.commands else (PAGE, [first, *rest])
    chosen = command.commands[name]
    with click.Context(chosen) as context:
        chosen.parse_args(context, words)


def test_there_are_lines_of_every_command() -> None:
    said = " ".join(str(line.values[0]) for line in LINES)
    assert all(name in said for name in ("neurons", "graph", "state", "page.html"))


def test_the_figures_have_their_place() -> None:
    text = (ROOT / "docs" / "look.md").read_text(encoding="utf-8")
    script = (ROOT / "examples" / "look_claims.py").read_text(encoding="utf-8")
    begin, end = re.findall(r'(?:BEGIN, END = |, )"(<!-- .*? -->)\\n"', script)
    assert text.index(begin) < text.index(end)
    assert "| weights | `x_sparse` |" in text


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that writes the figures."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("look_claims")


@pytest.mark.thorough
def test_every_claim_can_be_tried_on_another_model(claims: ModuleType) -> None:
    config = bdh_spec.BDHConfig(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=12)
    port = bdh_spec.get_backend("numpy")
    models = {
        name: port.load(bdh_spec.init(config, np.random.default_rng(i)), config) for i, name in enumerate(("trained", "fresh"))
    }
    text, rng = b'The "quick" fox (number 12) jumps.\nif x[1] == {"a": 2}: return [3]\n' * 64, np.random.default_rng(0)
    parts = [
        *claims.density(models, text[:1024]),
        *claims.predictable(models, text[:1024], rng),
        *claims.selective(models, text[:1024], rng),
        *claims.monosemantic(models, text[:512], rng),
        *claims.graph(models["trained"].params(), config, rng),
        *claims.memory(models["trained"], text, rng),
    ]
    page = "".join(parts)
    assert page.count("## ") == 6
    assert page.count("**") % 2 == 0
    assert "Not reproduced, even for `xy_sparse`" in page  # a fresh model is not sparse
    assert "nan" not in page
