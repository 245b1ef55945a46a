"""bdh-generate as its user runs it: a process, bytes in, bytes out."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

import bdh_spec
from bdh_spec.checkpoint import EMBEDDED
from bdh_spec.files import write_safetensors
from bdh_spec.rope import frequencies

GENERATE = str(Path(sys.executable).parent / "bdh-generate")
NUMPY = ["--backend", "numpy"]


def generate(*arguments: str | bytes, stdin: bytes = b"", cwd: Path | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([GENERATE, *arguments], input=stdin, capture_output=True, cwd=cwd, check=False)


def refused(finished: subprocess.CompletedProcess[bytes]) -> str:
    """The one sentence on stderr of a run that was refused before it wrote anything."""
    assert finished.returncode == 2
    assert finished.stdout == b""
    (sentence,) = finished.stderr.decode().splitlines()
    assert sentence.startswith("bdh-generate: ")
    return sentence


def test_the_readme_command_writes_the_prompt_and_its_continuation_and_nothing_else() -> None:
    options = ["--seed", "7", "--max-new-tokens", "20", "--temperature", "0.8", "--top-k", "50"]
    finished = generate("The dragon", *NUMPY, *options, str(EMBEDDED))
    expected = bdh_spec.load(backend="numpy").generate("The dragon", 20, 0.8, 50, 7)
    assert finished.stdout == expected
    assert b"numpy on cpu, float32" in finished.stderr
    assert b"seed 7" in finished.stderr


def test_r14_one_seed_gives_one_text_on_every_port() -> None:
    texts = {
        port: generate("The ", "--backend", port, "--seed", "7", "-n", "40").stdout for port in ("numpy", "torch", "jax", "mlx")
    }
    assert set(texts.values()) == {texts["numpy"]}
    assert len(texts["numpy"]) == 44


def test_temperature_zero_is_greedy_whatever_the_seed() -> None:
    one, other = (generate("The ", *NUMPY, "--temperature", "0", "--seed", seed, "-n", "20").stdout for seed in "12")
    assert one == other


def test_any_bytes_go_in_by_argument_and_by_stdin() -> None:
    bytes_in = bytes(range(1, 256))
    by_argument = generate(bytes_in, *NUMPY, "--seed", "1", "-n", "5")
    by_stdin = generate("-", *NUMPY, "--seed", "1", "-n", "5", stdin=bytes_in)
    assert by_argument.stdout == by_stdin.stdout
    assert by_stdin.stdout.startswith(bytes_in)
    assert generate("-", *NUMPY, "-n", "0", stdin=b"\0\n").stdout == b"\0\n"


def test_without_a_seed_it_says_which_one_it_took() -> None:
    first = generate("The ", *NUMPY, "-n", "30")
    seed = first.stderr.decode().split("seed ")[1].split()[0]
    assert generate("The ", *NUMPY, "-n", "30", "--seed", seed).stdout == first.stdout


def test_quiet_says_nothing() -> None:
    assert generate("The ", *NUMPY, "-n", "3", "-q").stderr == b""


def test_a_terminal_gets_a_last_newline() -> None:
    parent, child = pty.openpty()
    subprocess.run([GENERATE, "ab", *NUMPY, "-n", "0", "-q"], stdout=child, check=True)
    os.close(child)
    assert os.read(parent, 100) == b"ab\r\n"
    os.close(parent)


@pytest.mark.parametrize(("first", "second"), [("numpy", "torch"), ("torch", "jax"), ("jax", "mlx"), ("mlx", "numpy")])
def test_r13_a_text_goes_on_from_a_saved_state_on_another_port(tmp_path: Path, first: str, second: str) -> None:
    whole = generate("The dragon", *NUMPY, "--seed", "7", "-n", "30").stdout
    save, load = (f"--{verb}-state={tmp_path / 's.safetensors'}" for verb in ("save", "load"))
    begun = generate("The dragon", "--backend", first, "--seed", "7", "-n", "12", save)
    continued = generate("--backend", second, "--seed", "7", "-n", "18", load)
    assert begun.stdout + continued.stdout == whole


def test_a_prompt_alone_can_be_saved_and_a_state_can_be_rolled_on(tmp_path: Path) -> None:
    whole = generate("The dragon", *NUMPY, "--seed", "7", "-n", "9").stdout
    state = str(tmp_path / "s.safetensors")
    parts = [generate("The dragon", *NUMPY, "-n", "0", "--save-state", state)]
    parts += [generate(*NUMPY, "--seed", "7", "-n", "3", "--load-state", state, "--save-state", state) for _ in range(3)]
    assert b"".join(part.stdout for part in parts) == whole


def test_a_prompt_after_a_loaded_state_comes_next_in_the_text(tmp_path: Path) -> None:
    state = str(tmp_path / "s.safetensors")
    generate("The ", *NUMPY, "-n", "0", "--save-state", state)
    joined = generate("The dragon", *NUMPY, "--seed", "7", "-n", "9").stdout
    assert b"The " + generate("dragon", *NUMPY, "--seed", "7", "-n", "9", "--load-state", state).stdout == joined


def test_bad_input_gets_one_sentence(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.safetensors")
    assert "does not exist" in refused(generate("a", missing, *NUMPY))
    assert "the prompt is empty" in refused(generate("", *NUMPY))
    assert "temperature is -1.0" in refused(generate("a", "--temperature", "-1"))
    assert "no port is named 'tinygrad'" in refused(generate("a", "--backend", "tinygrad"))
    assert "no dtype 'int8'" in refused(generate("a", *NUMPY, "--dtype", "int8"))
    assert "No such option" in refused(generate("a", "--tempratur", "1"))
    assert "is not a folder" in refused(generate("a", *NUMPY, "--save-state", str(tmp_path / "no" / "s")))


@pytest.mark.parametrize("name", ["model.safetensors", "gone.PT", "folder/model.npz"])
def test_a_checkpoint_alone_is_not_read_out_as_a_prompt(name: str, tmp_path: Path) -> None:
    shutil.copy(EMBEDDED, tmp_path / "model.safetensors")
    said = refused(generate(name, *NUMPY, cwd=tmp_path))
    assert said == f"bdh-generate: {name} is taken for a checkpoint, so no prompt is left: bdh-generate PROMPT {name}"


@pytest.mark.parametrize("prompt", ["x" * 10_000, ".", "model"])
def test_any_other_word_alone_is_a_prompt(prompt: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert generate(prompt, *NUMPY, "-n", "0", cwd=tmp_path).stdout == prompt.encode()


def test_a_checkpoint_alone_goes_on_with_a_saved_state(tmp_path: Path) -> None:
    shutil.copy(EMBEDDED, tmp_path / "model.safetensors")
    generate("The ", *NUMPY, "-n", "0", "--save-state", "s", cwd=tmp_path)
    alone = generate("model.safetensors", *NUMPY, "--seed", "7", "-n", "9", "--load-state", "s", cwd=tmp_path)
    assert alone.returncode == 0
    assert b"The " + alone.stdout == generate("The ", *NUMPY, "--seed", "7", "-n", "9").stdout


def test_options_that_would_be_ignored_are_refused() -> None:
    assert "--force lets --save-state replace a file" in refused(generate("a", *NUMPY, "--force"))
    assert "--n-layer would be ignored" in refused(generate("a", *NUMPY, "--n-layer", "4"))
    for words in (["--seed", "7"], ["-q"], ["-n", "200"], ["--device", "cpu"]):  # defaults too: they were typed
        assert "--backends writes no text, so --" in refused(generate("--backends", *words))
    assert "so prompt would be ignored" in refused(generate("--backends", "a"))


def test_the_version_is_told() -> None:
    assert generate("--version").stdout.decode() == f"bdh-generate {version('bdh-spec')}\n"


@pytest.mark.parametrize(("word", "dtype"), [("fp32", b"float32"), ("F64", b"float64")])
def test_every_name_of_a_dtype_means_one_thing(word: str, dtype: bytes) -> None:
    assert dtype in generate("a", *NUMPY, "-n", "1", "--dtype", word).stderr


def test_weights_are_no_state_and_it_says_where_they_belong(tmp_path: Path) -> None:
    assert "weights are named as the checkpoint" in refused(generate("a", *NUMPY, "--load-state", str(EMBEDDED)))


def test_a_terminal_of_ascii_gets_errors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    assert "n\\xf4 does not exist" in refused(generate("a", "nô", *NUMPY))


def test_an_existing_state_is_not_replaced_unless_asked(tmp_path: Path) -> None:
    state = tmp_path / "s.safetensors"
    state.write_bytes(b"precious")
    assert "exists" in refused(generate("a", *NUMPY, "-n", "1", "--save-state", str(state)))
    assert state.read_bytes() == b"precious"
    assert generate("a", *NUMPY, "-n", "1", "--force", "--save-state", str(state)).returncode == 0
    assert state.read_bytes() != b"precious"


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    params, config = bdh_spec.read()
    other = tmp_path / "other.safetensors"
    bdh_spec.save(other, params._replace(lm_head=params.lm_head + np.float32(1)), config)
    state = str(tmp_path / "s.safetensors")
    generate("a", *NUMPY, "-n", "1", "--save-state", state)
    assert "is a state of model" in refused(generate(*NUMPY, "--load-state", state, "-c", str(other)))


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """The embedded model with a table moved as BDH-MLX's optimiser moves it, in a file that does not say it was meant."""
    params, config = bdh_spec.read()
    table = frequencies(config.n_neurons) + np.random.default_rng(0).choice([-5e-3, 5e-3], config.n_neurons)
    tensors = dict(zip(("embed.weight", "encoder", "encoder_v", "decoder", "lm_head"), params, strict=True))
    write_safetensors(tmp_path / "m.safetensors", tensors | {"attn.freqs": table.astype(np.float32)}, {})
    (tmp_path / "config.json").write_text(json.dumps(config.as_dict()))
    return tmp_path / "m.safetensors"


