"""What is there when something goes wrong: the old file or the new one, whole, and nothing beside it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from disk import Disk

from bdh_convert.checkpoint import open_checkpoint
from bdh_convert.convert import Settings, convert
from bdh_convert.hf_folder import whole_folder
from bdh_spec import BDHConfig, CheckpointError, checkpoint
from bdh_spec.files import part_of, whole_file
from bdh_spec.model import init_state

Canonical = Callable[[BDHConfig], Path]
Run = Callable[..., subprocess.CompletedProcess[str]]

SLOW = (  # stands still while it writes, so that a signal finds it there
    "import sys, time, bdh_spec.safetensors_writer as f\n"
    "raw, seen = f.raw_bytes, []\n"
    "def slowly(values):\n"
    "    seen.append(values)\n"
    "    if len(seen) == 3: print('writing', flush=True); time.sleep(30)\n"
    "    return raw(values)\n"
    "f.raw_bytes = slowly\n"
    "from bdh_convert.cli import main; main()"
)


def started(folder: Path, *words: str) -> subprocess.Popen[str]:
    """A conversion that is in the middle of its writing."""
    command = [sys.executable, "-c", SLOW, *words]
    child = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    return child


def parts(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".part")]


@pytest.mark.parametrize("target", ["jax", "hf"])
def test_a_terminated_run_leaves_nothing(target: str, canonical: Canonical, small: BDHConfig, tmp_path: Path) -> None:
    canonical(small)
    with started(tmp_path, "--to", target, "checkpoint.safetensors") as child:
        assert parts(tmp_path)
        child.terminate()
        _, said = child.communicate(timeout=20)
    assert (child.returncode, said) == (143, "")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]


@pytest.mark.parametrize("target", ["jax", "hf"])
def test_what_a_killed_run_left_is_cleared_by_the_next_and_a_living_ones_is_not(
    target: str, canonical: Canonical, small: BDHConfig, tmp_path: Path, call: Run
) -> None:
    canonical(small)
    with started(tmp_path, "--to", target, "checkpoint.safetensors") as child:
        (left,) = parts(tmp_path)
        part_of(tmp_path / f"checkpoint.{target}{'.safetensors' if target == 'jax' else ''}")
        assert parts(tmp_path) == [left]
        child.kill()
        child.communicate(timeout=20)
    assert parts(tmp_path) == [left]
    done = call("--to", target, "checkpoint.safetensors")
    assert done.returncode == 0, done.stderr
    assert parts(tmp_path) == []


def test_only_leftovers_of_the_same_name_are_cleared(tmp_path: Path) -> None:
    for name in (".m[1].0000.part", ".m1.0000.part", ".m.0000.part"):
        (tmp_path / name).touch()
    part_of(tmp_path / "m[1]")
    assert sorted(parts(tmp_path)) == [".m.0000.part", ".m1.0000.part"]


def write_both(whole: Callable[..., AbstractContextManager[Path]], folder: Path) -> None:
    """Two writers of one new name: the second begins before the first has ended."""
    with whole(folder / "m", replace=False) as second:
        with whole(folder / "m", replace=False) as first:
            (first / "a" if first.is_dir() else first).write_text("first")
        (second / "a" if second.is_dir() else second).write_text("second")


@pytest.mark.parametrize(("whole", "written"), [(whole_file, "m"), (whole_folder, "m/a")])
def test_of_two_that_write_one_new_name_one_fails_and_nothing_is_lost(
    whole: Callable[..., AbstractContextManager[Path]], written: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="made by someone else meanwhile: it is kept"):
        write_both(whole, tmp_path)
    assert (tmp_path / written).read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_where_there_are_no_links_the_name_is_still_given_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with whole_file(tmp_path / "m", replace=False) as part:
        part.write_text("first")
    with pytest.raises(CheckpointError, match="could not be written"), whole_file(tmp_path / "m", replace=False) as part:
        part.write_text("second")
    assert (tmp_path / "m").read_text() == "first"


def test_conversions_at_the_same_time_give_one_whole_file(canonical: Canonical, small: BDHConfig, tmp_path: Path) -> None:
    source, outcomes = canonical(small), []

    def once() -> None:
        try:
            outcomes.append(convert(source, "torch", tmp_path / "m.pt", Settings()).path)
        except CheckpointError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=once) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(tmp_path / "m.pt") == 1
    assert open_checkpoint(tmp_path / "m.pt").config == small
    assert parts(tmp_path) == []


def test_a_link_to_nothing_is_not_replaced_unless_forced(
    canonical: Canonical, small: BDHConfig, tmp_path: Path, call: Run
) -> None:
    canonical(small)
    (tmp_path / "m.pt").symlink_to(tmp_path / "unmounted" / "m.pt")
    done = call("--to", "torch", "checkpoint.safetensors", "-o", "m.pt")
    assert done.returncode == 2
    assert "m.pt is a link to nothing: choose another name with -o, or --force to replace it" in done.stderr
    assert (tmp_path / "m.pt").is_symlink()
    assert call("--to", "torch", "checkpoint.safetensors", "-o", "m.pt", "--force").returncode == 0
    assert open_checkpoint(tmp_path / "m.pt").config == small


def test_an_interruption_at_any_moment_is_no_traceback(tmp_path: Path) -> None:
    command = [Path(sys.executable).parent / "bdh-convert", "--help"]
    for wait in (0.1, 0.2, 0.35):
        with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
            time.sleep(wait)
            child.send_signal(signal.SIGINT)
            _, said = child.communicate(timeout=20)
        assert child.returncode in (0, 130, -2)
        assert "bdh_" not in said  # before our first line runs, Python itself may complain


def test_a_terminal_of_ascii_gets_answers_too(canonical: Canonical, small: BDHConfig, tmp_path: Path) -> None:
    source = canonical(small).rename(tmp_path / "Drâgon.safetensors")
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    script = Path(sys.executable).parent / "bdh-convert"
    for words in (("--inspect", source), ("--to", "jax", source), ("--to", "jax", "nô")):
        done = subprocess.run([script, *words], cwd=tmp_path, capture_output=True, env=environment, timeout=60, check=False)
        assert b"Traceback" not in done.stderr
        assert done.returncode == (2 if words[-1] == "nô" else 0)


def test_a_source_is_never_touched(canonical: Canonical, small: BDHConfig, tmp_path: Path, call: Run) -> None:
    source = canonical(small)
    source.chmod(0o444)
    before = (source.read_bytes(), source.stat().st_mtime_ns)
    for words in (("--to", "hf"), ("--to", "jax"), ("--inspect",), ("--to", "mlx", "-o", "m.npz")):
        assert call(*words, source.name).returncode == 0
    assert (source.read_bytes(), source.stat().st_mtime_ns) == before


def test_a_conversion_answers_in_json_when_asked(canonical: Canonical, small: BDHConfig, call: Run) -> None:
    canonical(small)
    done = call("--json", "--to", "mlx", "checkpoint.safetensors", "--dtype", "fp16")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert list(found) == [
        *("path", "from", "to", "config", "parameters", "dtypes", "bytes", "verified"),
        *("losses", "rounding", "freqs", "notes"),
    ]
    assert (found["path"], found["from"], found["to"]) == ("checkpoint.mlx.safetensors", "numpy", "mlx")
    assert (found["config"], found["dtypes"], found["verified"]) == (small.as_dict(), ["float16"], True)
    assert len(found["losses"]) == 2


TARGETS = {"m.safetensors": "torch", "m.pt": "torch", "m.npz": "mlx", "m": "hf"}


def weights_in(path: Path) -> bytes:
    return b"".join(weight.load().tobytes() for weight in open_checkpoint(path).weights)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EINTR], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", TARGETS)
def test_whichever_call_fails_the_old_weights_or_the_new_are_there(
    name: str, error: int, canonical: Canonical, small: BDHConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = canonical(small), tmp_path / name
    before = source.read_bytes()
    convert(source, TARGETS[name], output, Settings(dtype="f16"))
    new = weights_in(output)
    convert(source, TARGETS[name], output, Settings(force=True))
    old = weights_in(output)
    call, ended, said = 0, False, set()
    while not ended:
        call += 1
        with monkeypatch.context() as patch:
            disk = Disk(patch, call, error)
            try:
                convert(source, TARGETS[name], output, Settings(dtype="f16", force=True))
                ended = disk.calls < call
            except CheckpointError as refused:
                said.add(str(refused))
        assert weights_in(output) in (old, new)
        assert parts(tmp_path) == []
    assert weights_in(output) != old
    assert call > 10
    assert all(sentence.isprintable() for sentence in said)
    assert any(os.strerror(error) in sentence for sentence in said) or error == errno.EINTR  # which Python tries again
    assert source.read_bytes() == before


@pytest.mark.parametrize("name", TARGETS)
def test_a_name_is_given_to_what_a_power_cut_cannot_damage_any_more(
    name: str, canonical: Canonical, small: BDHConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = canonical(small)
    for _ in range(2):  # a new file, then one that replaces it
        with monkeypatch.context() as patch:
            disk = Disk(patch)
            convert(source, TARGETS[name], tmp_path / name, Settings(force=(tmp_path / name).exists()))
        assert disk.published
        assert not any(disk.published)


def test_a_state_that_cannot_be_saved_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, path = BDHConfig(n_layer=1, n_embd=4, n_head=1, mlp_internal_dim_multiplier=2, vocab_size=5), tmp_path / "s"
    save = partial(checkpoint.save_state, path, init_state(1, config), config)
    save("0" * 64, np.zeros((1, 1), np.int64))
    old = path.read_bytes()
    for call in range(1, 4):  # to write, to sync, to give the name
        with monkeypatch.context() as patch:
            Disk(patch, call)
            with pytest.raises(CheckpointError, match="could not be written"):
                save("1" * 64, np.ones((1, 1), np.int64))
        assert path.read_bytes() == old
        assert [file.name for file in tmp_path.iterdir()] == ["s"]
