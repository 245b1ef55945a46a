"""bdh-train as its user runs it, and the recipe behind its flags."""

import dataclasses
import json
import resource
import signal
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import bdh_spec
from bdh_spec import BDHError, Params
from bdh_spec.params import count
from bdh_train import TrainConfig, TrainError, cli, memory, show, train
from bdh_train.batches import batches
from bdh_train.config import SIZES, as_toml, read_toml, resolve
from bdh_train.data import open_data
from bdh_train.measure import by_position
from bdh_train.schedule import rate

sys.path.insert(0, str(Path(__file__).parent))
from watching import Heard

TRAIN = str(Path(sys.executable).parent / "bdh-train")
Small = Callable[..., TrainConfig]
TINY = ["--n-layer", "1", "--n-embd", "8", "--n-head", "1", "--mlp-internal-dim-multiplier", "4", "--block-size", "16"]


def run(*arguments: str | Path, **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([TRAIN, *arguments], capture_output=True, text=True, check=False, **how)


def refused(*arguments: str | Path) -> str:
    """The sentence of a misuse: in this process, because a new one takes seconds."""
    said = CliRunner().invoke(cli.command, [*map(str, arguments)])
    error = said.exception
    assert said.stdout == ""
    if isinstance(error, SystemExit):  # click's own
        assert error.code == 2
        return said.stderr.strip().splitlines()[-1]
    assert isinstance(error, BDHError | OSError)
    return str(error)


def test_a_run_leaves_a_model_that_every_tool_takes_a_card_and_a_curve(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = run("--data", text, "--backend", "numpy", "--out", out, *TINY, "--max-steps", "8", "--eval-every", "4")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out / 'model.safetensors'}\n"
    assert "numpy on cpu, float32: 4,864 parameters, 128 tokens a step" in done.stderr
    assert "step 8 of 8: loss" in done.stderr
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, 9)]
    assert [line["step"] for line in lines if "val_loss" in line and "val_bits_per_byte" in line] == [4, 8]
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    card = (out / "README.md").read_text()
    assert f"{lines[-1]['val_bits_per_byte']:.3f}, on" in card
    assert "| 0-64 |" in card
    assert str(tmp_path) not in card
    generate = Path(sys.executable).parent / "bdh-generate"
    said = subprocess.run([generate, "1 and ", out / "model.safetensors", "-n", "3", "--backend", "numpy"], capture_output=True)
    assert said.returncode == 0
    assert len(said.stdout) == 9
    assert tomllib.loads((out / "config.toml").read_text())["n_embd"] == 8


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[2] / "examples").glob("*.toml")), ids=lambda file: file.stem)
def test_recipes_of_the_examples_are_runs(file: Path, text: Path) -> None:
    asked = read_toml(file) | {"data": (str(text),), "size": "hatchling"}
    assert resolve(TrainConfig(**asked)).n_embd == 64


def test_a_toml_file_says_what_flags_say_and_flags_override_it(text: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f'data = ["{text}"]\nmax-steps = 7\nlearning_rate = 1\nfreeze = "embed"\n')
    config = TrainConfig(**read_toml(file))
    assert (config.max_steps, config.learning_rate, config.freeze) == (7, 1.0, ("embed",))
    again = tmp_path / "again.toml"
    again.write_text(as_toml(resolve(config)))
    assert TrainConfig(**read_toml(again)) == resolve(config)
    done = CliRunner().invoke(
        cli.command,
        ["--config", str(file), "--max-steps", "2", "--out", str(tmp_path / "o"), "--backend", "numpy", "-q", *TINY],
    )
    assert done.exception is None, done.exception
    assert tomllib.loads((tmp_path / "o" / "config.toml").read_text())["max_steps"] == 2