def test_trained_frequencies_are_refused_kept_or_reset(trained: Path) -> None:
    sentence = refused(generate("The ", str(trained)))
    assert "attn.freqs differs from BDH's frequency table" in sentence
    assert "--freqs reset" in sentence
    assert "--freqs keep" in sentence
    options = ["--seed", "7", "-n", "40", "--temperature", "0"]
    kept, reset = (generate("The ", str(trained), *NUMPY, *options, "--freqs", wish) for wish in ("keep", "reset"))
    assert kept.stdout == bdh_spec.load(trained, "numpy", freqs="keep").generate("The ", 40, 0.0)
    assert reset.stdout == bdh_spec.load(backend="numpy").generate("The ", 40, 0.0)
    assert kept.stdout != reset.stdout


def test_a_state_of_another_table_is_refused(trained: Path, tmp_path: Path) -> None:
    state = str(tmp_path / "s.safetensors")
    options = [*NUMPY, "--seed", "7", "-n", "6"]
    begun = generate("The ", str(trained), *options, "--freqs", "keep", "--save-state", state)
    on = generate("--load-state", state, "-c", str(trained), *options, "--freqs", "keep")
    whole = bdh_spec.load(trained, "numpy", freqs="keep").generate("The ", 12, 1.0, None, 7)
    assert begun.stdout + on.stdout == whole
    for other in (["--freqs", "reset", "-c", str(trained)], []):
        assert "is a state of model" in refused(generate("--load-state", state, *options, *other))


