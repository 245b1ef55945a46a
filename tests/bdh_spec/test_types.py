"""What a type checker knows of this package, and names that hide others."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SNIPPET = """
from typing import assert_type
import numpy as np
from numpy.typing import NDArray
from typing import Any
import bdh_spec

model = bdh_spec.load(backend="numpy")
tokens: NDArray[np.int64] = np.zeros((1, 3), np.int64)
assert_type(model.generate("The ", 3), bytes)
assert_type(model.generate(b"The ", max_new_tokens=3, temperature=0.8, top_k=50, seed=7), bytes)
assert_type(model.generate(tokens, 3), NDArray[Any])
text: str = model.generate("The ", 3).decode()
shape: tuple[int, ...] = model.generate(tokens, 3).shape
"""


@pytest.mark.thorough  # mypy reads NumPy's stubs for ten seconds
@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [("", ""), ('model.generate("The ", 3).shape\n', 'has no attribute "shape"'), ("model.generate(3, 3)\n", "No overload")],
    ids=["right", "bytes have no shape", "a number is no prompt"],
)
def test_a_text_gives_bytes_and_tokens_give_an_array(tmp_path: Path, wrong: str, complaint: str) -> None:
    from mypy import api  # a checker's whole code, needed here alone

    (tmp_path / "snippet.py").write_text(SNIPPET + wrong)
    cache = ["--cache-dir", str(ROOT / ".mypy_cache" / "snippets")]
    said, failed, status = api.run(["--strict", "--config-file", "", *cache, str(tmp_path / "snippet.py")])
    assert (status == 0) == (not complaint), said + failed
    assert complaint in said


def loop_variables(tree: ast.Module) -> list[tuple[int, str]]:
    """Line and name of whatever a loop or a comprehension assigns."""
    targets = [node.target for node in ast.walk(tree) if isinstance(node, (ast.For, ast.comprehension))]
    names = [name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return [(name.lineno, name.id) for name in names if isinstance(name.ctx, ast.Store)]


def hidden(source: str) -> list[str]:
    """The loop variables that bear the name of a function or class of their own module, or of an import."""
    tree = ast.parse(source)
    made = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    made |= {(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names}
    return [f"line {line}: {name}" for line, name in loop_variables(tree) if name in made]


def test_no_loop_variable_hides_a_function_or_an_import() -> None:
    folders = ("bdh_spec", "backends", "conformance", "convert", "generate", "train", "bench", "look", "examples", "tests")
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 100
    found = {str(file.relative_to(ROOT)): hidden(file.read_text()) for file in files}
    assert {file: names for file, names in found.items() if names} == {}
    assert hidden("def layer(x): ...\nfor i, layer in enumerate('ab'): ...") == ["line 2: layer"]
    assert hidden("import a.b\nc = [a for a in 'ab']") == ["line 2: a"]


def functions(file: str) -> list[str]:
    return [node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("port", ["backends/jax/bdh_jax", "backends/mlx/bdh_mlx"])
def test_a_port_keeps_the_order_of_the_specification(port: str) -> None:
    specified, written = functions("bdh_spec/model.py"), [*functions(f"{port}/layer.py"), *functions(f"{port}/model.py")]
    assert specified.index("run") < specified.index("trace") < specified.index("forward")
    shared = [name for name in written if name in specified]
    assert shared == [name for name in specified if name in shared]
    assert len(shared) >= len(specified) - 1
