"""bdh-convert and weights in int8 (R17): there, back, what it tells of them, and what it refuses."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import bdh_spec
from bdh_convert import scaled, verify
from bdh_convert.checkpoint import open_checkpoint
from bdh_convert.scaled import Scaled
from bdh_convert.verify import DisagreementError
from bdh_spec import BDHConfig, Params, checkpoint
from bdh_spec.files import read_safetensors, write_safetensors
from bdh_spec.int8 import rounded, widened

Weights = Callable[[BDHConfig], Params]
Canonical = Callable[[BDHConfig], Path]
Run = Callable[..., subprocess.CompletedProcess[str]]


def test_r17_what_is_written_is_the_rounding_of_the_specification(
    config: BDHConfig, weights: Weights, canonical: Canonical, call: Run
) -> None:
    path = canonical(config)
    assert call("--quantize", "int8", path.name).returncode == 0
    found, theirs = checkpoint.read(path.with_name("checkpoint.int8.safetensors"))
    assert theirs == config
    for ours, wanted in zip(found, rounded(weights(config)), strict=True):
        np.testing.assert_array_equal(ours.values, wanted.values)
        np.testing.assert_array_equal(ours.scale, wanted.scale)


def test_r17_the_specification_reads_and_writes_the_same_tensors(
    small: BDHConfig, weights: Weights, canonical: Canonical, call: Run, tmp_path: Path
) -> None:
    canonical(small)
    call("--quantize", "int8", "checkpoint.safetensors")
    bdh_spec.save(tmp_path / "ours.safetensors", rounded(weights(small)), small)
    theirs, ours = (read_safetensors(tmp_path / name) for name in ("checkpoint.int8.safetensors", "ours.safetensors"))
    assert theirs[1] == ours[1] | {"dialect": "int8"}
    for name, values in ours[0].items():
        np.testing.assert_array_equal(values, theirs[0][name])


@pytest.mark.parametrize("target", ["torch", "mlx", "jax", "numpy", "hf"])
def test_r17_every_dialect_gets_what_the_weights_stand_for(
    config: BDHConfig, weights: Weights, canonical: Canonical, call: Run, tmp_path: Path, target: str
) -> None:
    canonical(config)
    call("--quantize", "int8", "checkpoint.safetensors", "-o", "q.safetensors")
    done = call("--to", target, "q.safetensors", "-o", "back" if target == "hf" else "back.safetensors")
    assert done.returncode == 0
    assert "its weights were rounded to int8: what is written are the rounded ones" in done.stderr
    assert "int8 to" in done.stdout
    found, _ = bdh_spec.read(tmp_path / ("back" if target == "hf" else "back.safetensors"))
    for ours, wanted in zip(found, widened(rounded(weights(config))), strict=True):
        np.testing.assert_array_equal(ours, wanted)


def test_r17_rounding_again_gives_the_same_values(small: BDHConfig, canonical: Canonical, call: Run, tmp_path: Path) -> None:
    canonical(small)
    call("--quantize", "int8", "checkpoint.safetensors", "-o", "q.safetensors")
    call("--to", "torch", "q.safetensors", "-o", "t.safetensors")
    call("torch->int8", "t.safetensors", "-o", "again.safetensors")
    once, twice = (checkpoint.read(tmp_path / name)[0] for name in ("q.safetensors", "again.safetensors"))
    for one, two in zip(once, twice, strict=True):
        np.testing.assert_array_equal(one.values, two.values)


def test_r17_it_tells_what_rounding_took_off(small: BDHConfig, weights: Weights, canonical: Canonical, call: Run) -> None:
    path = canonical(small)
    told = json.loads(call("--quantize", "int8", path.name, "--json").stdout)
    assert told["dtypes"] == ["int8"]
    assert told["bytes"] == [sum(w.nbytes for w in weights(small)), sum(w.nbytes for w in rounded(weights(small)))]
    for name, weight in weights(small)._asdict().items():
        axis = getattr(scaled.AXES, name)
        off = np.linalg.norm(np.asarray(getattr(rounded(weights(small)), name)) - weight, axis=axis)
        assert told["rounding"][name] == pytest.approx((off / np.linalg.norm(weight, axis=axis)).max(), rel=1e-4)
        assert 0 < told["rounding"][name] < 0.02
    before, after = told["losses"]
    assert before != after
    assert after == pytest.approx(before, rel=0.05)


def test_r17_people_are_told_the_same(small: BDHConfig, canonical: Canonical, call: Run) -> None:
    done = call("--quantize", "int8", canonical(small).name)
    first, losses, sizes, off = done.stdout.splitlines()
    assert first.endswith("parameters, int8, read back bit for bit")
    assert losses.startswith("loss on a sentence: ")
    assert sizes.startswith("weights: ")
    assert off.startswith("rounded off, in the worst column of each: embed ")
    assert call("--quantize", "int8", "checkpoint.safetensors", "--force", "--no-verify").stdout.endswith("not verified\n")


def test_r17_a_bit_that_is_wrong_is_seen(small: BDHConfig, canonical: Canonical, call: Run, tmp_path: Path) -> None:
    canonical(small)
    for part in ("values", "scale"):
        call("--quantize", "int8", "checkpoint.safetensors", "-o", f"{part}.safetensors")
        written = open_checkpoint(tmp_path / f"{part}.safetensors")
        tensors, about = read_safetensors(tmp_path / f"{part}.safetensors")
        name = "encoder" if part == "values" else "encoder.scale"
        tensors[name].view(np.uint8).flat[0] ^= 1
        write_safetensors(tmp_path / "changed.safetensors", tensors, about)
        changed = open_checkpoint(tmp_path / "changed.safetensors")
        with pytest.raises(DisagreementError, match="encoder read back differs"):
            verify.compare(changed, written)


def test_r17_inspect_names_the_dialect_and_lists_what_the_file_holds(small: BDHConfig, canonical: Canonical, call: Run) -> None:
    canonical(small)
    call("--quantize", "int8", "checkpoint.safetensors", "-o", "q.safetensors")
    found = json.loads(call("--inspect", "--json", "q.safetensors").stdout)
    assert found["dialect"] == "int8"
    assert found["suspicious"] == []
    assert {t["name"]: t["dtype"] for t in found["tensors"]} == {
        **dict.fromkeys(Params._fields, "int8"),
        **{f"{name}.scale": "float32" for name in Params._fields},
    }
    assert found["loss"] == json.loads(call("--to", "torch", "q.safetensors", "--json").stdout)["losses"][0]


REFUSED = {
    "again": (("--quantize", "int8", "q.safetensors", "-o", "x.safetensors"), "q.safetensors is in int8 already"),
    "dtype": (("--quantize", "int8", "--dtype", "bf16", "m.safetensors"), "--dtype is about floating point numbers"),
    "nonfinite": (("--quantize", "int8", "--allow-nonfinite", "m.safetensors"), "int8 has neither NaN nor infinity"),
    "another target": (("--quantize", "int8", "--to", "mlx", "m.safetensors"), "and mlx is asked for as well"),
    "another route": (("--quantize", "int8", "torch-to-mlx", "m.safetensors"), "and mlx is asked for as well"),
    "int4": (("--quantize", "int4", "m.safetensors"), "'int4' is not 'int8'"),
    "said of floats": (("--from", "int8", "--to", "torch", "m.safetensors"), "the file holds no weights in int8"),
    "said of int8": (("--from", "jax", "--to", "torch", "q.safetensors"), "weights in int8, and jax files hold none"),
    "inspection": (("--inspect", "--quantize", "int8", "m.safetensors"), "--quantize would be ignored"),
    "a pickle": (("--quantize", "int8", "m.safetensors", "-o", "x.pt"), "x.pt is no name for a int8 file"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_r17_what_cannot_be_is_a_sentence(small: BDHConfig, canonical: Canonical, call: Run, tmp_path: Path, what: str) -> None:
    canonical(small).rename(tmp_path / "m.safetensors")
    call("--quantize", "int8", "m.safetensors", "-o", "q.safetensors")
    before = sorted(tmp_path.iterdir())
    words, sentence = REFUSED[what]
    done = call(*words)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_r17_weights_that_are_not_finite_leave_nothing_behind(
    small: BDHConfig, weights: Weights, call: Run, tmp_path: Path, bad: float
) -> None:
    params = weights(small)
    params.decoder[3, 2] = bad
    bdh_spec.save(tmp_path / "m.safetensors", params, small)
    done = call("--quantize", "int8", "m.safetensors")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"decoder holds {bad} at [3, 2], which int8 cannot" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


SPOILED = {
    "without a scale": ({"encoder.scale": None}, "encoder is int8, and no tensor is named encoder.scale"),
    "-128": ({"decoder": -128}, "decoder holds -128"),
    "a scale below zero": ({"lm_head.scale": -1.0}, "lm_head.scale holds -1 at"),
    "a scale of NaN": ({"lm_head.scale": np.nan}, "lm_head.scale holds nan at"),
    "int8 in an unknown place": ({"router": 0}, "router, which no dialect of BDH has"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_r17_inspect_tells_what_is_wrong(small: BDHConfig, weights: Weights, call: Run, tmp_path: Path, what: str) -> None:
    changes, sentence = SPOILED[what]
    bdh_spec.save(tmp_path / "m.safetensors", rounded(weights(small)), small)
    tensors, about = read_safetensors(tmp_path / "m.safetensors")
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors.setdefault(name, np.zeros((2, 2), np.int8)).flat[0] = value
    write_safetensors(tmp_path / "m.safetensors", tensors, about)
    done = call("--inspect", "m.safetensors")
    assert done.returncode == 0
    assert f"suspicious: {sentence}" in done.stdout or sentence in done.stdout
    assert call("--to", "torch", "m.safetensors").returncode == 2


def test_r17_int8_under_other_names_is_no_dialect(small: BDHConfig, weights: Weights, call: Run, tmp_path: Path) -> None:
    params = rounded(weights(small))._asdict()
    named = {"embed.weight" if name == "embed" else name: weight.values for name, weight in params.items()}
    write_safetensors(tmp_path / "m.safetensors", named, {})
    (tmp_path / "config.json").write_text(json.dumps(small.as_dict()))
    done = call("--to", "mlx", "m.safetensors")
    assert done.returncode == 2
    assert "embed has dtype int8: weights are float64, float32, float16 or bfloat16" in done.stderr


def test_r17_a_weight_on_its_side_is_one_of_floating_point_numbers(small: BDHConfig, canonical: Canonical, call: Run) -> None:
    path = canonical(small)
    call("--quantize", "int8", path.name, "-o", "q.safetensors")
    head = open_checkpoint(path.with_name("q.safetensors")).weights.lm_head
    turned = head.transposed()
    assert not isinstance(turned, Scaled)  # whose scales would lie along the other axis
    np.testing.assert_array_equal(turned.load(), head.load().T)
