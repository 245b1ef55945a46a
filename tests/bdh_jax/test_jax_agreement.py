"""The JAX port computes what the specification says, in float64 to 1e-10."""

from __future__ import annotations

import re

import numpy as np
import pytest

import bdh_jax.model
import bdh_spec.model
from bdh_conformance.yardstick.tolerances import error
from bdh_jax import forms
from bdh_spec import CapabilityError, RecurrentState, StateError
from bdh_spec.rope import PHASES

POSITIONS = [0, 10**4, 10**6, 2**24 + 1, 2**40, 2**63 - 20]
SPLITS = {"ones": [1] * 8, "ragged": [3, 1, 4], "prefill, then steps": [6, 1, 1]}
FLOAT64 = 1e-10


def test_the_port_names_the_stages_of_the_specification():
    assert bdh_jax.model.Stages._fields == bdh_spec.model.Stages._fields


@pytest.mark.parametrize("phase", PHASES)
def test_r1_to_r11_every_stage_agrees_in_float64(pair, tokens, phase):
    port, spec = pair("float64", phase)
    actual, expected = port.trace(tokens), spec.trace(tokens)
    assert list(actual) == list(expected)
    for name, reference in expected.items():
        assert actual[name].dtype == np.float64
        assert error(actual[name], reference) <= FLOAT64, name


@pytest.mark.parametrize("phase", PHASES)
def test_r11_logits_agree_in_float64(pair, tokens, phase):
    port, spec = pair("float64", phase)
    assert error(port.forward(tokens), spec.forward(tokens)) <= FLOAT64


@pytest.mark.parametrize("length", [5, 7])
def test_a_text_padded_to_a_shared_program_keeps_its_logits_loss_and_gradients(pair, tokens, targets, length):
    port, spec = pair()
    text, wanted = tokens[:, -length:], targets[:, -length:]
    assert error(port.forward(text), spec.forward(text)) <= FLOAT64
    assert port.loss(text, wanted) == pytest.approx(spec.loss(text, wanted), rel=FLOAT64)
    for actual, expected in zip(port.gradients(text, wanted)[1], spec.gradients(text, wanted)[1], strict=True):
        assert error(actual, expected) <= FLOAT64


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrower_models_answer_in_float32(pair, tokens, dtype):
    port, _ = pair(dtype)
    state = port.export_state(port.advance(port.init_state(2), tokens[:, :1])[1])
    answers = [port.forward(tokens), *port.params(), *state.layers]
    assert {answer.dtype for answer in answers} == {np.dtype(np.float32)}


def test_r12_and_r15_loss_and_every_gradient_agree_in_float64(pair, tokens, targets):
    port, spec = pair()
    loss, actual = port.gradients(tokens, targets)
    reference, expected = spec.gradients(tokens, targets)
    assert loss == pytest.approx(reference, rel=FLOAT64)
    assert port.loss(tokens, targets) == pytest.approx(reference, rel=FLOAT64)
    for name in expected._fields:
        assert error(getattr(actual, name), getattr(expected, name)) <= FLOAT64, name


def test_r15_the_slope_of_relu_at_zero_is_zero(params, config, tokens, targets):
    encoder = params.encoder.copy()
    encoder[..., :2] = 0  # a pair of neurons that is exactly at the kink
    port, spec = (
        bdh_spec.get_backend(name).load(params._replace(encoder=encoder), config, dtype="float64") for name in ("jax", "numpy")
    )
    actual, expected = (model.gradients(tokens, targets)[1].encoder for model in (port, spec))
    assert error(actual, expected) <= FLOAT64


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_r13_decode_agrees_at_any_split_and_position(pair, tokens, split, position, phase):
    port, spec = pair("float64", phase)
    actual, port_state = decode(port, tokens, split, position)
    expected, spec_state = decode(spec, tokens, split, position)
    assert error(actual, expected) <= FLOAT64
    assert port_state.position == spec_state.position == position + 8
    for memory, reference in zip(port_state.layers, spec_state.layers, strict=True):
        assert error(memory, reference) <= FLOAT64


def test_r13_a_long_text_is_read_in_chunks_with_the_same_result(pair, tokens, targets, monkeypatch):
    monkeypatch.setattr(forms, "PARALLEL", 4)
    monkeypatch.setattr(forms, "CHUNK", 5)
    port, spec = pair()
    text, wanted = np.tile(tokens, 2)[:1], np.tile(targets, 2)[:1]  # shapes of no other test: nothing is cached
    loss, actual = port.gradients(text, wanted)
    reference, expected = spec.gradients(text, wanted)
    assert loss == pytest.approx(reference, rel=FLOAT64)
    for slope, other in zip(actual, expected, strict=True):
        assert error(slope, other) <= FLOAT64


def test_a_state_exported_from_the_specification_goes_on_here(pair, tokens):
    port, spec = pair()
    _, half = spec.advance(spec.init_state(2), tokens[:, :4])
    logits, _ = port.advance(port.import_state(spec.export_state(half)), tokens[:, 4:])
    assert error(logits, spec.forward(tokens)[:, 4:]) <= FLOAT64


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_kept_state_stays_intact_and_a_donated_one_is_overwritten(pair, tokens, dtype):
    port, _ = pair(dtype)
    _, state = port.advance(port.init_state(2), tokens[:, :4])
    before = port.export_state(state)
    port.advance(state, tokens[:, :1])
    for memory, same in zip(port.export_state(state).layers, before.layers, strict=True):
        np.testing.assert_array_equal(memory, same)
    native = state.native
    port.advance(state, tokens[:, :1], donate=True)
    assert native.layers.is_deleted()
    with pytest.raises(StateError, match="donated"):
        port.advance(state, tokens[:, :1])


def test_a_kept_state_survives_a_text_of_several_chunks(pair, tokens):
    port, _ = pair()
    state = port.init_state(2)
    port.advance(state, tokens[:, :7])
    assert not any(memory.any() for memory in port.export_state(state).layers)


def test_weights_given_and_answers_received_are_independent_copies(params, config, tokens):
    mine = bdh_spec.Params(*(weight.copy() for weight in params))
    port = bdh_spec.get_backend("jax").load(mine, config)
    before = port.forward(tokens)
    for weight in (*mine, *port.params()):
        weight[...] = 0
    np.testing.assert_array_equal(port.forward(tokens), before)
    exported = port.export_state(port.advance(port.init_state(2), tokens)[1])
    imported = port.import_state(exported)
    for memory in exported.layers:
        memory[...] = 0
    assert any(memory.any() for memory in port.export_state(imported).layers)


def test_a_device_that_is_not_here_is_refused(params, config):
    backend = bdh_spec.get_backend("jax")
    assert backend.devices()[-1] == "cpu"
    with pytest.raises(CapabilityError, match=re.escape("no device 'cpu:99'")):
        backend.load(params, config, device="cpu:99")


def decode(model, tokens, split, position):
    """Logits (B, T, V) and the state of a text that continues an empty one of ``position`` tokens."""
    empty = bdh_spec.model.init_state(tokens.shape[0], model.config, np.float64)
    state = model.import_state(RecurrentState(position, empty.layers))
    logits = []
    for chunk in np.split(tokens, np.cumsum(split)[:-1], axis=1):
        part, state = model.advance(state, chunk, donate=True)
        logits.append(part)
    return np.concatenate(logits, axis=1), model.export_state(state)
