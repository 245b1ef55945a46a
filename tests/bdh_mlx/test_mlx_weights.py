"""Files that MLX users have: what is read, what is left out, what is refused, and what is written."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from bdh_conformance.yardstick.tolerances import error
from bdh_mlx import BDH, BDHConfig
from bdh_mlx.weights import NAMES
from bdh_spec import CheckpointError, OwnFrequenciesWarning, Params, ParamsError, model, rope
from bdh_spec.params import cast

CONFIG = BDHConfig(n_layer=2, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=8)  # every face a square
TABLE = mx.array(rope.frequencies(CONFIG.n_neurons))
OLD = {"embed.weight": "embed_weight", "attn.freqs": "attn_freqs"}

Arrays = dict[str, mx.array]


@pytest.fixture
def saved() -> Arrays:
    """A model as the older port would name and save it."""
    mx.random.seed(1)
    weights = dict(tree_flatten(BDH(CONFIG).parameters()))
    return weights | {"attn.freqs": TABLE.reshape(1, 1, 1, -1), "lm_gate": mx.zeros((CONFIG.n_embd, 1))}


def holds(module: BDH, saved: Arrays) -> bool:
    return all(mx.array_equal(weight, saved[name]).item() for name, weight in zip(NAMES, module.params(), strict=True))


def test_safetensors_of_the_older_port_are_read_by_path(tmp_path: Path, saved: Arrays) -> None:
    path = tmp_path / "old.safetensors"
    mx.save_safetensors(str(path), saved)
    assert holds(BDH(CONFIG).load_weights(str(path)), saved)
    assert holds(BDH(CONFIG).load_weights(path), saved)
    assert holds(BDH(CONFIG).load_weights(list(mx.load(str(path)).items())), saved)


def test_npz_of_the_older_trainer_is_read_by_path_and_as_its_readme_does(tmp_path: Path, saved: Arrays) -> None:
    path = tmp_path / "bdh_mlx_step_1000.npz"
    mx.savez(str(path), **{OLD.get(name, name): w for name, w in saved.items()}, step=mx.array(1000), loss=mx.array(1.5))
    assert holds(BDH(CONFIG).load_weights(path), saved)
    assert holds(BDH(CONFIG).load_weights(list(mx.load(str(path)).items())), saved)


def test_bfloat16_npz_is_read_as_what_it_is(tmp_path: Path, saved: Arrays) -> None:
    narrow = {name: saved[name].astype(mx.bfloat16) for name in NAMES}
    mx.savez(str(tmp_path / "narrow.npz"), **narrow)
    module = BDH(CONFIG).load_weights(tmp_path / "narrow.npz")
    assert module.encoder.dtype == mx.bfloat16
    assert holds(module, narrow)
    void = dict(np.load(tmp_path / "narrow.npz"))
    with pytest.raises(ParamsError, match=r"is a ndarray: give an mx\.array"):
        BDH(CONFIG).load_weights(list(void.items()))


def test_what_is_saved_is_loaded_and_says_what_model_it_is(tmp_path: Path) -> None:
    module = BDH(CONFIG)
    for name in ("new.safetensors", "new.npz"):
        module.save_weights(tmp_path / name)
        assert holds(BDH(CONFIG).load_weights(tmp_path / name), dict(tree_flatten(module.parameters())))
    arrays, about = mx.load(str(tmp_path / "new.safetensors"), return_metadata=True)
    assert set(arrays) == set(NAMES)
    assert json.loads(about["config"]) == CONFIG.as_dict()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.npz", "new.safetensors"]
    with pytest.raises(CheckpointError, match=r"ends in '\.bin'"):
        module.save_weights(tmp_path / "new.bin")


def test_r4_the_table_is_accepted_in_any_float32_rounding_of_its_formula(saved: Arrays) -> None:
    pair = np.arange(CONFIG.n_neurons, dtype=np.float32) // 2 * 2
    formula = np.float32(1) / np.float32(2.0**16) ** (pair / np.float32(CONFIG.n_neurons)) / np.float32(2 * np.pi)
    assert formula.dtype == np.float32
    BDH(CONFIG).load_weights(list((saved | {"attn.freqs": mx.array(formula)}).items()))


@pytest.mark.parametrize(
    "changed",
    [TABLE * (1 - 1e-5), TABLE * (2 * np.pi), TABLE - 5e-5, (TABLE - 5e-5).astype(mx.bfloat16)],
    ids=["decayed", "without 2 pi", "one AdamW step", "in bfloat16"],
)
def test_r4_a_trained_table_is_what_the_model_computes_by_and_is_saved_with_it(
    saved: Arrays, changed: mx.array, tmp_path: Path
) -> None:
    module = BDH(CONFIG)
    with pytest.warns(OwnFrequenciesWarning, match=r"attn\.freqs is not the table of R4.*it was trained.*--freqs reset"):
        module.load_weights(list((saved | {"attn.freqs": changed.reshape(1, 1, 1, -1)}).items()))
    own = np.array(changed.astype(mx.float32))
    assert np.array_equal(module.config.freqs.array, own)
    assert sorted(dict(tree_flatten(module.parameters()))) == sorted(NAMES)  # the table trains no more
    text = np.array([[1, 2, 3, 4, 5, 6, 7, 0] * 3])
    expected = model.forward(text, cast(Params(*map(np.array, module.params())), np.float64), module.config)
    assert error(np.array(module.eval()(mx.array(text))[0]), expected) < 3e-6
    published = model.forward(text, cast(Params(*map(np.array, module.params())), np.float64), CONFIG)
    assert (error(expected, published) > 1e-6) or np.abs(own - rope.frequencies(own.size)).max() < 1e-4

    for name in ("own.safetensors", "own.npz"):
        module.save_weights(tmp_path / name)
        again = BDH(CONFIG)
        with pytest.warns(OwnFrequenciesWarning):
            again.load_weights(tmp_path / name)
        assert again.config == module.config
        again.load_weights(tmp_path / name)  # which says nothing new
        again.load_weights(list(saved.items()))  # a model of BDH's table
        assert again.config == CONFIG


def test_r4_a_table_that_nothing_can_turn_by_is_refused(saved: Arrays) -> None:
    module = BDH(CONFIG)
    changed = mx.where(mx.arange(TABLE.size) == 3, mx.nan, TABLE)
    with pytest.raises(ParamsError, match=r"attn\.freqs is nan at \[3\]"):
        module.load_weights(list((saved | {"attn.freqs": changed}).items()))
    assert module.config == CONFIG


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": mx.zeros((2, 8, 8))}, "encoder has shape \\(2, 8, 8\\), config asks for \\(2, 8, 16\\)"),
        ({"embed.weight": mx.zeros((8, 8), mx.int32)}, "embed has dtype int64: weights are floating point"),
        ({"attn.freqs": TABLE[:4]}, "attn.freqs has 4 values, config asks for 16"),
        ({"lm_gate": mx.zeros((4, 1))}, "lm_gate has shape \\(4, 1\\)"),
    ],
)
def test_what_does_not_fit_is_refused_strict_or_not(saved: Arrays, change: Arrays, message: str, strict: bool) -> None:
    module = BDH(CONFIG)
    before = dict(tree_flatten(module.parameters()))
    with pytest.raises(ParamsError, match=message):
        module.load_weights(list((saved | change).items()), strict=strict)
    assert holds(module, before)


def test_names_are_demanded_unless_told_otherwise(saved: Arrays) -> None:
    module, few = BDH(CONFIG), [("decoder", saved["decoder"]), ("readout", saved["lm_head"])]
    with pytest.raises(ParamsError, match=r"lack embed\.weight, encoder, encoder_v, lm_head and have the unknown readout"):
        module.load_weights(few)
    module.load_weights(few, strict=False)
    assert mx.array_equal(module.decoder, saved["decoder"])


def test_files_of_no_use_are_explained(tmp_path: Path, saved: Arrays) -> None:
    module = BDH(CONFIG)
    mx.save_safetensors(str(tmp_path / "whole.safetensors"), saved)
    files = {
        "empty.npz": b"",
        "words.npz": b"no zip",
        "cut.safetensors": (tmp_path / "whole.safetensors").read_bytes()[:-100],
        "lfs.safetensors": b"version https://git-lfs.github.com/spec/v1\n",
        "one.npy": b"\x93NUMPY",
        "checkpoint.pt": b"PK",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            module.load_weights(tmp_path / name)
    np.save(tmp_path / "one.npy", np.zeros(3, np.float32))
    for name in ("missing.npz", "one.npy"):
        with pytest.raises(CheckpointError, match=name):
            module.load_weights(str(tmp_path / name))
