"""R4 with frequencies of a model's own: what they may be, how they turn, and how files carry them."""

import dataclasses
import pickle
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bdh_spec
from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_spec import BDHConfig, CapabilityError, CheckpointError, ConfigError, Frequencies, checkpoint, fingerprint, model
from bdh_spec.files import read_safetensors, write_safetensors
from bdh_spec.numpy_backend import NumpyBackend
from bdh_spec.params import cast
from bdh_spec.protocol import Capabilities
from bdh_spec.rope import fixed_point, frequencies, rope, rotation, turns

CONFIG = CONFIGS["plain"]
N = CONFIG.n_neurons
OWN = Case(CONFIG, 2, 6, seed=3, scale=20, freqs="trained")
PAIRED = dataclasses.replace(OWN, freqs="paired")
FLOATS = (
    st.floats(-(2.0**30), 2.0**30, width=32)
    | st.floats(-(2.0**-50), 2.0**-50, width=32)
    | st.sampled_from([0.5, -0.5, 1.5, 0.0])
)


@pytest.mark.parametrize("shape", [(N,), (1, N), (1, 1, 1, N)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_table_comes_in_any_shape_that_files_store_and_is_told_by_its_bits(shape: tuple[int, ...], dtype: type) -> None:
    values = OWN.config.freqs.array.astype(dtype)
    own = Frequencies(values.reshape(shape))
    assert own == OWN.config.freqs
    assert hash(own) == hash(OWN.config.freqs)
    assert pickle.loads(pickle.dumps(own)) == own
    assert own != Frequencies(np.nextafter(values.astype(np.float32), np.float32(9)))
    values[:] = 0  # of its caller's array nothing is kept
    assert own == OWN.config.freqs
    with pytest.raises(ValueError, match="read-only"):
        own.array[0] = 1


def test_a_narrow_table_is_widened_and_a_wide_one_rounded() -> None:
    narrow = OWN.config.freqs.array.astype(ml_dtypes.bfloat16)
    assert np.array_equal(Frequencies(narrow).array, narrow.astype(np.float32))
    assert Frequencies([0.1, 0.2]).array.tolist() == [np.float32(0.1), np.float32(0.2)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.1, np.nan], "frequency 1 is nan"),
        ([np.inf, 0.1], "frequency 0 is inf"),
        ([0.1, 1e300], r"frequency 1 is 1e\+300"),
        ([[0.1], [0.2]], r"shape \(2, 1\)"),
        (0.1, r"shape \(\)"),
        ([[0.1], [0.2, 0.3]], "rows of different lengths"),
        ([1, 2], "frequencies are int64"),
        (["a", "b"], "floating point numbers"),
    ],
)
def test_a_table_of_anything_but_finite_numbers_is_refused(values: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Frequencies(values)


def test_a_table_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="12 frequencies for 16 neurons: check n_embd"):
        dataclasses.replace(CONFIG, freqs=Frequencies(np.ones(12)))


def test_the_published_table_is_no_table_of_its_own() -> None:
    assert dataclasses.replace(CONFIG, freqs=Frequencies(frequencies(N) * np.float32(1 + 2.0**-22))) == CONFIG
    own = OWN.config
    assert (own == CONFIG, hash(own) == hash(CONFIG)) == (False, False)
    assert own == dataclasses.replace(CONFIG, freqs=Frequencies(own.freqs.array))


def test_a_configuration_in_json_knows_nothing_of_a_table() -> None:
    assert OWN.config.as_dict() == CONFIG.as_dict()
    assert "freqs" not in repr(OWN.config)
    with pytest.raises(ConfigError, match="unknown configuration keys freqs"):
        BDHConfig.from_dict(CONFIG.as_dict() | {"freqs": None})


@given(FLOATS, st.integers(0, 2**63 - 1) | st.sampled_from([1, 2**24 + 1, 2**40, 2**63 - 1]))
def test_r4_exact_phases_of_any_frequency_are_exact_in_units_of_2_to_the_minus_64(f: float, t: int) -> None:
    units = round(Fraction(f) * 2**64)  # ties to even
    table = np.array([f], np.float32)
    assert int(fixed_point(table)[0]) == units % 2**64
    exact = units * t % 2**64 / 2**64
    away = abs(float(turns(np.array([t], np.uint64), table, "exact")[0, 0]) - exact)
    assert min(away, 1 - away) <= 2.0**-53


@given(FLOATS, st.integers(0, 2**24))
def test_r4_float32_phases_of_any_frequency_round_the_product_once(f: float, t: int) -> None:
    exact = float(Fraction(float(np.float32(t) * np.float32(f))) % 1)
    away = abs(float(turns(np.array([t], np.uint64), np.array([f], np.float32), "float32")[0, 0]) - exact)
    assert min(away, 1 - away) <= 2.0**-53


