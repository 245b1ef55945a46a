"""The native loops of examples/loops run, learn, and leave a checkpoint that bdh-generate takes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import bdh_spec

LOOPS = Path(__file__).parents[2] / "examples" / "loops"


@pytest.mark.parametrize("port", ["torch", "mlx", "jax"])
def test_a_native_loop_learns(port: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(b"the dragon hatches, and the dragon flies. " * 200)
    done = subprocess.run(
        [sys.executable, LOOPS / f"{port}_loop.py", text, "12"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (loss,) = re.findall(r"^step 12: loss (\S+)$", done.stdout, re.MULTILINE)
    assert float(loss) < 4.0
    assert "The " in done.stdout
    params, config = bdh_spec.read(tmp_path / ("bdh.pt" if port == "torch" else "bdh.safetensors"))
    assert config.n_layer == 4
    assert params.encoder.shape == (4, 64, 512)


@pytest.mark.parametrize("loop", sorted(LOOPS.glob("*.py")), ids=lambda path: path.stem)
def test_a_loop_is_about_thirty_lines(loop: Path) -> None:
    code = loop.read_text().split('"""', 2)[2].splitlines()
    assert sum(bool(line.strip()) and not line.startswith(("import ", "from ")) for line in code) <= 30