MISUSES: dict[str, tuple[list[str], str]] = {
    "no data": ([], "no data: name files, folders or a dataset with --data"),
    "no such file": (["--data", "./none.txt"], "./none.txt does not exist: check the path"),
    "a word for a number": (["--data", "{text}", "--max-steps", "many"], "'many' is not a valid integer."),
    "no steps": (["--data", "{text}", "--max-steps", "0"], "max_steps is 0: give a number of at least 1"),
    "no such size": (["--data", "{text}", "--size", "huge"], "size is 'huge': choose from hatchling, small, base, large"),
    "no such template": (
        ["--data", "{text}", "--template", "x"],
        "template is 'x': choose from system, instruction, both, full",
    ),
    "no such weight": (["--data", "{text}", "--freeze", "head"], "frozen names head: the weights are embed, encoder"),
    "negative rate": (
        ["--data", "{text}", "--learning-rate", "-1"],
        "learning_rate is -1.0: give a finite number of at least 0",
    ),
    "rate of nan": (["--data", "{text}", "--learning-rate", "nan"], "learning_rate is nan: give a finite number of at least 0"),
    "clip of nan": (["--data", "{text}", "--grad-clip", "nan"], "grad_clip is nan: give a number of at least 0"),
    "a window longer than all": (["--data", "{text}", "--block-size", "100000"], "bytes are to train on, and a window of"),
    "odd neurons": (["--data", "{text}", "--n-embd", "3", "--n-head", "128"], "neurons per head, which rotation cannot pair"),
    "no run to resume": (["--resume", "--out", "{folder}/none"], "holds no run: leave --resume out to begin one"),
    "no such port": (["--data", "{text}", "--backend", "tensorflow"], "no port is named 'tensorflow'"),
    "no such dtype": (["--data", "{text}", "--backend", "numpy", "--dtype", "bf16"], "has no dtype 'bfloat16' here"),
    "no such checkpoint": (["--data", "{text}", "--init-from", "{folder}/no.pt"], "no.pt does not exist: check the path"),
    "a size for a checkpoint": (["--data", "{text}", "--init-from", "{embedded}", "--size", "base"], "size is given, and"),
    "no toml": (["--config", "{text}"], "book.txt is no TOML"),
    "no such toml": (["--config", "{folder}/none.toml"], "none.toml cannot be read"),
    "a folder that is a file": (["--data", "{text}", "--out", "{text}"], "book.txt is not empty: give --resume"),
    "long windows that are not": (
        ["--data", "{text}", "--long-block-size", "256"],
        "long_block_size is 256: give more than block_size, 256",
    ),
    "long steps of no windows": (
        ["--data", "{text}", "--long-steps", "5"],
        "say how long their windows are with long_block_size",
    ),
    "a long window longer than all": (
        ["--data", "{text}", "--block-size", "16", "--long-block-size", "100000"],
        "a window of long_block_size takes 100,001: give more text, a smaller --long-block-size",
    ),
    "windows below two": (
        ["--data", "{text}", "--min-block-size", "1"],
        "min_block_size is 1: give a number from 2 to block_size",
    ),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_a_misuse_is_one_sentence(text: Path, tmp_path: Path, misuse: str) -> None:
    words, sentence = MISUSES[misuse]
    names = {"text": str(text), "folder": str(tmp_path), "embedded": str(bdh_spec.checkpoint.EMBEDDED)}
    sizes = [] if misuse == "a size for a checkpoint" else ["--out", str(tmp_path / "run")] if "--out" not in words else []
    said = refused(*(word.format(**names) for word in words), *sizes)
    assert sentence in said
    assert "\n" not in said
    assert not (tmp_path / "run").exists(), "what was refused must not look like a run"


def test_an_unknown_setting_is_named_with_the_one_that_was_meant(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("learning_rat = 1e-3\n")
    assert refused("--config", file) == f"{file} has the unknown setting learning_rat: did you mean learning_rate?"
    file.write_text('max_steps = "many"\n')
    assert refused("--config", file) == "max_steps is 'many': give a whole number"


def test_misuse_exits_2_and_says_who_complains(tmp_path: Path) -> None:
    done = run("--data", "./none.txt", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "bdh-train: ./none.txt does not exist: check the path\n")


# The tests of other ports may have left JAX in this process, which warns of every fork.
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_one_sentence(text: Path, tmp_path: Path) -> None:
    """No file of this process may be longer than 20,000 bytes, which a checkpoint is."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    options = ["--data", text, "--backend", "numpy", "--out", tmp_path / "run", *TINY, "--max-steps", "2"]
    done = run("-q", *options, preexec_fn=limited)
    assert done.returncode == 2
    (sentence,) = done.stderr.splitlines()
    assert "could not be written (File too large): nothing was left there" in sentence


def test_the_schedule_warms_up_and_falls() -> None:
    config = TrainConfig(learning_rate=1.0, warmup_steps=4, max_steps=12, final_rate=0.1)
    rates = [rate(config, step) for step in range(1, 13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[7] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
    assert rate(dataclasses.replace(config, schedule="constant"), 12) == 1.0


def test_fine_tuning_starts_from_a_checkpoint_of_any_dialect_and_frozen_weights_stay(small: Small, tmp_path: Path) -> None:
    model = tmp_path / "start.safetensors"
    convert = Path(sys.executable).parent / "bdh-convert"
    subprocess.run([convert, "--to", "mlx", bdh_spec.checkpoint.EMBEDDED, "-o", model], check=True, capture_output=True)
    sizes = dict.fromkeys(("n_layer", "n_embd", "n_head", "mlp_internal_dim_multiplier", "dropout"))
    config = small(init_from=str(model), freeze=["embed", "lm_head"], max_steps=2, **sizes)
    train(config)
    start, (end, _) = bdh_spec.read(None)[0], bdh_spec.read(Path(config.out) / "model.safetensors")
    still = [name for name, a, b in zip(Params._fields, start, end, strict=True) if np.array_equal(a, b)]
    assert still == ["embed", "lm_head"]


def test_a_run_that_no_more_gets_better_ends(small: Small, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_bytes(b"~" * 200)
    config = small(patience=2, max_steps=50, eval_every=1, val=str(tmp_path / "other.txt"), warmup_steps=0)
    result = train(config)
    lines = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    assert result.is_done
    assert result.step == min(lines, key=lambda line: line["val_loss"])["step"] + 2 < 50
    assert train(config, resume=True).step == result.step


class Writer:
    """TensorBoard's ``summary.Writer``, which may fail at any number that it is given."""

    def __init__(self, folder: str, fails_at: int) -> None:
        self.folder, self.fails_at, self.written, self.is_closed = folder, fails_at, list[tuple[str, float, int]](), False

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if len(self.written) == self.fails_at:
            raise OSError("no space is left for pictures")
        self.written.append((name, value, step))

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize("fails_at", [1000, 0, 5])
def test_tensorboard_is_told_the_numbers_of_a_run_and_ends_none(
    small: Small, fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Writer] = []
    summary = types.SimpleNamespace(Writer=lambda folder: made.append(Writer(folder, fails_at)) or made[-1])
    monkeypatch.setitem(sys.modules, "tensorboard.summary", summary)
    monkeypatch.setattr(show, "find_spec", lambda name: name)
    config = small()
    assert train(config).is_done
    (board,) = made
    lines = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "rate", "val_loss", "val_bits_per_byte")
    assert board.folder == str(Path(config.out) / "tensorboard")
    assert board.written == [(name, line[name], line["step"]) for line in lines for name in names if name in line][:fails_at]
    assert board.is_closed == (fails_at == 1000)


def test_a_step_is_made_on_all_of_its_batches_and_samples_are_shown_on_the_way(small: Small, tmp_path: Path) -> None:
    config, heard = small(max_steps=2, dropout=0.0, accumulate=3, sample_every=2), Heard()
    train(config, talk=heard)
    (text,) = heard.samples
    assert text.startswith(b"The ")
    assert len(text) == 4 + 300
    pairs = batches(config, open_data(config, tmp_path)[0], 1)
    assert len(pairs) == 3
    fresh = bdh_spec.init(resolve(config).model, np.random.default_rng(config.seed))
    model = bdh_spec.get_backend("numpy").load(fresh, resolve(config).model)
    line = json.loads((Path(config.out) / "metrics.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(np.mean([model.loss(*pair) for pair in pairs]), rel=1e-6)


def test_a_run_ends_with_longer_windows_and_its_card_says_so(small: Small) -> None:
    config, heard = small(dropout=0.0, long_block_size=64), Heard()
    result = train(config, talk=heard)
    assert result.is_done
    told = (Path(config.out) / "README.md").read_text()
    assert "step 6 of 6, each 3 windows of 16 bytes, and of 64 in the last 1 of 6 steps" in told
    assert ", in windows of 64 |" in told
    assert any("48 tokens a step (64 in the last 1)" in sentence for sentence in heard.sentences)


def test_a_run_learns(small: Small, tmp_path: Path) -> None:
    config = small(max_steps=40, eval_every=20, checkpoint_every=40, learning_rate=2e-2, dropout=0.0, min_block_size=8)
    result = train(config)
    lines = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] > 5.4
    assert result.val_bits_per_byte is not None
    assert result.val_bits_per_byte < 0.65 * lines[0]["loss"] / np.log(2)


def test_the_memory_of_a_step_is_told_and_what_to_do_about_it() -> None:
    config = resolve(TrainConfig(data="x", batch_size=32, block_size=512))
    assert 20 < memory.estimate(config, "torch") / 2**30 < 80
    assert memory.estimate(config, "jax") < memory.estimate(config, "torch") / 2
    said = memory.says(config, "torch", "cpu", 16 << 30)
    assert "16.0 GB that cpu has, which is too much: try --batch-size 8 --accumulate 4" in said
    smaller = dataclasses.replace(config, batch_size=8, accumulate=4)
    assert memory.estimate(smaller, "torch") <= 16 << 30
    assert memory.says(smaller, "torch", "cpu", 16 << 30).endswith("that cpu has")
    assert "try --batch-size 1 --block-size" in memory.says(config, "torch", "cpu", 2 << 30)
    assert memory.says(config, "torch", "gpu", None).startswith("about ")
    long = dataclasses.replace(config, batch_size=1, long_block_size=8192, long_steps=10)
    assert memory.estimate(long, "torch") > 10 * memory.estimate(dataclasses.replace(config, batch_size=1), "torch")
    assert "try --batch-size 1 --long-block-size 2048" in memory.says(long, "torch", "cpu", 10 << 30)
    assert "try --batch-size 1 --block-size 512 and no --long-block-size" in memory.says(long, "torch", "cpu", 4 << 30)


def test_named_sizes_are_what_they_are_called() -> None:
    sizes = {name: count(config) for name, config in SIZES.items()}
    assert sizes == {"hatchling": 425_984, "small": 3_211_264, "base": 25_296_896, "large": 100_925_440}
    assert SIZES["base"] == bdh_spec.BDHConfig()
    assert resolve(TrainConfig(data="x", size="hatchling")).learning_rate == pytest.approx(4e-3)
    assert resolve(TrainConfig(data="x")).learning_rate == pytest.approx(1e-3)


def test_bits_by_position_are_those_of_reading_the_whole_window(small: Small) -> None:
    from bdh_train.data import Text

    model = bdh_spec.load(backend="numpy")
    text = np.frombuffer(b"The elements of the list are not the elements of the other list, " * 12, np.uint8)
    found = by_position(model, Text((text,)), 700, windows=1)
    tokens, targets = text[:700].astype(int)[None], text[1:701].astype(int)[None]
    for place, bits in found.items():
        low, high = map(int, place.split("-"))
        kept = np.full_like(targets, -100)
        kept[:, low:high] = targets[:, low:high]
        assert bits == pytest.approx(model.loss(tokens, kept) / np.log(2), rel=1e-4)
    assert [*found] == ["0-64", "64-128", "128-256", "256-512", "512-700"]


def test_a_loss_that_is_none_ends_the_run_with_a_sentence(small: Small) -> None:
    config = small(learning_rate=1e30, warmup_steps=0, grad_clip=0)
    with np.errstate(all="ignore"), pytest.raises(TrainError, match=r"^the loss of step \d is (nan|inf): "):
        train(config)