def test_r4_a_pair_that_turns_apart_is_the_plain_equation_and_no_rotation() -> None:
    v, table = np.array([[[[3.0, 5.0]]]]), np.array([0.1, -0.3], np.float32)
    cos, sin = rotation(2, 1, table, np.float64, "exact")
    first, second = 2 * np.pi * 2 * table.astype(np.float64)
    expected = [3 * np.cos(first) - 5 * np.sin(first), 5 * np.cos(second) + 3 * np.sin(second)]
    np.testing.assert_allclose(rope(v, cos, sin).ravel(), expected, rtol=1e-14)
    assert abs(np.hypot(*expected) - np.hypot(3, 5)) > 0.1


def shifted(case: Case, position: int) -> np.ndarray:
    """The logits of a text that begins at a position."""
    empty = model.init_state(case.batch, case.config, np.float64)
    return model.advance(dataclasses.replace(empty, position=position), case.tokens, case.params, case.config)[0]


def test_an_offset_of_positions_changes_nothing_where_pairs_turn_alike_and_something_where_not() -> None:
    assert PAIRED.config.freqs.in_pairs
    assert not OWN.config.freqs.in_pairs
    assert np.abs(shifted(PAIRED, 0) - shifted(PAIRED, 3)).max() < 1e-12
    assert np.abs(shifted(OWN, 0) - shifted(OWN, 3)).max() > 1e-3


@pytest.mark.parametrize("case", [OWN, PAIRED], ids=["each by itself", "in pairs"])
def test_r13_the_recurrent_form_is_the_same_function(case: Case) -> None:
    whole, state, parts = model.forward(case.tokens, case.params, case.config), None, []
    state = model.init_state(case.batch, case.config, np.float64)
    for part in np.split(case.tokens, [1, 2, 5], axis=1):
        logits, state = model.advance(state, part, case.params, case.config)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=1e-12)
    assert np.abs(whole - model.forward(case.tokens, case.params, CONFIG)).max() > 1e-3


def test_a_canonical_file_carries_the_table(tmp_path: Path) -> None:
    path, params = tmp_path / "m.safetensors", cast(OWN.params, np.float32)
    bdh_spec.save(path, params, OWN.config)
    tensors, about = read_safetensors(path)
    assert (tensors["freqs"].shape, tensors["freqs"].dtype) == ((N,), np.float32)
    assert "freqs" not in about["config"]
    for read in (checkpoint.read, bdh_spec.read):  # the latter by way of the converter
        assert read(path)[1] == OWN.config
    assert bdh_spec.read(path, freqs="keep")[1] == OWN.config
    assert bdh_spec.read(path, freqs="reset")[1] == CONFIG
    expected = bdh_spec.load(path, "numpy").forward(OWN.tokens)
    assert np.array_equal(expected, NumpyBackend().load(params, OWN.config).forward(OWN.tokens))
    bdh_spec.save(path, params, CONFIG)
    assert set(read_safetensors(path)[0]) == set(bdh_spec.Params._fields)


@pytest.mark.parametrize(
    ("table", "message"),
    [(np.ones(5, np.float32), "5 frequencies for 16 neurons"), (np.full(N, np.nan, np.float32), "frequency 0 is nan")],
)
def test_a_canonical_file_with_a_table_that_fits_nobody_is_refused(table: np.ndarray, message: str, tmp_path: Path) -> None:
    params = cast(OWN.params, np.float32)
    write_safetensors(tmp_path / "m", params._asdict() | {"freqs": table}, checkpoint.metadata(CONFIG))
    with pytest.raises(ConfigError, match=message):
        checkpoint.read(tmp_path / "m")
    with pytest.raises(bdh_spec.BDHError, match=r"freqs|frequenc"):
        bdh_spec.read(tmp_path / "m")


def test_a_wish_that_is_none_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"freqs is 'drop': say 'keep'"):
        bdh_spec.read(freqs="drop")


def test_the_fingerprint_of_a_model_covers_its_table_and_a_state_of_another_does_not_load(tmp_path: Path) -> None:
    params = cast(OWN.params, np.float32)
    ours, plain, paired = (fingerprint(params, config.freqs) for config in (OWN.config, CONFIG, PAIRED.config))
    assert plain == fingerprint(params)
    assert len({ours, plain, paired}) == 3
    state = model.advance(model.init_state(2, OWN.config), OWN.tokens, params, OWN.config)[1]
    checkpoint.save_state(tmp_path / "s", state, OWN.config, ours, OWN.tokens[:, -1:])
    assert checkpoint.read_state(tmp_path / "s", OWN.config, ours)[0].position == OWN.time
    with pytest.raises(CheckpointError, match="is a state of model"):
        checkpoint.read_state(tmp_path / "s", CONFIG, plain)


def test_a_port_that_does_not_claim_frequencies_refuses_a_model_that_brings_its_own() -> None:
    class Plain(NumpyBackend):
        name = "plain"
        capabilities = Capabilities(dtypes=("float32",))

    Plain().load(OWN.params, CONFIG)
    with pytest.raises(
        CapabilityError, match=r"^the plain port runs BDH's frequency table only, and this model brings its own"
    ):
        Plain().load(OWN.params, OWN.config)
