"""The command bdh-look: answers on stdout or in files, misuse in one sentence, files whole or not at all."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import bdh_spec
from bdh_look import cli, neurons
from bdh_spec import BDHConfig
from bdh_spec.params import fingerprint

LOOK = str(Path(sys.executable).parent / "bdh-look")
CONFIG = BDHConfig(n_layer=2, n_embd=12, n_head=2, mlp_internal_dim_multiplier=4)
TEXT = b'The "quick" fox (number 12) jumps.\nif x[1] == {"a": 2}: return [3]\n\n' * 12


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small model and a text."""
    monkeypatch.chdir(tmp_path)
    bdh_spec.save("m.safetensors", bdh_spec.init(CONFIG, np.random.default_rng(5)), CONFIG)
    Path("text").write_bytes(TEXT)
    return tmp_path


def look(*words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([LOOK, *words], input=stdin, capture_output=True, check=False)


def run(*words: str) -> str:
    """The same in this process, which is quicker: its stdout."""
    done = CliRunner().invoke(cli.command, [*words, "-c", "m.safetensors", "--backend", "numpy", "-q"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one sentence on stderr of a run that was refused."""
    monkeypatch.setattr(sys, "argv", ["bdh-look", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    (sentence,) = said.err.strip().splitlines()
    assert sentence.startswith("bdh-look: ")
    return sentence


def test_a_text_alone_means_its_page(folder: Path) -> None:
    done = look("-", "-c", "m.safetensors", "--backend", "numpy", "-o", "page.html", stdin=TEXT[:40])
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"page.html\n"
    assert b"numpy on cpu, float32" in done.stderr
    assert "Inside <em>m.safetensors</em>" in Path("page.html").read_text(encoding="utf-8")
    assert sorted(path.name for path in folder.iterdir()) == ["m.safetensors", "page.html", "text"]


def test_a_page_goes_to_stdout_and_a_word_that_is_a_command_can_be_a_text(folder: Path) -> None:
    assert run("page", "neurons", "-o", "-").startswith("<!doctype html>")
    assert run("A dragon", "-o", "-", "--no-causes").startswith("<!doctype html>")


def test_the_version_and_the_help_are_told() -> None:
    runner = CliRunner()
    assert runner.invoke(cli.command, ["--version"]).output == f"bdh-look {version('bdh-spec')}\n"
    assert "neurons" in runner.invoke(cli.command, ["--help"]).output


def test_neurons_prints_tables_and_writes_what_it_found(folder: Path) -> None:
    words = ["neurons", "--data", "text", "--window", "32", "--shifts", "20", "--seed", "3", "--also", "m.safetensors"]
    out = run(*words, "--synapses", "--json", "n.json")
    for title in ("Active neurons", "By position", "Selective xy_sparse", "State entries"):
        assert title in out
    found = json.loads(Path("n.json").read_text())
    assert found["seed"] == 3
    assert len(found["density"]["x_sparse"]) == 2
    assert found["also"]["m.safetensors"]["xy_sparse"] == pytest.approx(np.mean(found["density"]["xy_sparse"]))
    again = run(*words, "--synapses", "--json", "n.json", "--force")
    assert again == out  # one seed, one answer


def test_density_over_training_is_told_and_drawn(folder: Path) -> None:
    Path("run/checkpoints").mkdir(parents=True)
    for step in (100, 20):
        params = bdh_spec.init(CONFIG, np.random.default_rng(step))
        bdh_spec.save(f"run/checkpoints/step-{step:08d}.safetensors", params, CONFIG)
    words = ["neurons", "--data", "text", "--window", "32", "--shifts", "20", "--seed", "3", "--json", "n.json"]
    out = run(*words, "--also", "run", "--picture", "n.png")
    also = json.loads(Path("n.json").read_text())["also"]
    assert list(also) == ["run/checkpoints/step-00000020.safetensors", "run/checkpoints/step-00000100.safetensors"]
    rows = re.findall(r"│ (20|100|m\.safetensors) ", out[out.index("Over training") :])
    assert rows[:3] == ["20", "100", "m.safetensors"]
    for path, found in also.items():
        seen = neurons.activity(bdh_spec.load(path, "numpy"), TEXT, 32)
        for kind, values in seen.density.items():
            assert found["density"][kind] == pytest.approx(values.mean(-1))
            assert found["by_position"][0][kind] == pytest.approx(values[..., :8].mean())
    assert Path("n.png").read_bytes().startswith(b"\x89PNG")


def test_graph_prints_tables_and_writes_graphs_and_pictures(folder: Path) -> None:
    out = run(
        "graph",
        "--data",
        "text",
        "--seed",
        "3",
        "--edges",
        "4",
        "--replicas",
        "2",
        "--controls",
        "2",
        "--graphml",
        "g",
        "--picture",
        "g",
        "--json",
        "g.json",
    )
    assert "Gx: modularity" in out
    assert "Gy: what the largest communities respond to" in out
    assert {path.name for path in folder.glob("g.*")} == {"g.Gx.graphml", "g.Gy.graphml", "g.Gx.png", "g.Gy.png", "g.json"}
    assert set(json.loads(Path("g.json").read_text())["graphs"]["Gx"]) == {"trained", "shuffled", "responses"}


def test_state_follows_a_text_and_compares_two_states(folder: Path) -> None:
    out = run("state", "--data", "text", "--trials", "2", "--seed", "3", "--json", "s.json")
    assert "norm and effective rank" in out
    assert "A planted word of random letters" in out
    assert json.loads(Path("s.json").read_text())["course"][-1]["bytes"] == len(TEXT)
    params, config = bdh_spec.read("m.safetensors")
    model = bdh_spec.load("m.safetensors", "numpy")
    for name, text in (("a", b"The fox"), ("b", b"The box")):
        _, after = model.advance(model.init_state(), np.frombuffer(text, np.uint8)[None])
        bdh_spec.checkpoint.save_state(name, model.export_state(after), config, fingerprint(params), np.array([[1]]))
    out = run("state", "a", "b")
    assert "a at byte 7, b at byte 7" in out
    assert "Entries that differ most" in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["a"], "has 1 bytes: a page shows 2 to 2,000"),
        (["ab", "-o", "text"], "text exists: choose another name or give --force"),
        (["ab", "-o", "no/page.html"], "no is not a folder"),
        (["ab", "-c", "gone"], "gone does not exist"),
        (["ab", "--backend", "tinygrad"], "no port is named 'tinygrad'"),
        (["ab", "--n-layer", "3"], "--n-layer would be ignored"),
        (["ab", "--tempratur"], "No such option"),
        (["neurons"], "Missing option '--data'"),
        (["neurons", "--data", "gone"], "gone does not exist"),
        (["neurons", "--data", "text", "--seed", "-1"], "the seed is -1"),
        (["neurons", "--data", "text", "--shifts", "3"], "3 shifts"),
        (["graph", "--edges", "0"], "0.0 edges per neuron"),
        (["graph", "--controls", "1"], "1 controls"),
        (["state"], "give --data FILE, or two saved states"),
        (["state", "text"], "give --data FILE, or two saved states"),
        (["state", "text", "text", "-c", "m.safetensors"], "text is no whole safetensors file"),
    ],
)
def test_misuse_gets_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert sentence in refused(monkeypatch, capsys, *words, *([] if "--backend" in words else ["--backend", "numpy"]), "-q")
    assert sorted(path.name for path in folder.iterdir()) == ["m.safetensors", "text"]


def test_no_words_at_all_get_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is nothing to look at: give a TEXT, or one of graph, " in refused(monkeypatch, capsys)


def test_other_vocabularies_than_bytes_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = BDHConfig(n_layer=1, n_embd=4, n_head=1, mlp_internal_dim_multiplier=2, vocab_size=300)
    bdh_spec.save("wide.safetensors", bdh_spec.init(config, np.random.default_rng(0)), config)
    assert "300 tokens, and bytes are 256" in refused(monkeypatch, capsys, "ab", "-c", "wide.safetensors", "-q")
