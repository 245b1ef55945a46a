"""Published vectors stay as they are and as the specification says; outputs are judged by them, or refused with a reason."""

import json
import shutil
from itertools import islice
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

from bdh_conformance import Expectation, assert_agrees
from bdh_conformance.adversaries import diagnosis
from bdh_conformance.adversaries.mistakes import MISTAKES
from bdh_conformance.files import vectors
from bdh_conformance.files.check import Verdict, verdict
from bdh_conformance.files.cli import vectors as command
from bdh_conformance.yardstick.agreement import by_pair, compare
from bdh_conformance.yardstick.kinks import is_clear
from bdh_conformance.yardstick.tolerances import FLOAT64
from bdh_spec import get_backend
from bdh_spec.sampling import Sampling, probabilities

CASES = vectors.case_folders(vectors.PUBLISHED / vectors.VERSION)
ALL_CASES = [*CASES, *vectors.case_folders(vectors.PUBLISHED / vectors.INT8_VERSION)]

# The SHA-256 of each manifest, which holds those of all other files. A published set is never changed: publish another.
PUBLISHED = {
    "1.0": {
        "dead_neurons": "2eb172b27f917049e64e389de8bb4b60a4012652438077d04066afe18c7d9278",
        "first_steps": "2eaf6bb18920aca3fecc6de6d0127c97732543a22c72022ee139d7bff996981c",
        "float32_phases": "f2bee47a3aa7efabedfe5bff4ba00a7c8c2e59172d5dca42e1deacea80ab6d3b",
        "fresh_weights": "c4b5be739562a38d29c029e3e5e7374aff74a5051c9e4243e208c0b88dd6a696",
        "large_logits": "d05b18c412f00a66d1390138467adbe3c71d8d0f4f161ffd2d3059358cddfd17",
        "long_text": "be94a9d97a3befa87b7e325c22e4381ef579ba4117e57c8ed7da0957266bf25b",
        "mixed_scales": "2bc44e42bff114e19abb89bd3d1e8b140cca07c00bf0bce2ba93b202fd312c4b",
        "square_encoder": "f37e6c15a1e23c82b5077ed02f48d1f2705e93ab298f84b18220d149ca5ca4e5",
        "square_head": "823067039b6854fb22affb3ea74bdcb4ece04794338147dbaae89fd39970ff7c",
        "three_heads": "a4bdd73af425214d89d00b8c176fb54f7ad93b2e1efc908de4edf0203ecb4825",
        "wide_vocabulary": "1cfbd058bedfa2f0636ce93c8852b289cec9487b64b0f56441ac41620be05be8",
    },
    "1.0-int8": {
        "int8_fresh_weights": "d6c6ed75b32c22e938a47cdd5bf277b714fb48d56b37ec57646eb121509a68b2",
        "int8_square_encoder": "77707d9437b02722168853aef2daa1b2fb5634b42237f92696e881db0e54f4ce",
        "int8_three_heads": "ce9be18b429d21907031d3839fa83ef862055bfa974512224552a14c5ed187c3",
    },
}


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vectors") / "exported"
    vectors.export(folder)
    return folder


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """What a float32 port in Python would write of one case, without the phases and draws that the protocol does not show."""
    vector = vectors.read(CASES[0]).vector
    model = get_backend("numpy").load(vector.params, vector.config, dtype="float32", phase=vector.phase)
    folder = tmp_path / "outputs" / vector.name
    vectors.unpack({name: value.astype(np.float32) for name, value in vectors.observe(model, vector).items()}, folder)
    return folder


@pytest.fixture
def few_suspects(monkeypatch: pytest.MonkeyPatch) -> None:
    """A diagnosis that tries a dozen mistakes and not all: for tests of what is told, whoever is named."""
    monkeypatch.setattr(diagnosis, "MISTAKES", dict(islice(MISTAKES.items(), 12)))


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words])


