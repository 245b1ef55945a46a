"""The native loops of examples/loops run, learn, and leave a checkpoint that bdh-generate takes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import bdh_spec

# A loop as it stands takes MLX on a CPU a minute.
SMALLER = [
    (
        "n_layer=4, n_embd=64, n_head=4, mlp_internal_dim_multiplier=32",
        "n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=8",
    ),
    ("8, 128\n", "4, 32\n"),
    ("100, ", "9, "),
]
LOOPS = Path(__file__).parents[2] / "examples" / "loops"


@pytest.mark.parametrize("port", ["torch", "mlx", "jax"])
def test_a_native_loop_learns(port: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(b"the dragon hatches, and the dragon flies. " * 200)
    source = (LOOPS / f"{port}_loop.py").read_text()
    for large, small in SMALLER:
        assert large in source
        source = source.replace(large, small)
    (tmp_path / "loop.py").write_text(source)
    run = [sys.executable, "loop.py", text, "12"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (loss,) = re.findall(r"^step 12: loss (\S+)$", done.stdout, re.MULTILINE)
    assert float(loss) < 5.4, "it has learned nothing"
    assert "The " in done.stdout
    params, config = bdh_spec.read(tmp_path / ("bdh.pt" if port == "torch" else "bdh.safetensors"))
    assert config.n_layer == 2
    assert params.encoder.shape == (2, 16, 64)


@pytest.mark.parametrize("loop", sorted(LOOPS.glob("*.py")), ids=lambda path: path.stem)
def test_a_loop_is_about_thirty_lines(loop: Path) -> None:
    code = loop.read_text().split('"""', 2)[2].splitlines()
    assert sum(bool(line.strip()) and not line.startswith(("import ", "from ")) for line in code) <= 30
