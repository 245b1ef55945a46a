"""Whatever call on a file fails, a run ends with a sentence and goes on as if nothing had happened."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from disk import Disk

from bdh_spec import BDHError
from bdh_train import TrainConfig, train

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