@pytest.mark.parametrize("version", vectors.versions())
def test_published_vectors_never_change(version: str) -> None:
    folders = vectors.case_folders(vectors.PUBLISHED / version)
    assert {f.name: vectors.sha256((f / "manifest.json").read_bytes()) for f in folders} == PUBLISHED[version]
    for folder in folders:
        vectors.read(folder)
        about, tensors = vectors.read_manifest(folder), vectors.stored(folder)
        told = {name: one["sha256"] for name, one in (about["inputs"] | about["expected"]).items()}
        assert {name: vectors.sha256(vectors.as_bytes(value)) for name, value in tensors.items()} == told
        kept = {"manifest.json", *about["files"]}
        assert {path.name for path in folder.iterdir()} == kept


def test_published_vectors_are_small() -> None:
    assert sum(path.stat().st_size for path in vectors.PUBLISHED.rglob("*") if path.is_file()) < 5e6


@pytest.mark.parametrize("folder", ALL_CASES, ids=lambda folder: folder.name)
def test_the_specification_still_says_what_was_published(folder: Path) -> None:
    published = vectors.read(folder)
    today = {name: one["float64"].reference for name, one in vectors.judge(published.vector).expected.items()}
    assert list(today) == list(published.expected)
    assert_agrees("today's specification", as_floats(today), {n: e["float64"] for n, e in published.expected.items()})


def as_floats(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value.astype(np.float64) for name, value in tensors.items()}


@pytest.mark.parametrize("folder", ALL_CASES, ids=lambda folder: folder.name)
def test_no_relu_of_a_case_stands_where_rounding_could_flip_it(folder: Path) -> None:
    vector = vectors.read(folder).vector
    assert is_clear(vector.tokens, vector.params, vector.config)


def test_r14_no_draw_is_too_close_to_call() -> None:
    lines = vectors.read(CASES[0]).vector.inputs
    drawn = vectors.sampled(vectors.read(CASES[0]).vector, "float64")["sampling.uniforms"].reference
    for logits, temperature, top_k, draw in zip(
        *(lines[f"sampling.{name}"] for name in ("logits", "temperature", "top_k")), drawn, strict=True
    ):
        if temperature:
            edges = np.cumsum(probabilities(logits, Sampling(temperature, int(top_k))))
            assert np.abs(edges - draw).min() > 1e-6


def test_the_cases_show_what_hides_mistakes() -> None:
    found = [vectors.read(folder).vector for folder in CASES]
    configs = [vector.config for vector in found]
    assert {1, 3} <= {c.n_head for c in configs}
    assert 1 in {c.n_layer for c in configs}
    assert any(c.vocab_size == c.n_embd for c in configs)
    assert any(c.vocab_size > 256 for c in configs)
    assert any(c.n_neurons == c.n_embd for c in configs)
    assert any(c.mlp_internal_dim_multiplier % 2 for c in configs)
    assert {1, 2} <= {vector.batch for vector in found}
    assert max(vector.time for vector in found) > 40
    assert {0, 10**4, 2**24 + 1, 2**40} <= {start for vector in found for start in vector.starts}
    assert {"exact", "float32"} == {vector.phase for vector in found}
    assert all({0, v.config.vocab_size - 1} <= set(v.tokens.flat) for v in found)
    sizes = [float(np.std(vector.params.encoder)) for vector in found]
    assert min(sizes) < 0.025
    assert max(sizes) > 0.3


def test_an_export_holds_every_tensor_twice(exported: Path) -> None:
    for folder in vectors.case_folders(exported):
        about, tensors = vectors.read_manifest(folder), vectors.stored(folder)
        for name, one in (about["inputs"] | about["expected"]).items():
            raw = (folder / one["raw"]).read_bytes()
            assert vectors.sha256(raw) == one["sha256"]
            values = np.frombuffer(raw, vectors.SUFFIXES[one["dtype"]]).reshape(one["shape"])
            assert np.array_equal(values, tensors[name].reshape(one["shape"]))
        assert len(list((folder / "raw").iterdir())) == len(tensors)