def test_other_vocabularies_than_bytes_are_refused(tmp_path: Path) -> None:
    config = bdh_spec.BDHConfig(n_layer=1, n_embd=4, n_head=1, mlp_internal_dim_multiplier=2, vocab_size=300)
    bdh_spec.save(tmp_path / "m.safetensors", bdh_spec.init(config, np.random.default_rng(0)), config)
    assert "300 tokens, and bytes are 256" in refused(generate("a", str(tmp_path / "m.safetensors"), *NUMPY))


def test_an_interrupted_run_saves_nothing_and_says_so(tmp_path: Path) -> None:
    state = tmp_path / "s.safetensors"
    command = [GENERATE, "The ", *NUMPY, "-n", "1000000", "--save-state", str(state)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert stderr.decode().splitlines()[-1] == "bdh-generate: interrupted"
    assert b"Traceback" not in stderr
    assert not list(tmp_path.iterdir())


def test_a_reader_that_has_had_enough_ends_the_run_quietly() -> None:
    with subprocess.Popen(
        [GENERATE, "The ", *NUMPY, "-n", "100000", "-q"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        started = time.monotonic()
        assert process.stderr.read() == b""
        assert process.wait(timeout=20) == 1
        assert time.monotonic() - started < 20


def test_backends_are_shown_as_a_table() -> None:
    finished = generate("--backends")
    assert finished.returncode == 0
    for port in ("numpy", "torch", "mlx", "jax"):
        assert port in finished.stdout.decode()
