"""Runs that stop, by whatever hand, and go on to the bit; on the port that they began on, and on another."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bdh_spec
from bdh_spec import BDHConfig, BDHError, Frequencies, Params
from bdh_train import TrainConfig, TrainError, checkpoint, train
from bdh_train.batches import batches
from bdh_train.data import open_data
from bdh_train.run_folder import RunFolder, working_in

sys.path.insert(0, str(Path(__file__).parent))
from killing import EVERY, TRAIN, killed, undisturbed
from watching import Heard, after

PORTS = ("numpy", "torch", "jax", "mlx")
Small = Callable[..., TrainConfig]


def lines(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def damage(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("port", PORTS)
def test_a_run_that_was_stopped_goes_on_to_the_bit(small: Small, port: str, tmp_path: Path) -> None:
    dtype = "bfloat16" if port == "mlx" else "float32"
    longer = {"long_block_size": 40, "long_steps": 3}  # one step before the second stop
    whole, parts = (small(backend=port, dtype=dtype, out=str(tmp_path / name), **longer) for name in ("whole", "parts"))
    train(whole)
    for stop in (3, 1):
        result = train(parts, stop=after(stop), resume=stop == 1)
        assert not result.is_done
    assert result.step == 4
    assert train(parts, resume=True).is_done
    assert lines(parts.out) == lines(whole.out)
    assert [line["step"] for line in lines(whole.out)] == [1, 2, 3, 4, 5, 6]
    models = [bdh_spec.read(Path(c.out) / "model.safetensors")[0] for c in (whole, parts)]
    assert all(np.array_equal(a, b) for a, b in zip(*models, strict=True))


def test_a_run_goes_on_on_another_port_and_says_so(small: Small, tmp_path: Path) -> None:
    whole, moved, heard = small(dropout=0.0, out=str(tmp_path / "whole")), small(dropout=0.0), Heard()
    train(whole)
    train(moved, stop=after(2))
    train(dataclasses.replace(moved, backend="torch"), resume=True, stop=after(2), talk=heard)
    assert (
        "numpy on cpu, float32 made the steps so far, torch on cpu, float32 goes on: bits may differ from here"
        in heard.sentences
    )
    train(dataclasses.replace(moved, backend="mlx"), resume=True)
    assert [line["step"] for line in lines(moved.out)] == [1, 2, 3, 4, 5, 6]
    expected = [line["loss"] for line in lines(whole.out)]
    assert [line["loss"] for line in lines(moved.out)] == pytest.approx(expected, rel=1e-5)


def test_a_run_killed_at_random_goes_on_to_the_bit(text: Path, tmp_path: Path) -> None:
    """Three times here; python tests/bdh_train/killing.py does it fifty times."""
    whole, seconds = undisturbed(tmp_path / "whole", text, "numpy", 30)
    found = killed(tmp_path / "killed", text, "numpy", 30, 3, seconds, seed=1)
    assert found.lines == whole
    assert len(whole) == 30
    assert found.lost <= EVERY


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_leaves(small: Small, number: signal.Signals, status: int) -> None:
    config = small(max_steps=100000, checkpoint_every=100000)
    settings = Path(config.out).with_suffix(".toml")
    settings.write_text(f'data = "{config.data[0]}"\nn_layer = 1\nn_embd = 8\nn_head = 1\nmlp_internal_dim_multiplier = 2\n')
    options = ["--max-steps", "100000", "--checkpoint-every", "100000", "--block-size", "16", "--backend", "numpy"]
    run = subprocess.Popen(
        [TRAIN, "--config", settings, "--out", config.out, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    metrics, deadline = Path(config.out) / "metrics.jsonl", time.monotonic() + 100
    while not (metrics.exists() and metrics.stat().st_size > 200) and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(number)
    out, said = run.communicate(timeout=100)
    assert run.returncode == status, said
    (saved,) = (Path(config.out) / "checkpoints").glob("step-*")
    assert out.decode().strip() == str(saved)
    assert checkpoint.load(saved)[0].progress.step == lines(config.out)[-1]["step"]
    assert f"which is saved: go on with --resume --out {config.out}" in said.decode()


@pytest.mark.parametrize("how", ["altered", "cut short", "emptied"])
def test_a_damaged_checkpoint_is_recognised_and_the_one_before_it_used(small: Small, how: str, tmp_path: Path) -> None:
    whole, config, heard = small(out=str(tmp_path / "whole")), small(), Heard()
    train(whole)
    train(config, stop=after(4))
    last = Path(config.out) / "checkpoints" / "step-00000004.safetensors"
    if how == "altered":
        damage(last)
    else:
        last.write_bytes(last.read_bytes()[: 3000 if how == "cut short" else 0])
    train(config, resume=True, talk=heard)
    assert any(s.startswith("step-00000004.safetensors is damaged and left out: ") for s in heard.sentences)
    assert "2 steps are done already" in heard.sentences
    assert lines(config.out) == lines(whole.out)


def test_where_every_checkpoint_is_damaged_the_run_begins_again(small: Small, tmp_path: Path) -> None:
    whole, config, heard = small(out=str(tmp_path / "whole")), small(), Heard()
    train(whole)
    train(config, stop=after(3))
    for path in (Path(config.out) / "checkpoints").iterdir():
        damage(path)
    train(config, resume=True, talk=heard)
    assert "no checkpoint is whole: the run begins again at its first step" in heard.sentences
    assert lines(config.out) == lines(whole.out)


def test_the_last_checkpoints_and_the_best_are_kept(small: Small, tmp_path: Path) -> None:
    """Measured on what the training text never says, a model is best at its start."""
    (tmp_path / "other.txt").write_bytes(b"~" * 200)
    config = small(keep=2, max_steps=9, eval_every=1, checkpoint_every=1, warmup_steps=0, val=str(tmp_path / "other.txt"))
    train(config)
    folder = RunFolder(Path(config.out))
    assert [path.name for path in folder.saved()] == ["step-00000009.safetensors", "step-00000008.safetensors"]
    best = min(lines(config.out), key=lambda line: line["val_loss"])["step"]
    assert best < 8, "a best that is one of the last shows nothing"
    assert folder.best(best).exists()
    assert np.array_equal(bdh_spec.read(folder.best(best))[0].decoder, bdh_spec.read(folder.model)[0].decoder)


def test_a_line_that_was_cut_short_is_written_again(small: Small, tmp_path: Path) -> None:
    whole, config = small(out=str(tmp_path / "whole")), small()
    train(whole)
    train(config, stop=after(4))
    metrics = Path(config.out) / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + b'{"step": 5, "loss": 2.1}\n{"step": 6, "lo')
    train(config, resume=True)
    assert lines(config.out) == lines(whole.out)


def test_what_a_killed_writer_left_is_cleared(small: Small) -> None:
    config = small()
    train(config, stop=after(2))
    left = Path(config.out) / "checkpoints" / ".step-00000003.safetensors.0a1b2c3d.part"
    left.write_bytes(b"half")
    train(config, resume=True)
    assert not left.exists()


def test_a_finished_run_has_nothing_left_to_do_and_can_be_made_longer(small: Small) -> None:
    config, heard = small(schedule="constant"), Heard()
    train(config)
    before = lines(config.out)
    assert train(config, resume=True).is_done
    assert lines(config.out) == before
    longer = dataclasses.replace(config, max_steps=8)
    assert train(longer, resume=True, talk=heard).step == 8
    assert lines(config.out)[:6] == before
    assert "the schedule from here on is that of 8 steps, and no more that of 6" in heard.sentences


def refusal(config: TrainConfig, **how: Any) -> str:
    with pytest.raises(TrainError) as raised:
        train(config, **how)
    return str(raised.value)


def test_a_setting_that_is_given_holds_although_it_is_the_default(small: Small) -> None:
    run = small(checkpoint_every=3)
    train(run, stop=after(1))
    default = TrainConfig().checkpoint_every
    assert default != run.checkpoint_every
    for given, wanted in ((None, run.checkpoint_every), (("checkpoint_every",), default)):
        train(TrainConfig(out=run.out), resume=True, given=given, stop=after(1))
        assert RunFolder(Path(run.out)).read_config().checkpoint_every == wanted


def test_a_folder_of_another_run_is_refused(small: Small, text: Path) -> None:
    config = small()
    assert (
        refusal(config, resume=True)
        == f"{config.out} holds no run: leave --resume out to begin one, or name its folder with --out"
    )
    train(config, stop=after(2))
    assert refusal(config).startswith(f"{config.out} is not empty: give --resume to go on")
    other = refusal(dataclasses.replace(config, batch_size=4, seed=1), resume=True)
    assert other == (
        f"{config.out} holds a run with batch_size 3, seed 0: leave batch_size, seed out, or begin another with --out"
    )
    text.write_bytes(text.read_bytes()[::-1])
    assert refusal(config, resume=True) == f"the data is not what step 2 had read: bring back {text}"


def test_a_run_killed_before_it_had_begun_begins(small: Small) -> None:
    config, out = small(), Path(small().out)
    (out / "data").mkdir(parents=True)
    (out / ".lock").touch()
    (out / ".config.toml.00ff00ff.part").write_text("half")
    assert train(config, stop=after(1)).step == 1
    assert not (out / "data").exists()
    assert not list(out.glob("*.part"))


def test_two_processes_do_not_train_in_one_folder(small: Small) -> None:
    config = small()
    train(config, stop=after(2))
    with working_in(Path(config.out), resume=True):
        assert refusal(config, resume=True).startswith(f"another process trains in {config.out}")
    assert train(config, resume=True).is_done


def test_a_checkpoint_of_a_run_is_one_that_every_tool_reads(small: Small, tmp_path: Path) -> None:
    config = small()
    train(config)
    saved = Path(config.out) / "checkpoints" / "step-00000006.safetensors"
    converted = tmp_path / "converted.safetensors"
    convert = Path(sys.executable).parent / "bdh-convert"
    for source in (saved, Path(config.out) / "model.safetensors"):
        params, sizes = bdh_spec.read(source)
        assert sizes == bdh_spec.read(Path(config.out) / "model.safetensors")[1]
        subprocess.run([convert, "--to", "torch", source, "-o", converted, "--force"], check=True, capture_output=True)
        assert np.array_equal(bdh_spec.read(converted)[0].decoder, params.decoder)
    shutil.copy(saved, tmp_path / "alone.safetensors")
    assert bdh_spec.load(tmp_path / "alone.safetensors", backend="numpy").generate("1 and ", 3)


def own_frequencies(folder: Path) -> tuple[Path, Params, BDHConfig]:
    """A model that turns by a table of its own, as those that BDH-MLX trained do."""
    sizes = BDHConfig(1, 8, 0.0, 2, 4, 256)
    sizes = dataclasses.replace(sizes, freqs=Frequencies(np.linspace(0.3, -0.01, sizes.n_neurons, dtype=np.float32)))
    params = Params(*(20 * weight for weight in bdh_spec.init(sizes, np.random.default_rng(3))))
    bdh_spec.save(folder / "own.safetensors", params, sizes)
    return folder / "own.safetensors", params, sizes


AS_IT_COMES = dict.fromkeys(("n_layer", "n_embd", "n_head", "mlp_internal_dim_multiplier", "dropout"))


@pytest.mark.parametrize("port", PORTS)
def test_a_model_is_fine_tuned_by_the_frequencies_that_it_brings(small: Small, port: str, tmp_path: Path) -> None:
    path, params, sizes = own_frequencies(tmp_path)
    config = small(backend=port, init_from=path, max_steps=3, **AS_IT_COMES)
    train(config, stop=after(2))
    path.unlink()  # a run that has saved needs it no more
    train(config, resume=True)
    first = batches(config, open_data(config, tmp_path)[0], 1)[0]
    by_its_own = bdh_spec.get_backend("numpy").load(params, sizes).loss(*first)
    assert lines(config.out)[0]["loss"] == pytest.approx(by_its_own, rel=1e-5)
    made = (Path(config.out) / "model.safetensors", *RunFolder(Path(config.out)).saved())
    assert [bdh_spec.read(file)[1].freqs for file in made] == [sizes.freqs] * 3
    assert "| frequencies | its own" in (Path(config.out) / "README.md").read_text()


def test_frequencies_are_reset_where_that_is_asked_for(small: Small, tmp_path: Path) -> None:
    """Of a file in another dialect, which is refused unless told what to do."""
    path, _, sizes = own_frequencies(tmp_path)
    theirs = tmp_path / "theirs.safetensors"
    convert = Path(sys.executable).parent / "bdh-convert"
    subprocess.run([convert, "--to", "mlx", "--freqs", "keep", path, "-o", theirs], check=True, capture_output=True)
    config = small(init_from=theirs, max_steps=1, **(AS_IT_COMES | {"n_layer": 1}))
    with pytest.raises(BDHError, match="--freqs reset takes BDH's table"):
        train(config)
    for freqs, kept in (("reset", None), ("keep", sizes.freqs)):
        asked = dataclasses.replace(config, freqs=freqs, out=str(tmp_path / freqs))
        train(asked)
        assert bdh_spec.read(Path(asked.out) / "model.safetensors")[1].freqs == kept
