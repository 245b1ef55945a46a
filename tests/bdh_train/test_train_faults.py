"""Whatever call on a file fails, a run ends with a sentence and goes on as if nothing had happened."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disk import Disk

import bdh_spec
from bdh_spec import BDHError
from bdh_train import TrainConfig, train

sys.path.insert(0, str(Path(__file__).parent))
from watching import Heard, after, doing

Small = Callable[..., TrainConfig]
FILES = ("metrics.jsonl", "model.safetensors")


def made(config: TrainConfig) -> dict[str, bytes]:
    """What a run that is done has written, to the bit."""
    return {name: (Path(config.out) / name).read_bytes() for name in FILES}


@pytest.mark.thorough  # a run, and its end, for each call
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EACCES], ids=errno.errorcode.get)
def test_whichever_call_fails_a_run_goes_on_to_the_bit(
    error: int, small: Small, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = small(out=str(tmp_path / "whole"), max_steps=4)
    train(whole)
    expected, source = made(whole), text.read_bytes()
    call, ended, said = 0, False, []
    while not ended:
        call += 1
        config = dataclasses.replace(whole, out=str(tmp_path / f"run{call}"))
        with monkeypatch.context() as patch:
            disk = Disk(patch, call, error)
            try:
                train(config)
                ended = disk.calls < call
            except (BDHError, OSError) as refused:
                said.append(str(refused))
        train(config, resume=(Path(config.out) / "config.toml").exists())
        assert made(config) == expected
        assert not list(Path(config.out).rglob("*.part"))
    assert len(said) > 30
    assert all(os.strerror(error) in sentence for sentence in said)
    assert text.read_bytes() == source


def test_a_checkpoint_has_its_name_when_a_power_cut_cannot_damage_it(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        train(small())
    unsynced = [files for name, files in zip(disk.named, disk.published, strict=True) if name.startswith("step-")]
    assert len(unsynced) == 3
    assert not any(unsynced), "the lines of its steps are on the disk before it is"


def refusal(config: TrainConfig, **how: Any) -> str:
    with pytest.raises((BDHError, OSError)) as raised:
        train(config, **how)
    return str(raised.value)


def test_a_folder_that_is_removed_under_a_run_is_one_sentence(small: Small) -> None:
    config = small()
    said = refusal(config, stop=doing(3, lambda: shutil.rmtree(config.out)))
    assert said == f"{config.out} was removed while the run was in it: begin another, with --out elsewhere"
    assert train(config).is_done, "nothing is left that would keep a run from beginning there"


def test_checkpoints_that_are_removed_under_a_run_are_told_and_it_begins_again(small: Small, tmp_path: Path) -> None:
    whole, config = small(out=str(tmp_path / "whole")), small()
    train(whole)
    checkpoints = Path(config.out) / "checkpoints"
    said = refusal(config, stop=doing(3, lambda: shutil.rmtree(checkpoints)))
    assert str(checkpoints) in said
    checkpoints.mkdir()
    train(config, resume=True)
    assert made(config) == made(whole)


def test_a_clock_that_goes_backwards_changes_nothing(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every clock falls by an hour whenever it is asked, and the files of a run are as old as they are new."""
    whole, config = small(out=str(tmp_path / "whole")), small()
    train(whole)
    for clock in ("time", "monotonic", "perf_counter"):
        falling = itertools.count(1e9, -3600)
        monkeypatch.setattr(time, clock, lambda falling=falling: next(falling))
    with pytest.raises(KeyboardInterrupt):
        train(config, stop=doing(5, interrupt))
    for path in (Path(config.out) / "checkpoints").iterdir():
        age = 1e9 - 3600 * int(path.stem.split("-")[1])  # the newest looks oldest
        os.utime(path, (age, age))
    train(config, resume=True)
    assert made(config) == made(whole)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("how", ["altered", "cut short", "removed"])
def test_where_the_best_weights_are_damaged_the_model_is_the_last(small: Small, how: str) -> None:
    config, heard = small(), Heard()
    train(config, stop=after(5))
    (best,) = (Path(config.out) / "checkpoints").glob("best-*")
    content = bytearray(best.read_bytes())
    content[-1] ^= 1
    best.unlink() if how == "removed" else best.write_bytes(content if how == "altered" else content[:999])
    lasting = dataclasses.replace(config, max_steps=5)
    train(lasting, resume=True, talk=heard)
    assert any(said.startswith(f"{best.name} is damaged (") for said in heard.sentences)
    last = max((Path(config.out) / "checkpoints").glob("step-*"))
    assert (
        bdh_spec.read(Path(config.out) / "model.safetensors")[0].decoder.tobytes() == bdh_spec.read(last)[0].decoder.tobytes()
    )
