"""bdh-convert as it is typed: routes, redirections, names, and what goes to which stream."""

from __future__ import annotations

import json
import math
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np
import pytest

from bdh_convert import route
from bdh_convert.checkpoint import open_checkpoint, read
from bdh_convert.convert import Settings, convert, default_output
from bdh_convert.dialects import DIALECTS, to_dialect
from bdh_convert.inspect import report
from bdh_convert.tensors import Tensor
from bdh_spec import BDHConfig, Params
from bdh_spec.params import shapes

Canonical = Callable[[BDHConfig], Path]
Run = Callable[..., subprocess.CompletedProcess[str]]
COMMAND = f"{sys.executable} -c 'from bdh_convert.cli import main; main()'"


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A line as a shell understands it."""
    line = line.replace("bdh-convert", COMMAND)
    return subprocess.run(["/bin/sh", "-c", line], cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_unquoted_route_does_what_it_says_and_leaves_no_stray_file(
    canonical: Canonical, small: BDHConfig, tmp_path: Path
) -> None:
    canonical(small)
    done = shell("bdh-convert numpy->mlx checkpoint.safetensors", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "the shell took '>' for a redirection: this is read as numpy->mlx" in done.stderr
    assert "the empty file mlx that it made is removed" in done.stderr
    assert "read back bit for bit" in done.stderr
    assert names(tmp_path) == {"checkpoint.safetensors", "checkpoint.mlx.safetensors"}
    assert open_checkpoint(tmp_path / "checkpoint.mlx.safetensors").dialect == "mlx"


def test_an_unquoted_target_alone_does_too(canonical: Canonical, small: BDHConfig, tmp_path: Path) -> None:
    canonical(small)
    done = shell("bdh-convert ->hf checkpoint.safetensors", tmp_path)
    assert done.returncode == 0, done.stderr
    assert names(tmp_path) == {"checkpoint.safetensors", "checkpoint.hf"}


def test_an_unquoted_route_that_fails_leaves_no_stray_file_either(tmp_path: Path) -> None:
    done = shell("bdh-convert torch->mlx nowhere.safetensors", tmp_path)
    assert done.returncode == 2
    assert "nowhere.safetensors does not exist" in done.stderr
    assert names(tmp_path) == set()


@pytest.mark.parametrize("line", ["bdh-convert torch- m", "bdh-convert torch- m > other", "bdh-convert torch- m | cat"])
def test_half_a_route_without_a_dialects_file_on_stdout_is_refused(line: str, tmp_path: Path) -> None:
    done = shell(line, tmp_path)
    assert "'torch-' names no target, since a shell reads '>' as a redirection: quote the route, 'torch->mlx'" in done.stderr


def test_a_file_of_the_user_on_stdout_is_not_taken_for_a_stray_one(
    canonical: Canonical, small: BDHConfig, tmp_path: Path
) -> None:
    canonical(small)
    done = shell("bdh-convert numpy-to-torch checkpoint.safetensors > mlx", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "read back bit for bit" in (tmp_path / "mlx").read_text()


def test_a_stray_file_that_is_not_empty_stays(tmp_path: Path) -> None:
    (tmp_path / "mlx").write_text("kept")
    assert route.remove_stray(tmp_path / "mlx").endswith("is not empty, so it stays")
    assert (tmp_path / "mlx").read_text() == "kept"


@pytest.mark.parametrize(
    "words",
    [
        ("torch->mlx", "m"),
        ("torch→mlx", "m"),
        ("torch-to-mlx", "m"),
        ("--from", "torch", "--to", "mlx", "m"),
        ("torch->mlx", "m", "--from", "torch"),
        ("->mlx", "m"),
        ("mlx", "m"),
        ("--to", "mlx", "m"),
    ],
)
def test_every_way_to_name_a_route_does_the_same(
    words: tuple[str, ...], canonical: Canonical, small: BDHConfig, call: Run
) -> None:
    made = call("numpy->torch", canonical(small), "-o", "m.safetensors")
    assert made.returncode == 0, made.stderr
    done = call(*(word if word != "m" else "m.safetensors" for word in words))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("m.mlx.safetensors: torch to mlx, ")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ((), "name a route and a file"),
        (("a", "b", "c"), "name a route and a file"),
        (("m",), "name the dialect to convert to: numpy, jax, torch, mlx, hf"),
        (("torch->tensorflow", "m"), "no dialect is named 'tensorflow': there are numpy, jax, torch"),
        (("caffe->torch", "m"), "no dialect is named 'caffe'"),
        (("torch->burn", "m"), "burn is read and not written"),
        (("--to", "paper", "m"), "paper is read and not written"),
        (("torch->mlx", "m", "--to", "jax"), "the route says mlx and --to says jax: say it once"),
        (("--to", "mlx", "m", "--dtype", "int8"), "int8"),
        (("--to", "mlx", "m", "--n-layer", "0"), "--n-layer"),
        (("--to", "mlx", "m", "--wrong"), "--wrong"),
        (("--inspect", "m", "--force"), "--inspect writes nothing, so --force would be ignored"),
        (("--inspect", "m", "-o", "n"), "--inspect writes nothing, so --output would be ignored"),
        (("--inspect", "m", "--to", "hf"), "--inspect writes nothing, so --to would be ignored"),
        (("--inspect", "m", "n"), "--inspect takes one file"),
        (("--inspect", "m", "--max-shard-size", "1GB"), "--inspect writes nothing, so --max-shard-size would be ignored"),
        (("hf", "m", "--max-shard-size", "many"), "'many' is no size of a file: give one such as 5GB or 500MiB"),
        (("hf", "m", "--max-shard-size", "0"), "'0' is no size of a file"),
    ],
)
def test_misuse_prints_one_sentence_and_exits_2(words: tuple[str, ...], complaint: str, call: Run) -> None:
    done = call(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_answers_go_to_stdout_and_talk_to_stderr(canonical: Canonical, small: BDHConfig, call: Run) -> None:
    call("numpy->mlx", canonical(small), "-o", "m.npz")
    done = call("mlx->torch", "m.npz", "-o", "m.pt")
    assert done.stderr == "bdh-convert: lm_gate is left out: no equation uses it\n"
    first, second = done.stdout.splitlines()
    assert first == "m.pt: mlx to torch, 944 parameters, float32, read back bit for bit"
    before, after = second.removeprefix("loss on a sentence: ").removesuffix(" after").split(" before, ")
    assert before == after
    assert 0 < float(before) < 20


@pytest.mark.parametrize(
    ("word", "dtype"),
    [
        ("f16", "float16"),
        ("FP16", "float16"),
        ("half", "float16"),
        ("bfloat16", "bfloat16"),
        ("BF16", "bfloat16"),
        ("float32", "float32"),
    ],
)
def test_every_name_of_a_dtype_means_one_thing(
    word: str, dtype: str, canonical: Canonical, small: BDHConfig, call: Run
) -> None:
    done = call("numpy->torch", canonical(small), "--dtype", word)
    assert done.returncode == 0, done.stderr
    assert f"944 parameters, {dtype}," in done.stdout


@pytest.mark.parametrize("name", ["M.PT", "m.Pth", "m.SafeTensors"])
def test_suffixes_are_known_in_any_case(name: str, canonical: Canonical, small: BDHConfig, tmp_path: Path, call: Run) -> None:
    assert call("--to", "torch", canonical(small), "-o", name).returncode == 0
    assert open_checkpoint(tmp_path / name).dialect == "torch"


def test_the_version_is_told(call: Run) -> None:
    assert call("--version").stdout == f"bdh-convert {version('bdh-spec')}\n"


@pytest.mark.parametrize(("begun", "offered"), [("--ins", "plain,--inspect"), ("check", "file,check")])
def test_a_shell_completes_options_and_files(begun: str, offered: str) -> None:
    asked = {"_BDH_CONVERT_COMPLETE": "bash_complete", "COMP_WORDS": f"bdh-convert {begun}", "COMP_CWORD": "1"}
    script = Path(sys.executable).parent / "bdh-convert"
    done = subprocess.run([script], env=os.environ | asked, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines() == [offered]


@pytest.mark.parametrize("words", [("--inspect", "--json", "m"), ("--inspect", "m", "--json"), ("m", "--json", "--inspect")])
def test_an_inspection_takes_its_words_in_any_order(
    words: tuple[str, ...], canonical: Canonical, small: BDHConfig, call: Run
) -> None:
    canonical(small)
    done = call(*("checkpoint.safetensors" if word == "m" else word for word in words))
    assert json.loads(done.stdout)["dialect"] == "numpy"


def test_a_source_of_another_dialect_is_told_whose_it_is(canonical: Canonical, small: BDHConfig, call: Run) -> None:
    done = call("hf->mlx", canonical(small))
    assert done.returncode == 2
    assert "the file holds the names of numpy, not of hf: say numpy or nothing" in done.stderr


def test_a_checkpoint_goes_to_a_pipe_as_the_file_that_it_would_be(
    canonical: Canonical, small: BDHConfig, tmp_path: Path
) -> None:
    canonical(small)
    done = shell(
        "bdh-convert numpy-to-mlx checkpoint.safetensors && bdh-convert '->mlx' checkpoint.safetensors -o - > piped", tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "piped").read_bytes() == (tmp_path / "checkpoint.mlx.safetensors").read_bytes()
    assert done.stderr.startswith("stdout: numpy to mlx, 944 parameters, float32, read back bit for bit\n")
    told = shell("bdh-convert '->mlx' checkpoint.safetensors --json -o - > piped", tmp_path)
    assert json.loads(told.stderr)["path"] == "-"


def test_nothing_unverified_goes_to_a_pipe_and_nothing_stays_behind(
    canonical: Canonical, small: BDHConfig, tmp_path: Path
) -> None:
    canonical(small)
    (tmp_path / "temporary").mkdir()
    lying = (
        "import bdh_spec.safetensors_writer as f; raw = f.raw_bytes; f.raw_bytes = lambda values: raw(values + 1);"
        "from bdh_convert.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", lying, "->jax", "checkpoint.safetensors", "-o", "-"],
        cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(tmp_path / "temporary")},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, b"")
    assert names(tmp_path / "temporary") == set()


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("bdh-convert ->mlx checkpoint.safetensors -o -", "the shell took for the route: quote the route"),
        ("bdh-convert hf checkpoint.safetensors -o -", "hf is a folder, and only a file goes to stdout"),
        ("bdh-convert mlx checkpoint.safetensors -o - --force", "so --force would be ignored"),
        ("bdh-convert mlx checkpoint.safetensors -o - > /dev/full", "stdout could not be written (No space left on device)"),
        ("bdh-convert mlx checkpoint.safetensors -o - --max-shard-size 1GB", "convert to hf, or leave it out"),
    ],
)
def test_what_cannot_go_to_a_pipe_is_refused(
    line: str, complaint: str, canonical: Canonical, small: BDHConfig, tmp_path: Path
) -> None:
    canonical(small)
    done = shell(line, tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert complaint in done.stderr.splitlines()[-1]
    assert names(tmp_path) == {"checkpoint.safetensors"}


def test_a_checkpoint_is_no_text_for_a_terminal(canonical: Canonical, small: BDHConfig, tmp_path: Path) -> None:
    main, side = pty.openpty()
    command = [sys.executable, "-c", "from bdh_convert.cli import main; main()", "mlx", canonical(small), "-o", "-"]
    done = subprocess.run(command, stdout=side, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(side)
    os.close(main)
    assert done.returncode == 2
    assert "a checkpoint is no text for a terminal" in done.stderr


def test_narrowing_shows_both_losses(canonical: Canonical, small: BDHConfig, call: Run) -> None:
    done = call("numpy->torch", canonical(small), "--dtype", "bf16")
    before, after = done.stdout.splitlines()[1].removeprefix("loss on a sentence: ").removesuffix(" after").split(" before, ")
    assert before != after
    assert math.isclose(float(before), float(after), rel_tol=0.05)


def test_no_verify_says_so(canonical: Canonical, small: BDHConfig, call: Run) -> None:
    done = call("numpy->torch", canonical(small), "--no-verify")
    assert done.stdout == "checkpoint.torch.safetensors: numpy to torch, 944 parameters, float32, not verified\n".replace(
        "checkpoint", str(canonical(small).with_suffix(""))
    )


def test_n_layer_and_dropout_are_taken_from_the_command_line_and_never_guessed(
    canonical: Canonical, small: BDHConfig, tmp_path: Path, call: Run
) -> None:
    bare = tmp_path / "bare.npz"
    params, _ = read(canonical(small))
    np.savez(bare, **{tensor.name: tensor.load() for tensor in _tensors(params, small)})
    assert "give --n-layer" in call("--to", "jax", "bare.npz").stderr
    told = call("--to", "jax", "bare.npz", "--n-layer", 4)
    assert "nothing tells dropout: 0.1 is recorded" in told.stderr
    assert read(tmp_path / "bare.jax.safetensors")[1].n_layer == 4
    silent = call("--to", "jax", "bare.npz", "--n-layer", 4, "--dropout", 0.3, "--force")
    assert "dropout" not in silent.stderr
    assert read(tmp_path / "bare.jax.safetensors")[1].dropout == 0.3
    (tmp_path / "config.json").write_text(json.dumps(small.as_dict()))
    assert call("--to", "jax", "bare.npz", "--force").returncode == 0
    assert read(tmp_path / "bare.jax.safetensors")[1] == small


def _tensors(params: Params, config: BDHConfig) -> list[Tensor]:
    lazy = Params(*(Tensor.of(name, value) for name, value in params._asdict().items()))
    return to_dialect(DIALECTS["mlx"], lazy, config, None)


@pytest.mark.parametrize(
    ("source", "spoken", "target", "output"),
    [
        ("checkpoint.safetensors", "numpy", "mlx", "checkpoint.mlx.safetensors"),
        ("runs/checkpoint.torch.safetensors", "torch", "mlx", "runs/checkpoint.mlx.safetensors"),
        ("model.pt", "torch", "hf", "model.hf"),
        ("model.v2.pt", "torch", "jax", "model.v2.jax.safetensors"),
    ],
)
def test_an_output_without_a_name_lies_beside_the_input(source: str, spoken: str, target: str, output: str) -> None:
    assert default_output(Path(source), spoken, DIALECTS[target]) == Path(output)


def test_an_output_of_a_folder_lies_beside_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dragon.hf").mkdir()
    assert default_output(tmp_path / "dragon.hf", "hf", DIALECTS["torch"]) == tmp_path / "dragon.torch.safetensors"
    monkeypatch.chdir(tmp_path / "dragon.hf")
    assert default_output(Path(), "hf", DIALECTS["torch"]) == tmp_path / "dragon.torch.safetensors"


def test_an_output_whose_ending_no_reader_expects_is_refused(canonical: Canonical, small: BDHConfig, call: Run) -> None:
    done = call("numpy->torch", canonical(small), "-o", "model.onnx")
    assert done.returncode == 2
    assert "model.onnx is no name for a torch file: end it in .safetensors or .pt or .pth" in done.stderr


def test_a_file_may_replace_itself_when_forced(canonical: Canonical, small: BDHConfig, tmp_path: Path, call: Run) -> None:
    path = canonical(small)
    before = read(path)
    assert call("numpy->torch", path, "-o", path).returncode == 2
    assert call("numpy->torch", path, "-o", path, "--force").returncode == 0
    assert open_checkpoint(path).dialect == "torch"
    assert read(path)[1] == before[1]


def test_forcing_a_folder_replaces_all_that_is_about_weights_and_leaves_what_else_is_in_it(
    canonical: Canonical, small: BDHConfig, tmp_path: Path, call: Run
) -> None:
    canonical(small)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    about_others = [
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in about_others:
        (tmp_path / "out" / name).write_text("{}")
    assert call("--to", "hf", "checkpoint.safetensors", "-o", "out").returncode == 2
    forced = call("--to", "hf", "checkpoint.safetensors", "-o", "out", "--force")
    assert forced.returncode == 0, forced.stderr
    assert f"removed, being about other weights: {', '.join(about_others)}" in forced.stderr
    assert names(tmp_path / "out") == {"config.json", "model.safetensors", "README.md"}


def test_the_file_says_which_dialect_it_is(canonical: Canonical, small: BDHConfig, tmp_path: Path, call: Run) -> None:
    canonical(small)
    for target in ("jax", "mlx", "torch", "numpy"):
        assert call("--to", target, "checkpoint.safetensors").returncode == 0
        assert open_checkpoint(tmp_path / f"checkpoint.{target}.safetensors").dialect == target


def sparse(path: Path, config: BDHConfig) -> int:
    """A checkpoint of zeros that takes no room on the disk; the bytes of its largest tensor."""
    header, end = {}, 0
    for name, shape in shapes(config)._asdict().items():
        size = math.prod(shape) * 4
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (path.parent / "config.json").write_text(json.dumps(config.as_dict()))
    return max(math.prod(shape) for shape in shapes(config)) * 4


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_stays_near_the_largest_tensor(tmp_path: Path) -> None:
    config = BDHConfig(n_layer=2, n_embd=256, n_head=4, mlp_internal_dim_multiplier=256)
    largest = sparse(tmp_path / "large.safetensors", config)
    assert (tmp_path / "large.safetensors").stat().st_size > 190 * 2**20
    measured = (
        "import re\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
        "from bdh_convert.cli import main\n"
        "import bdh_convert.command\n"
        "before = peak()\n"
        "try: main()\n"
        "finally: print(peak() - before)"
    )
    command = [sys.executable, "-c", measured, "--to", "torch", "large.safetensors", "-o", "m.pt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 2 * largest


def test_a_large_file_shows_a_bar_on_a_terminal(tmp_path: Path) -> None:
    sparse(tmp_path / "large.safetensors", BDHConfig(n_layer=1, n_embd=256, n_head=4, mlp_internal_dim_multiplier=128))
    main, side = pty.openpty()
    command = [sys.executable, "-c", "from bdh_convert.cli import main; main()", "--to", "jax", "large.safetensors"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    child = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=side, text=True, env=environment)
    os.close(side)
    shown = b""
    while part := _read(main):
        shown += part
    answer, _ = child.communicate(timeout=60)
    os.close(main)
    assert child.returncode == 0
    assert answer.startswith("large.jax.safetensors: numpy to jax")
    assert b"large.safetensors" in shown
    assert b"505.9/505.9 MB" in shown  # written, compared with the source, and both run


@pytest.mark.parametrize(
    ("target", "settings"),
    [
        ("mlx", Settings()),
        ("torch", Settings(dtype="bf16")),
        ("hf", Settings(max_shard_size=1)),
        ("jax", Settings(verify=False)),
    ],
)
def test_the_bar_is_full_when_the_work_is_done_and_no_sooner(
    target: str, settings: Settings, config: BDHConfig, canonical: Canonical
) -> None:
    steps: list[tuple[int, int]] = []
    convert(canonical(config), target, None, settings, lambda done, total: steps.append((done, total)))
    assert len({total for _, total in steps}) == 1
    assert sum(done for done, _ in steps) == steps[0][1]


def test_the_bar_of_an_inspection_is_full_when_it_is_done_and_no_sooner(config: BDHConfig, canonical: Canonical) -> None:
    steps: list[tuple[int, int]] = []
    report(canonical(config), watch=lambda done, total: steps.append((done, total)))
    assert sum(done for done, _ in steps) == steps[0][1]


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # how Linux tells that the other side is gone
        return b""


def test_a_route_is_parsed_without_a_file_being_there() -> None:
    assert route.parse(("torch-", "m"), None, None, Path("mlx")) == route.Route("torch", "mlx", Path("m"))
    assert route.parse(("-", "m"), None, None, Path("hf")) == route.Route(None, "hf", Path("m"))
    with pytest.raises(click.UsageError):
        route.parse(("torch-", "m"), None, None, None)
