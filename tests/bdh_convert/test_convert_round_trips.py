"""Any dialect to any other and back, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from bdh_convert.checkpoint import read
from bdh_convert.convert import Settings, convert
from bdh_spec import BDHConfig, CheckpointError, Params, checkpoint, save
from bdh_spec.files import read_safetensors, write_safetensors

FORMS = {
    "numpy": "m.numpy.safetensors",
    "jax": "m.jax.safetensors",
    "torch": "m.torch.safetensors",
    "torch.pt": "m.pt",
    "mlx": "m.mlx.safetensors",
    "mlx.npz": "m.npz",
    "hf": "m.hf",
}


def target(form: str) -> str:
    return form.split(".")[0]


def same(a: Params, b: Params) -> bool:
    return all(x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


def test_every_pair_of_dialects_round_trips_bit_for_bit(
    config: BDHConfig, tmp_path: Path, canonical: Callable[[BDHConfig], Path], weights: Callable[[BDHConfig], Params]
) -> None:
    quick = Settings(force=True, verify=False)
    for form, name in FORMS.items():
        convert(canonical(config), target(form), tmp_path / name, quick)
    for first, second in itertools.permutations(FORMS, 2):
        there, back = tmp_path / "there" / FORMS[second], tmp_path / "back" / FORMS[first]
        there.parent.mkdir(exist_ok=True)
        back.parent.mkdir(exist_ok=True)
        convert(tmp_path / FORMS[first], target(second), there, quick)
        convert(there, target(first), back, quick)
        for path in (there, back):
            found, described = read(path)
            assert described == config, (first, second)
            assert same(found, weights(config)), (first, second)


def test_the_canonical_dialect_is_what_the_specification_itself_reads(
    config: BDHConfig, tmp_path: Path, canonical: Callable[[BDHConfig], Path], weights: Callable[[BDHConfig], Params]
) -> None:
    convert(canonical(config), "torch", tmp_path / "m.pt", Settings())
    convert(tmp_path / "m.pt", "numpy", tmp_path / "again.safetensors", Settings())
    found, described = checkpoint.read(tmp_path / "again.safetensors")
    assert described == config
    assert same(found, weights(config))


@pytest.mark.parametrize("form", FORMS)
def test_a_verified_conversion_reports_one_loss_for_both_sides(
    form: str, config: BDHConfig, tmp_path: Path, canonical: Callable[[BDHConfig], Path]
) -> None:
    outcome = convert(canonical(config), target(form), tmp_path / FORMS[form], Settings())
    assert outcome.losses is not None
    assert outcome.losses[0] == outcome.losses[1] > 0


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_a_conversion_keeps_the_dtype_it_finds(
    form: str, dtype: type, small: BDHConfig, tmp_path: Path, weights: Callable[[BDHConfig], Params]
) -> None:
    given = Params(*(weight.astype(dtype) for weight in weights(small)))
    save(tmp_path / "given.safetensors", given, small)
    convert(tmp_path / "given.safetensors", target(form), tmp_path / FORMS[form], Settings())
    assert same(read(tmp_path / FORMS[form])[0], given)


@pytest.mark.parametrize("form", FORMS)
def test_narrowing_is_done_when_asked_and_widening_gives_the_narrow_values_back(
    form: str, small: BDHConfig, tmp_path: Path, canonical: Callable[[BDHConfig], Path], weights: Callable[[BDHConfig], Params]
) -> None:
    convert(canonical(small), target(form), tmp_path / FORMS[form], Settings(dtype="bf16"))
    narrow = Params(*(weight.astype(ml_dtypes.bfloat16) for weight in weights(small)))
    assert same(read(tmp_path / FORMS[form])[0], narrow)
    convert(tmp_path / FORMS[form], "numpy", tmp_path / "wide.safetensors", Settings(dtype="f32"))
    assert same(read(tmp_path / "wide.safetensors")[0], Params(*(weight.astype(np.float32) for weight in narrow)))


def test_narrowing_refuses_a_value_that_the_dtype_cannot_hold(
    small: BDHConfig, tmp_path: Path, weights: Callable[[BDHConfig], Params]
) -> None:
    given = weights(small)
    given.decoder[3, 2] = 1e5
    save(tmp_path / "given.safetensors", given, small)
    with pytest.raises(CheckpointError, match=r"decoder holds 100000, beyond float16: choose a wider dtype, such as bf16"):
        convert(tmp_path / "given.safetensors", "torch", None, Settings(dtype="f16"))


def test_a_conversion_of_weights_in_several_dtypes_keeps_each(
    small: BDHConfig, tmp_path: Path, weights: Callable[[BDHConfig], Params]
) -> None:
    given = weights(small)._replace(lm_head=weights(small).lm_head.astype(ml_dtypes.bfloat16))
    save(tmp_path / "given.safetensors", given, small)
    convert(tmp_path / "given.safetensors", "hf", tmp_path / "out", Settings())
    assert same(read(tmp_path / "out")[0], given)


def test_a_head_is_read_by_its_dialect_where_its_shape_cannot_tell(
    tmp_path: Path, canonical: Callable[[BDHConfig], Path], weights: Callable[[BDHConfig], Params]
) -> None:
    square = BDHConfig(n_layer=1, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=8)
    given = weights(square)
    assert not np.array_equal(given.lm_head, given.lm_head.T)
    convert(canonical(square), "hf", tmp_path / "hf", Settings())
    assert np.array_equal(read_safetensors(tmp_path / "hf" / "model.safetensors")[0]["lm_head.weight"], given.lm_head.T)
    assert np.array_equal(read(tmp_path / "hf")[0].lm_head, given.lm_head)


def test_a_file_of_ours_is_laid_out_as_the_safetensors_library_lays_it_out(
    small: BDHConfig, tmp_path: Path, canonical: Callable[[BDHConfig], Path], weights: Callable[[BDHConfig], Params]
) -> None:
    convert(canonical(small), "jax", tmp_path / "ours.safetensors", Settings())
    data = (tmp_path / "ours.safetensors").read_bytes()
    assert int.from_bytes(data[:8], "little") % 8 == 0
    tensors, about = read_safetensors(tmp_path / "ours.safetensors")
    assert about["dialect"] == "jax"
    assert same(Params(**tensors), weights(small))
    write_safetensors(tmp_path / "theirs.safetensors", tensors, about)
    assert same(read(tmp_path / "theirs.safetensors")[0], weights(small))
