"""Density and selectivity, against cases whose answers are known, and controls that stay silent where nothing is."""

import numpy as np
import pytest

import bdh_spec
from bdh_look import LookError, corpus, neurons
from bdh_spec import BDHConfig, Model

CONFIG = BDHConfig(n_layer=2, n_embd=12, n_head=2, mlp_internal_dim_multiplier=4)
TEXT = b'The "quick" fox (number 12) jumps.\nif x[1] == {"a": 2}: return [3]\n\n' * 12


@pytest.fixture(scope="module")
def model() -> Model:
    return bdh_spec.get_backend("numpy").load(bdh_spec.init(CONFIG, np.random.default_rng(5)), CONFIG)


@pytest.fixture(scope="module")
def seen(model: Model) -> neurons.Activity:
    return neurons.activity(model, TEXT, 32)


def made(active: np.ndarray, text: bytes) -> neurons.Activity:
    """Units that were active where one says."""
    L, T = len(active), len(text)
    zeros = {kind: np.zeros((L, T)) for kind in neurons.KINDS}
    return neurons.Activity(text, 32, {}, active, zeros, np.zeros(T), np.zeros(T), (L, 1, 1))


def test_density_is_the_share_of_neurons_above_zero_by_layer_head_and_position(model: Model, seen: neurons.Activity) -> None:
    whole = np.frombuffer(TEXT, np.uint8)[: len(TEXT) // 32 * 32].reshape(-1, 32)
    stages = model.trace(whole)
    for kind, found in seen.density.items():
        expected = np.stack([(stages[f"layers.{i}.{kind}"] > 0).mean((0, 3)) for i in range(2)])
        np.testing.assert_allclose(found, expected, rtol=0, atol=np.finfo(float).eps * len(whole))
    assert seen.text == TEXT[: whole.size]


def test_each_unit_is_one_neuron_in_one_layer(model: Model, seen: neurons.Activity) -> None:
    stages = model.trace(np.frombuffer(TEXT[:32], np.uint8)[None])
    unit = 1 * 2 * 24 + 1 * 24 + 7
    assert seen.name(unit) == "layer 1 head 1 neuron 7"
    assert np.array_equal(seen.active[unit, :32], stages["layers.1.xy_sparse"][0, 1, :, 7] > 0)


def test_entropy_and_loss_are_of_the_byte_that_comes_next(model: Model, seen: neurons.Activity) -> None:
    log_p = bdh_spec.model.log_softmax(model.forward(np.frombuffer(TEXT[:32], np.uint8)[None]).astype(float))[0]
    assert np.array_equal(seen.loss[:31], -log_p[np.arange(31), list(TEXT[1:32])])
    assert np.isnan(seen.loss[31])
    assert np.array_equal(seen.entropy[:32], -(np.exp(log_p) * log_p).sum(-1))


def test_a_neuron_that_is_a_label_knows_all_of_it_and_one_that_is_random_knows_no_more_than_chance() -> None:
    rng = np.random.default_rng(2)
    digit = corpus.labels(TEXT)["digit"]
    units = np.stack([digit, ~digit, *(rng.random(len(TEXT)) < 0.3 for _ in range(30))])
    found = neurons.selectivity(made(units, TEXT), rng)
    k = found.names.index("digit")
    assert found.bits[:2, k] == pytest.approx([found.entropy[k]] * 2)
    assert found.selective()[:2, k].all()
    assert found.selective()[2:].mean() < neurons.CHANCE
    where = corpus.labels(TEXT)
    assert neurons.when(made(units, TEXT), 0, where["digit"]) == "active"
    assert neurons.when(made(units, TEXT), 1, where["digit"]) == "silent"


def test_information_is_that_of_the_textbook() -> None:
    active = np.array([[True, True, False, False], [True, False, True, False], [True, True, True, True]])
    marks = np.array([[True, True, False, False]])
    assert neurons.information(active, marks).ravel().tolist() == [1.0, 0.0, 0.0]


def test_the_control_finds_correlations_that_are_there_and_no_others(seen: neurons.Activity) -> None:
    rng = np.random.default_rng(3)
    entropy = np.repeat(rng.random(30), 8)
    amounts = {"x_sparse": np.stack([entropy**2, rng.random(240)])}
    fake = neurons.Activity(b"a" * 240, 32, {}, np.zeros((2, 240), bool), amounts, entropy, entropy, (2, 1, 1))
    true, chance = neurons.predictability(fake, rng)
    assert true["with_entropy"] == pytest.approx(1)
    assert true["chance"] < 1
    assert abs(chance["with_entropy"]) < 2 * chance["chance"]


def test_a_synapse_is_found_by_what_passes_through_it(model: Model) -> None:
    rows = neurons.synapses(model, TEXT[:256], np.random.default_rng(4), window=64, shifts=20)
    (row,) = [r for r in rows if r["label"] == "space"]
    layer, head, neuron, feature = row["synapse"]
    passed, stages = [], None
    for start in range(0, 256, 64):
        stages = model.trace(np.frombuffer(TEXT[start : start + 64], np.uint8)[None])
        q = stages[f"layers.{layer}.rotated"][0, head, :, neuron]
        x = stages["embed" if layer == 0 else f"layers.{layer - 1}.x"][0, :, feature]
        passed.append(np.abs(q * (np.cumsum(q * x) - q * x)))
    r = np.corrcoef(np.concatenate(passed), corpus.labels(TEXT[:256])["space"])[0, 1]
    assert row["r"] == pytest.approx(abs(r), rel=bdh_tolerance())


def bdh_tolerance() -> float:
    """Of a sum of 256 float32 products: as many roundings of it."""
    return 256 * 2.0**-24


def test_what_cannot_be_asked_is_refused(model: Model, seen: neurons.Activity) -> None:
    with pytest.raises(LookError, match="no neurons are called 'z_sparse'"):
        neurons.activity(model, TEXT, 32, "z_sparse")
    with pytest.raises(LookError, match="windows of 1 bytes"):
        neurons.activity(model, TEXT, 1)
    with pytest.raises(LookError, match="19 shifts"):
        neurons.selectivity(seen, np.random.default_rng(0), 19)


def test_labels_are_what_their_rules_say() -> None:
    text = b'Say "no 1"\nx[i] = {1: (2)}\n'
    found = {name: "".join("x" if one else "." for one in where) for name, where in corpus.labels(text).items()}
    assert found["inside quotes"] == ".....xxxx.................."
    assert found["line of code"] == "...........xxxxxxxxxxxxxxxx"
    assert found["digit"] == "........x..........x...x..."
    assert {len(marks) for marks in found.values()} == {len(text)}
