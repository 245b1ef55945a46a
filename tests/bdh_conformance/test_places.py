"""The library of mistakes quotes the specification: rewording it must not break the library."""

import ast
import re
import subprocess
import sys

import pytest

from bdh_conformance.adversaries import variants
from bdh_conformance.adversaries.legal import LEGAL
from bdh_conformance.adversaries.mistakes import MISTAKES
from bdh_conformance.adversaries.places import replaced

SOURCES = {module: variants.source(module) for module in variants.MODULES}
CHANGES = [(mistake.name, mistake.module, mistake.before, mistake.after) for mistake in MISTAKES.values()] + [
    (name, change.module, change.before, change.after) for name, variant in LEGAL.items() for change in variant.changes
]


def laid_out(source: str, width: int) -> str:
    """The same code in lines of another width."""
    command = [sys.executable, "-m", "ruff", "format", "--line-length", str(width), "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout


def means(code: str) -> str:
    return ast.dump(ast.parse(code))


@pytest.mark.parametrize("width", [60, 240])
def test_quotations_hold_however_the_specification_is_laid_out(width: int) -> None:
    texts = {module: laid_out(source, width) for module, source in SOURCES.items()}
    assert texts != SOURCES
    for name, module, before, after in CHANGES:
        if SOURCES[module].count(before) != 1:
            continue  # one of several changes of a legal variant, made in what the others leave
        wanted = means(SOURCES[module].replace(before, after))
        assert means(replaced(texts[module], before, after)) == wanted, name


@pytest.mark.parametrize(
    ("module", "then", "now"),
    [("model", "similar", "alike"), ("model", "yKV", "mixed"), ("model", "stages", "seen"), ("sampling", "kth", "limit")],
)
def test_quotations_hold_when_a_variable_is_renamed(module: str, then: str, now: str) -> None:
    word = re.compile(rf"(?<![\w.]){then}\b(?!: Array)")
    reworded, quoting = word.sub(now, SOURCES[module]), 0
    for name, where, before, after in CHANGES:
        if where == module and word.search(before) and SOURCES[module].count(before) == 1:
            quoting += 1
            wanted = means(word.sub(now, SOURCES[module].replace(before, after)))
            assert means(replaced(reworded, before, after)) == wanted, name
    assert quoting


def test_a_quotation_whose_other_names_are_gone_is_refused() -> None:
    source = "def f(x):\n    hidden = g(x)\n    return hidden + 1\n"
    with pytest.raises(ValueError, match="'gone' in 'return gone' is no name of the specification any more"):
        replaced(source, "return was + 1", "return gone")


def test_a_quotation_of_no_place_or_of_two_is_refused() -> None:
    source = "def f(x):\n    y = g(x)\n    z = g(y)\n    return z\n"
    for before in ("h(x)", "g(", "= g(v)"):
        with pytest.raises(ValueError, match="a change names one place"):
            replaced(source, before, "0")


def test_a_comment_a_string_and_an_attribute_are_no_code_and_no_variable() -> None:
    source = "def f(x):\n    # y = x\n    return x.y, 'y', \"it's\"\n"
    assert replaced(source, 'return x.y, "y",', "return 0,") == 'def f(x):\n    # y = x\n    return 0, "it\'s"\n'