def test_lines_and_manifest_say_the_same(exported: Path) -> None:
    for folder in vectors.case_folders(exported):
        about = vectors.read_manifest(folder)
        lines = [line.split() for line in (folder / "case.txt").read_text().splitlines()]
        sizes = {line[0]: line[1] for line in lines if len(line) == 2}
        for key, value in (about["config"] | {k: about[k] for k in ("schema", "n_neurons", "phase", "batch", "time")}).items():
            assert sizes[key] == str(value)
        assert [[int(n) for n in line[1:]] for line in lines if line[0] == "decode"] == [
            [start, *about["decode"]["plan"]] for start in about["decode"]["starts"]
        ]
        for kind, plural in (("input", "inputs"), ("expected", "expected")):
            told = [[name, one["dtype"], *map(str, one["shape"])] for name, one in about[plural].items()]
            assert [line[1:] for line in lines if line[0] == kind] == told


def test_an_honest_port_agrees_and_what_it_left_out_is_not_claimed(exported: Path, outputs: Path) -> None:
    (outputs / "gradients.encoder.f32").unlink()
    result = run("check", exported, outputs.parent)
    assert result.exit_code == 0, result.output
    assert f"{outputs.name}: 19 tensors agree, float32; the largest error is 0." in result.stdout
    assert "  not claimed: frequencies, phases.cos, phases.sin, gradients.encoder, sampling.uniforms" in result.stdout
    assert f"{CASES[1].name}: not claimed" in result.stdout
    assert "19 tensors agree, 0 differ," in result.stdout.splitlines()[-1]


def test_outputs_may_be_safetensors(exported: Path, outputs: Path) -> None:
    whole = {path.name.removesuffix(".f32"): np.fromfile(path, "<f4") for path in outputs.iterdir()}
    expected = load_file(exported / outputs.name / "expected.safetensors")
    shutil.rmtree(outputs)
    outputs.mkdir()
    save_file({name: value.reshape(expected[name].shape) for name, value in whole.items()}, outputs / "all.safetensors")
    (outputs / "build.log").write_text("not a tensor")
    assert run("check", exported, outputs.parent).exit_code == 0


def spoil(folder: Path, name: str, value: np.ndarray) -> None:
    (folder / f"{name}.f32").write_bytes(value.astype("<f4").tobytes())


@pytest.mark.usefixtures("few_suspects")
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda logits: logits * np.float32(1.0001), r"differs from the specification at logits (agrees through layers.0.x)"),
        (lambda logits: np.where(logits == logits.max(), np.nan, logits), "1 of 15 values are not finite"),
        (lambda logits: logits[:, 1:], "shape (10,), wanted (1, 3, 5)"),
        (lambda logits: np.zeros_like(logits), "worst row off by 1.0e+00"),
    ],
    ids=["scaled", "nan", "short", "zeros"],
)
def test_what_differs_is_named_with_its_place(exported: Path, outputs: Path, change, complaint: str) -> None:
    logits = np.fromfile(outputs / "logits.f32", "<f4").reshape(1, 3, 5)
    spoil(outputs, "logits", change(logits))
    result = run("check", exported, outputs.parent)
    assert result.exit_code == 1
    assert complaint in result.stdout
    assert "1 differ" in result.stdout.splitlines()[-1]


@pytest.mark.usefixtures("few_suspects")
def test_each_branch_says_where_it_leaves_the_specification(exported: Path, outputs: Path) -> None:
    for name in ("layers.0.scores", "layers.0.y", "gradients.decoder", "decode.0.logits"):
        spoil(outputs, name, -np.fromfile(outputs / f"{name}.f32", "<f4"))
    text = run("check", exported, outputs.parent).stdout
    assert f"{outputs.name} differs from the specification at layers.0.scores (agrees through layers.0.rotated)" in text
    assert "  1 after it differ too, the last of them layers.0.y\n" in text
    assert f"{outputs.name} differs from the specification at gradients.decoder (agrees through gradients.encoder_v)" in text
    assert f"{outputs.name} differs from the specification at decode.0.logits (agrees through nothing before it)" in text


@pytest.mark.usefixtures("few_suspects")
def test_a_file_is_held_to_its_dtype_unless_told_otherwise(exported: Path, outputs: Path) -> None:
    logits = np.fromfile(outputs / "logits.f32", "<f4")
    (outputs / "logits.f32").unlink()
    logits.astype("<f8").tofile(outputs / "logits.f64")
    assert "differs from the specification at logits" in run("check", exported, outputs.parent).stdout
    assert run("check", exported, outputs.parent, "--dtype", "float32").exit_code == 0


