"""A port in C is judged by the vectors alone: it agrees, and each one-line change of it is found where it was made."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bdh_conformance.files import vectors
from bdh_conformance.files.cli import vectors as command

SOURCE = Path(__file__).with_name("bdh.c").read_text()

Port = Callable[[str, str, Path], Path]

# What is changed, to what, what the report must then say, and which known mistake it must take it for. Sampling is no part of a
# model, so that a diagnosis, which holds a port against models with a mistake, has nothing to say of it.
MISTAKES = {
    "diagonal": (
        "u < t; u++)\n                    add_product(scores",
        "u <= t; u++)\n                    add_product(scores",
        "square_head differs from the specification at layers.0.scores (agrees through layers.0.rotated)",
        "diagonal_kept",
    ),
    "swapped encoders": (
        "read_case();\n",
        "read_case(); real *first = encoder; encoder = encoder_v; encoder_v = first;\n",
        "three_heads differs from the specification at layers.0.x_sparse (agrees through embed)",
        "encoders_swapped",
    ),
    "eps": (
        "#define EPS 1e-5",
        "#define EPS 1e-6",
        "fresh_weights differs from the specification at embed (agrees through nothing before it)",
        "eps_1e-6",
    ),
    "theta": (
        "pow(65536.0,",
        "pow(10000.0,",
        "first_steps differs from the specification at frequencies (agrees through nothing before it)",
        "theta_10000",
    ),
    "float32 phases": (
        "if (float32_phases) turns",
        "turns",
        "three_heads differs from the specification at phases.cos (agrees through nothing before it)",
        "phases_float32",
    ),
    "head order": (
        "decoder + (size_t)h * N * D, D, 1);",
        "decoder + (size_t)(nh - 1 - h) * N * D, D, 1);",
        "three_heads differs from the specification at layers.0.decoded (agrees through layers.0.xy_sparse)",
        "heads_merged_reversed",
    ),
    "local positions": (
        "layer(x, length, start + from, memories[i])",
        "layer(x, length, 0, memories[i])",
        "three_heads differs from the specification at decode.0.logits (agrees through nothing before it)",
        "positions_restart",
    ),
    "ignored targets": (
        "counted += targets[t] != IGNORE;",
        "counted++;",
        "first_steps differs from the specification at loss (agrees through logits)",
        "loss_over_all_targets",
    ),
    "gradient of one side": (
        "d_scores[u * T + t] = d_scores[t * T + u];",
        "d_scores[u * T + t] = 0;",
        "three_heads differs from the specification at gradients.embed (agrees through nothing before it)",
        "gradient_queries_alone",
    ),
    "ties": (
        "better >= top_k",
        "better >= top_k - 1",
        "first_steps differs from the specification at sampling.tokens (agrees through sampling.uniforms)",
        None,
    ),
    "counter": (
        "c[4] = {1, 0, position, row}",
        "c[4] = {0, 0, position, row}",
        "first_steps differs from the specification at sampling.uniforms (agrees through nothing before it)",
        None,
    ),
}


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign") / "vectors"
    vectors.export(folder)
    return folder


@pytest.fixture(scope="session")
def exported_int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign") / "vectors"
    vectors.export(folder, vectors.INT8_VERSION)
    return folder


@pytest.fixture
def port(tmp_path: Path) -> Port:
    """Build a source text and run it on every case of a set: the folder of its outputs."""

    def build_and_run(source: str, real: str, exported: Path) -> Path:
        (tmp_path / "bdh.c").write_text(source)
        flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-pedantic", f"-DREAL={real}"]
        subprocess.run([compiler(), *flags, tmp_path / "bdh.c", "-o", tmp_path / "bdh", "-lm"], check=True)
        for case in vectors.case_folders(exported):
            outputs = tmp_path / "outputs" / case.name
            outputs.mkdir(parents=True)
            subprocess.run([tmp_path / "bdh", case, outputs], check=True)
        return tmp_path / "outputs"

    return build_and_run


def compiler() -> str:
    """The C compiler at hand. CI has one: there, its absence is an error."""
    found = shutil.which(os.environ.get("CC", "cc"))
    if found is None and "CI" not in os.environ:
        pytest.skip("no C compiler: install one, or name it in CC")
    assert found, "no C compiler on CI: install one"
    return found


def check(exported: Path, outputs: Path) -> Result:
    return CliRunner().invoke(command, ["check", str(exported), str(outputs)])


@pytest.mark.parametrize("real", ["float", "double"])
def test_the_port_in_c_computes_every_tensor_of_every_case(exported: Path, port: Port, real: str) -> None:
    result = check(exported, port(SOURCE, real, exported))
    assert result.exit_code == 0, result.stdout
    assert result.stdout.splitlines()[-1].endswith("tensors agree, 0 differ, 0 are not claimed")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_changed_line_is_found_where_it_was_changed(exported: Path, port: Port, mistake: str) -> None:
    before, after, sentence, known_as = MISTAKES[mistake]
    assert SOURCE.count(before) == 1
    result = check(exported, port(SOURCE.replace(before, after), "float", exported))
    assert result.exit_code == 1
    assert sentence in result.stdout
    guesses = [line for line in result.stdout.splitlines() if line.startswith("looks like: ")]
    assert [f"({known_as})" in guess for guess in guesses] == [True] * bool(known_as)


# The same of what it reads in int8 (R17): all cases differ from their embedding on.
INT8_MISTAKES = {
    "no sign": ("(real)values[i] *", "(real)(uint8_t)values[i] *", "int8_unsigned"),
    "no scale": ("(real)values[i] * scales[i / (summed * inner) * inner + i % inner]", "(real)values[i]", "int8_without_scale"),
    "zero point": ("(real)values[i] *", "((real)values[i] - 128) *", "int8_zero_point"),
}


@pytest.mark.parametrize("real", ["float", "double"])
def test_r17_the_port_in_c_computes_every_case_in_int8(exported_int8: Path, port: Port, real: str) -> None:
    result = check(exported_int8, port(SOURCE, real, exported_int8))
    assert result.exit_code == 0, result.stdout
    assert result.stdout.splitlines()[-1].endswith("tensors agree, 0 differ, 0 are not claimed")


@pytest.mark.parametrize("mistake", INT8_MISTAKES)
def test_r17_one_changed_line_of_int8_is_found_and_named(exported_int8: Path, port: Port, mistake: str) -> None:
    before, after, known_as = INT8_MISTAKES[mistake]
    assert SOURCE.count(before) == 1
    result = check(exported_int8, port(SOURCE.replace(before, after), "float", exported_int8))
    assert result.exit_code == 1
    guesses = [line for line in result.stdout.splitlines() if line.startswith("looks like: ")]
    assert [f"({known_as})" in guess for guess in guesses] == [True]
