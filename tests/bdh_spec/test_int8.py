"""R17: weights in int8, as they are rounded, kept, refused and computed with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import bdh_spec
from bdh_spec import BDHConfig, CheckpointError, Params, ParamsError, checkpoint, int8, model
from bdh_spec.files import read_safetensors, write_safetensors
from bdh_spec.int8 import Int8, are_int8, check_int8, dequantised, round_weight, rounded, widened
from bdh_spec.params import fingerprint, init

CONFIG = BDHConfig(n_layer=2, n_embd=8, n_head=3, mlp_internal_dim_multiplier=7, vocab_size=9)
TOKENS = np.array([[0, 8, 3, 3, 1]])


@pytest.fixture
def params() -> Params:
    return Params(*(20 * weight for weight in init(CONFIG, np.random.default_rng(7))))


@pytest.fixture
def file(tmp_path: Path, params: Params) -> Path:
    path = tmp_path / "m.safetensors"
    bdh_spec.save(path, rounded(params), CONFIG)
    return path


def test_r17_a_weight_by_hand() -> None:
    weight = np.array([[63.5, 0, -31.75], [0.25, 0, 0.125], [-1.25, 0, 0.375]])
    found = round_weight("decoder", weight)
    assert found.scale.tolist() == [0.5, 0, 0.25]
    assert found.values.tolist() == [[127, 0, -127], [0, 0, 0], [-2, 0, 2]]  # halves go to the even number


def test_r17_a_scale_is_shared_along_the_axis_that_is_summed(params: Params) -> None:
    shapes = Params(*(weight.scale.shape for weight in rounded(params)))
    assert shapes == Params(embed=(9,), encoder=(3, 18), encoder_v=(3, 18), decoder=(8,), lm_head=(9,))


def test_r17_rounding_moves_no_number_by_more_than_half_a_step(params: Params) -> None:
    for name, weight in params._asdict().items():
        found = round_weight(name, weight)
        step = np.expand_dims(found.scale.astype(np.float64), found.axis)
        assert (np.abs(dequantised(found, np.float64) - weight) <= step * (0.5 + 1e-6)).all()
        assert (np.abs(found.values).max(found.axis) == 127).all()
        again = round_weight(name, np.asarray(found))
        np.testing.assert_array_equal(again.values, found.values)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_r17_rounding_asks_for_nothing_but_the_numbers(params: Params, dtype: str) -> None:
    narrow = params.encoder.astype(dtype)
    here, there = round_weight("encoder", narrow), round_weight("encoder", narrow.astype(np.float64))
    np.testing.assert_array_equal(here.values, there.values)
    np.testing.assert_array_equal(here.scale, there.scale)


def test_r17_what_a_weight_stands_for_is_rounded_once(params: Params) -> None:
    found = round_weight("encoder", params.encoder)
    exact = found.values.astype(np.float64) * found.scale.astype(np.float64)[:, None]
    np.testing.assert_array_equal(dequantised(found, np.float64), exact)
    np.testing.assert_array_equal(np.asarray(found), exact.astype(np.float32))
    assert dequantised(found, "bfloat16").dtype == "bfloat16"


def test_r17_a_column_too_small_for_a_scale_becomes_zeros() -> None:
    tiny = round_weight("lm_head", np.full((4, 2), [1e-46, 1.0]))
    assert tiny.scale[0] == 0
    assert not tiny.values[:, 0].any()
    coarse = round_weight("lm_head", np.full((4, 1), 1.7e-43))  # its scale has one digit
    assert coarse.values.min() >= -127


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_r17_what_is_not_finite_is_refused_with_its_place(params: Params, bad: float) -> None:
    params.encoder_v[1, 2, 3] = bad
    with pytest.raises(ParamsError, match=rf"encoder_v holds {bad} at \[1, 2, 3\], which int8 cannot"):
        rounded(params)


def test_r17_what_no_scale_of_float32_reaches_is_refused() -> None:
    with pytest.raises(ParamsError, match="lm_head holds 1e\\+300, and a scale of float32 ends"):
        round_weight("lm_head", np.full((2, 2), 1e300))


def test_r17_a_file_holds_values_and_scales_and_comes_back_bit_for_bit(params: Params, file: Path) -> None:
    tensors, about = read_safetensors(file)
    assert about["format"] == "bdh-int8"
    assert {name: value.dtype.name for name, value in tensors.items()} == {
        **dict.fromkeys(Params._fields, "int8"),
        **{f"{name}.scale": "float32" for name in Params._fields},
    }
    for found, written in zip(checkpoint.read(file)[0], rounded(params), strict=True):
        np.testing.assert_array_equal(found.values, written.values)
        np.testing.assert_array_equal(found.scale, written.scale)


def test_r17_a_file_is_less_than_a_third_of_one_in_float32(tmp_path: Path) -> None:
    params, config = bdh_spec.read()
    for name, weights in {"whole": params, "int8": rounded(params)}.items():
        bdh_spec.save(tmp_path / name, weights, config)
    assert 3.5 * (tmp_path / "int8").stat().st_size < (tmp_path / "whole").stat().st_size


def test_r17_everybody_reads_the_file_as_what_it_stands_for(params: Params, file: Path) -> None:
    found, config = bdh_spec.read(file)
    meant = widened(rounded(params))
    for ours, theirs in zip(found, meant, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, theirs)
    logits = bdh_spec.load(file, "numpy").forward(TOKENS)
    np.testing.assert_array_equal(logits, model.forward(TOKENS, meant, config))
    assert fingerprint(checkpoint.read(file)[0]) == fingerprint(meant)


def test_r17_own_frequencies_go_along(tmp_path: Path, params: Params) -> None:
    own = replace(CONFIG, freqs=bdh_spec.Frequencies(np.linspace(0.01, 0.1, 18)))
    bdh_spec.save(tmp_path / "m", rounded(params), own)
    assert bdh_spec.read(tmp_path / "m")[1] == own


Tensors = dict[str, np.ndarray]


def first(value: object) -> Callable[[np.ndarray], np.ndarray]:
    """A change of the first number."""

    def change(values: np.ndarray) -> np.ndarray:
        changed = values.copy()
        changed.flat[0] = value
        return changed

    return change


SPOILED: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray | None], str]] = {
    "no scale": ("encoder.scale", lambda _: None, "a canonical file holds embed, .* embed.scale, "),
    "a scale for each row": ("encoder.scale", lambda s: s[:, :8], r"has shape \(3, 8\), encoder asks for \(3, 18\)"),
    "scales transposed": ("encoder_v.scale", lambda s: s.T, r"encoder_v.scale has shape \(18, 3\)"),
    "scales with an axis more": ("decoder.scale", lambda s: s[None], r"decoder.scale has shape \(1, 8\)"),
    "NaN": ("lm_head.scale", first(np.nan), r"lm_head.scale holds nan at \[0\]: a scale is finite and not below zero"),
    "infinity": ("lm_head.scale", first(np.inf), r"lm_head.scale holds inf at \[0\]"),
    "below zero": ("embed.scale", first(-0.5), r"embed.scale holds -0.5 at \[0\]"),
    "scales of float16": ("embed.scale", lambda s: s.astype(np.float16), "embed.scale has dtype float16: scales are float32"),
    "-128": ("decoder", first(-128), r"decoder holds -128 at \[0, 0\]: values in int8 run from -127 to 127"),
    "without sign": ("decoder", lambda q: q.view(np.uint8), "decoder has (dtype|values of) uint8"),
    "one in float32": ("embed", lambda q: q.astype(np.float32), "embed has (dtype|values of) float32"),
    "int8 in an unknown place": ("router", lambda _: np.zeros((2, 2), np.int8), "router"),
    "frequencies in int8": ("freqs", lambda _: np.zeros(18, np.int8), "freq|whole numbers"),
}


def spoil(file: Path, what: str) -> str:
    """A file with one tensor changed, left out or put in; what is said of it."""
    name, change, sentence = SPOILED[what]
    tensors, about = read_safetensors(file)
    changed = change(tensors.get(name, np.zeros(())))
    rest = {key: value for key, value in tensors.items() if key != name}
    write_safetensors(file, rest if changed is None else rest | {name: np.ascontiguousarray(changed)}, about)
    return sentence


@pytest.mark.parametrize("what", SPOILED)
def test_r17_a_spoiled_file_is_refused_in_a_sentence(file: Path, what: str) -> None:
    sentence = spoil(file, what)
    with pytest.raises((CheckpointError, ParamsError, bdh_spec.ConfigError), match=sentence):
        checkpoint.read(file)


@pytest.mark.parametrize("what", [what for what in SPOILED if what != "no scale"])
def test_r17_the_converter_says_the_same(file: Path, what: str) -> None:
    sentence = spoil(file, what)
    with pytest.raises((CheckpointError, ParamsError, bdh_spec.ConfigError), match=sentence):
        bdh_spec.read(file)


def test_r17_some_weights_in_int8_are_refused(params: Params) -> None:
    mixed = params._replace(encoder=round_weight("encoder", params.encoder))
    assert not are_int8(mixed)
    with pytest.raises(ParamsError, match="embed is no weight in int8, and others are: round all five or none"):
        bdh_spec.get_backend("numpy").load(mixed, CONFIG)


def test_r17_a_port_that_does_not_claim_int8_gets_what_it_stands_for(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Params] = []
    backend = bdh_spec.get_backend("numpy")
    verbs = tuple(verb for verb in backend.capabilities.verbs if verb != "int8")
    monkeypatch.setattr(type(backend), "capabilities", replace(backend.capabilities, verbs=verbs))
    load = type(backend)._load
    monkeypatch.setattr(type(backend), "_load", lambda self, p, c, **how: (given.append(p), load(self, p, c, **how))[1])
    for dtype in ("float32", "float64"):
        backend.load(rounded(params), CONFIG, dtype=dtype)
        assert {weight.dtype.name for weight in given[-1]} == {dtype}
        assert not any(isinstance(weight, Int8) for weight in given[-1])


def test_r17_an_older_reader_is_told_by_the_format(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "INT8_FORMAT", "unheard of")
    with pytest.raises(CheckpointError, match="has format 'bdh-int8', wanted 'bdh': convert it"):
        checkpoint.read(file)


def test_r17_a_weight_in_int8_is_no_array_without_a_copy(params: Params) -> None:
    with pytest.raises(ValueError, match="let it be copied"):
        np.asarray(round_weight("embed", params.embed), copy=False)
    assert check_int8(rounded(params)) is not None
    assert int8.MOST == 127