@pytest.mark.usefixtures("few_suspects")
def test_a_narrow_dtype_is_no_agreement(exported: Path, outputs: Path) -> None:
    logits = np.fromfile(outputs / "logits.f32", "<f4").reshape(1, 3, 5)
    (outputs / "logits.f32").unlink()
    save_file({"logits": logits.astype(ml_dtypes.bfloat16)}, outputs / "logits.safetensors")
    assert "dtype bfloat16, wanted float32 or float64" in run("check", exported, outputs.parent).stdout


def test_whole_numbers_and_uniform_draws_agree_to_the_last_bit(exported: Path, outputs: Path) -> None:
    raw = exported / outputs.name / "raw"
    for name in ("sampling.tokens.i64", "sampling.uniforms.f64", "frequencies.f32"):
        shutil.copy(raw / name, outputs)
    assert run("check", exported, outputs.parent).exit_code == 0
    table = np.fromfile(outputs / "frequencies.f32", "<f4")
    table[3] = np.nextafter(table[3], np.float32(1))
    table.tofile(outputs / "frequencies.f32")
    assert "differs from the specification at frequencies" in run("check", exported, outputs.parent).stdout


def test_a_state_is_judged_by_pairs_of_neurons() -> None:
    """Rotation can leave one neuron of a pair with nothing but rounding: its own relative error says nothing."""
    name, state = "decode.0.layers.0.state", np.random.default_rng(1).normal(size=(1, 1, 4, 3))
    state[:, :, 1] *= 1e-9
    published = {"float32": Expectation(state, 1e-6, 1e-6)}
    pairs = {f"{name}_by_pair": {"float32": Expectation(by_pair(state), 1e-6, 1e-6)}}

    def judged(neuron: int, off: float) -> Verdict:
        actual = state.copy()
        actual[:, :, neuron] += off
        return verdict(name, actual, published, pairs, "float32")

    assert compare(name, state * [[[[1], [2], [1], [1]]]], published["float32"]).complaint
    assert judged(1, 1e-9).status == "agrees"
    assert judged(1, 1e-4).status == judged(2, 1e-4).status == "differs"
    assert "pair 0" in judged(1, 1e-4).comparison.complaint
    assert (
        "shape (1, 1, 2, 3), wanted (1, 1, 4, 3)" in verdict(name, state[:, :, :2], published, pairs, None).comparison.complaint
    )


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)
def test_a_pair_of_neurons_is_allowed_no_more_than_the_published_neurons(folder: Path) -> None:
    published = vectors.read(folder)
    pairs = vectors.in_pairs(published).expected
    states = [name for name in published.expected if name.endswith(".state")]
    assert list(pairs) == [f"{name}_by_pair" if name in states else name for name in published.expected]
    for name, by_dtype in published.expected.items():
        for dtype, expectation in by_dtype.items():
            found = pairs[f"{name}_by_pair" if name in states else name][dtype]
            assert found.allowed <= expectation.allowed
            assert found.allowed_slope <= expectation.allowed_slope
            assert found.allowed >= (FLOAT64 if name in states and dtype == "float64" else 0)


def test_a_wrong_state_differs_and_is_diagnosed(exported: Path, outputs: Path) -> None:
    vector = vectors.read(CASES[0]).vector
    wrong = MISTAKES["state_written_unrotated"].backend().load(vector.params, vector.config)
    for name, value in vectors.observe(wrong, vector).items():
        if name.startswith("decode"):
            spoil(outputs, name, value)
    text = run("check", exported, outputs.parent).stdout
    assert "(state_written_unrotated)" in text
    spoil(outputs, "decode.0.layers.0.state", np.fromfile(outputs / "decode.0.layers.0.state.f32", "<f4") * 1.01)
    assert f"{outputs.name} differs from the specification at decode.0.l" in run("check", exported, outputs.parent).stdout


@pytest.mark.usefixtures("few_suspects")
def test_json_tells_every_tensor(exported: Path, outputs: Path) -> None:
    spoil(outputs, "layers.0.scores", np.ones(9))
    result = run("check", exported, outputs.parent, "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout, parse_constant=pytest.fail)
    assert told["agrees"] is False
    tensors = {tensor["name"]: tensor for tensor in told["cases"][0]["tensors"]}
    assert tensors["layers.0.scores"]["status"] == "differs"
    assert tensors["layers.0.scores"]["error"] is None
    assert 0 < tensors["logits"]["error"] < tensors["logits"]["allowed"]
    assert tensors["frequencies"] == {"name": "frequencies", "status": "not claimed", "dtype": ""}
    assert {t["status"] for t in told["cases"][1]["tensors"]} == {"not claimed"}


def rename(outputs: Path) -> None:
    (outputs / "logits.f32").rename(outputs / "logit.f32")


def double(outputs: Path) -> None:
    np.fromfile(outputs / "logits.f32", "<f4").astype("<f8").tofile(outputs / "logits.f64")


def empty(outputs: Path) -> None:
    shutil.rmtree(outputs)


def misname(outputs: Path) -> None:
    outputs.rename(outputs.with_name("first"))


def remove(outputs: Path) -> None:
    shutil.rmtree(outputs.parent)


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        (rename, "logit.f32 is no tensor of this case: did you mean logits?"),
        (double, "logits.f64 holds logits, and another file does too"),
        (empty, "holds nothing to check: write first_steps/logits.f32 there"),
        (misname, "first is no case of"),
        (remove, "is no folder: name the one with a folder for each case"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_outputs_that_cannot_be_judged_are_refused(exported: Path, outputs: Path, mistake, sentence: str) -> None:
    mistake(outputs)
    result = run("check", exported, outputs.parent)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert result.stdout == ""


def flip(folder: Path) -> None:
    data = bytearray((folder / "expected.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "expected.safetensors").write_bytes(data)


def age(folder: Path) -> None:
    about = vectors.read_manifest(folder)
    (folder / "manifest.json").write_text(json.dumps(about | {"schema": 0}))


def tear(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def forget(folder: Path) -> None:
    about = vectors.read_manifest(folder)
    del about["decode"]
    (folder / "manifest.json").write_text(json.dumps(about))


def enlist(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


def strip(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        (flip, "expected.safetensors is not what its manifest sealed"),
        (age, "has schema 0, this suite reads 1"),
        (tear, "has no manifest that can be read"),
        (forget, "is damaged, or not what it seems (KeyError: 'decode')"),
        (enlist, "has schema None, this suite reads 1"),
        (strip, "holds no vectors: write them there with bdh-conform vectors export"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_vectors_that_were_changed_are_refused(tmp_path: Path, outputs: Path, mistake, sentence: str) -> None:
    shutil.copytree(CASES[0], tmp_path / "vectors" / CASES[0].name)
    mistake(tmp_path / "vectors" / CASES[0].name)
    result = run("check", tmp_path / "vectors", outputs.parent)
    assert result.exit_code == 2
    assert sentence in " ".join(result.stderr.split())


def test_vectors_of_any_case_can_be_written(tmp_path: Path) -> None:
    result = run("export", tmp_path / "own", "--case", "B1 T6 L1 h1 D4 m2 V3 seed=1")
    assert result.exit_code == 0, result.output
    judged = vectors.read(tmp_path / "own" / "case_1")
    assert judged.vector.plan == (1, 3, 1, 1)
    today = {name: Expectation(e["float64"].reference, FLOAT64, FLOAT64) for name, e in judged.expected.items()}
    model = get_backend("numpy").load(judged.vector.params, judged.vector.config, dtype="float64")
    observed = vectors.observe(model, judged.vector)
    assert_agrees("numpy", observed, {name: today[name] for name in observed})


def test_an_export_names_what_is_wrong_and_replaces_nothing(exported: Path, tmp_path: Path) -> None:
    for words, sentence in (
        ((exported,), "exists: name a new or an empty folder"),
        ((tmp_path / "a", "--version", "0.1"), "no vectors '0.1' are published: there are 1.0"),
        ((tmp_path / "a", "--case", "B1 Q7"), "'Q7' is no part of a case"),
    ):
        result = run("export", *words)
        assert result.exit_code == 2
        assert sentence in " ".join(result.stderr.split())
    assert not (tmp_path / "a").exists()
