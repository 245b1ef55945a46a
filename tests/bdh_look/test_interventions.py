"""What if: silenced neurons are zeroed weights, on every port; forced ones and changed synapses are what was asked for."""

import numpy as np
import pytest

import bdh_spec
from bdh_conformance import Expectation, assert_agrees, expect
from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_conformance.yardstick.tolerances import FLOAT64
from bdh_look import (
    LookError,
    add_to_synapses,
    amplify,
    cut_neurons,
    cut_synapses,
    go_on,
    intervene,
    record,
    silence,
)
from bdh_spec import Model, Params, StateError, model

CASE = Case(CONFIGS["three_heads"], batch=1, time=6, seed=4, scale=20)
TWO = Case(CONFIGS["three_heads"], batch=2, time=6, seed=4, scale=20)
N = CASE.config.n_neurons
PORTS = ("numpy", "torch", "jax", "mlx")
SILENT = [(0, 1), (1, N - 1), (2, 0)]


def load(port: str, dtype: str = "float32") -> Model:
    return bdh_spec.get_backend(port).load(CASE.params, CASE.config, device="cpu", dtype=dtype)


def zeroed(params: Params) -> Params:
    """Weights without some neurons, written out by hand."""
    encoder, decoder = params.encoder.copy(), params.decoder.copy()
    for head, n in SILENT:
        encoder[head, :, n] = 0
        decoder[head * N + n] = 0
    return params._replace(encoder=encoder, decoder=decoder)


@pytest.mark.parametrize("port", PORTS)
def test_silencing_equals_zeroed_weights_on_every_port(port: str) -> None:
    expected = expect(lambda p: model.trace(CASE.tokens, zeroed(p), CASE.config), CASE.params, "float32")
    here = load(port)
    assert_agrees(f"{port}, silenced by weights", silence(here, SILENT).trace(CASE.tokens), expected, str(CASE))
    assert_agrees(f"{port}, silenced by hand", intervene(here, silence=SILENT).trace(CASE.tokens), expected, str(CASE))
    with pytest.raises(AssertionError, match="differs"):  # so that the silence can be heard
        assert_agrees(port, here.trace(CASE.tokens), expected)


@pytest.mark.parametrize("port", ["numpy", "torch", pytest.param("jax", marks=pytest.mark.thorough), "mlx"])  # XLA compiles
def test_a_silenced_model_decodes_as_it_reads(port: str) -> None:
    expected = expect(lambda p: {"logits": model.forward(CASE.tokens, zeroed(p), CASE.config)}, CASE.params, "float32")
    for quiet in (silence(load(port), SILENT), intervene(load(port), silence=SILENT)):
        state, logits = quiet.init_state(), []
        for part in np.split(CASE.tokens, [1, 4], axis=1):
            some, state = quiet.advance(state, part)
            logits.append(some)
        assert_agrees(port, {"logits": np.concatenate(logits, 1)}, expected, str(CASE))


def test_amplifying_scales_the_activity_and_nothing_before_it() -> None:
    here = load("numpy", "float64")
    before, after = here.trace(CASE.tokens), amplify(here, SILENT, 3.0).trace(CASE.tokens)
    for head, n in SILENT:
        rows = {name: stages["layers.0.x_sparse"][:, head, :, n] for name, stages in (("before", before), ("after", after))}
        assert_agrees("amplified", {"x": rows["after"]}, {"x": Expectation(3 * rows["before"], FLOAT64, FLOAT64)})
    assert np.array_equal(before["embed"], after["embed"])


def test_an_intervention_that_does_nothing_changes_nothing() -> None:
    expected = expect(lambda p: model.trace(CASE.tokens, p, CASE.config), CASE.params, "float32")
    assert_agrees("nothing", intervene(load("numpy")).trace(CASE.tokens), expected)


def test_neurons_are_forced_in_the_layers_that_were_asked_for() -> None:
    held = intervene(load("numpy", "float64"), force={(1, 3): 2.5}, silence=[(0, 1)], layers=[1])
    stages, plain = held.trace(CASE.tokens), load("numpy", "float64").trace(CASE.tokens)
    assert (stages["layers.1.x_sparse"][:, 1, :, 3] == 2.5).all()
    assert not stages["layers.1.x_sparse"][:, 0, :, 1].any()
    assert np.array_equal(stages["layers.0.x"], plain["layers.0.x"])
    assert not np.allclose(stages["layers.1.x"], plain["layers.1.x"])


def test_an_intervened_model_can_be_recorded_and_generates_the_same_from_the_same_seed() -> None:
    held = intervene(bdh_spec.load(backend="numpy"), force={(0, 0): 1.0})
    assert (record(held, "dragon").x_sparse.at(head=0, neuron=0).values == 1).all()
    assert held.generate("The ", 5, seed=7) == held.generate("The ", 5, seed=7)
    with pytest.raises(bdh_spec.CapabilityError, match="has no gradients"):
        held.gradients([[1, 2]], [[2, 3]])


@pytest.mark.parametrize("port", PORTS)
def test_synapses_are_added_to_and_cut_and_the_state_given_stays(port: str) -> None:
    here = load(port)
    _, state = here.advance(here.init_state(2), TWO.tokens)
    before = here.export_state(state).layers
    more = here.export_state(add_to_synapses(here, state, {(1, 2, 3, 4): 0.5}, text=1)).layers
    less = here.export_state(cut_synapses(here, state, [(1, 2, 3, 4)], text=1)).layers
    assert more[1][1, 2, 3, 4] == np.float32(before[1][1, 2, 3, 4] + np.float32(0.5))
    assert less[1][1, 2, 3, 4] == 0
    for changed in (more, less):
        assert sum(int((a != b).sum()) for a, b in zip(changed, before, strict=True)) == 1
    assert all(np.array_equal(a, b) for a, b in zip(here.export_state(state).layers, before, strict=True))


def test_a_text_goes_on_from_a_changed_state_and_the_state_stays() -> None:
    here = bdh_spec.load(backend="numpy")
    _, state = here.advance(here.init_state(), np.frombuffer(b"The drago", np.uint8)[None])
    plain = go_on(here, state, b"n", 12, seed=7)
    assert b"The dragon" + plain == here.generate("The dragon", 12, seed=7)
    forgetful = cut_neurons(here, state, [(h, n) for h in range(here.config.n_head) for n in range(here.config.n_neurons)])
    assert all(not layer.any() for layer in here.export_state(forgetful).layers)
    assert go_on(here, state, b"n", 12, seed=7) == plain


def test_adding_what_a_byte_wrote_and_taking_it_away_are_the_same_by_record_and_by_state() -> None:
    here = load("numpy", "float64")
    seen = record(here, CASE.tokens)
    _, state = here.advance(here.init_state(), CASE.tokens)
    q, x = seen.rotated.values[:, :, 2], seen.x.values[:, 2]
    wrote = np.einsum("lhn,ld->lhnd", q, x)
    amounts = {index: -value for index, value in np.ndenumerate(wrote)}
    left = np.stack([layer[0] for layer in here.export_state(add_to_synapses(here, state, amounts)).layers])
    assert_agrees(
        "without", {"state": left[0][None]}, {"state": Expectation((seen.state.values - wrote)[0][None], FLOAT64, FLOAT64)}
    )


@pytest.mark.parametrize(
    ("wish", "sentence"),
    [
        (lambda m: silence(m, [(3, 0)]), "no neuron 0 of head 3"),
        (lambda m: silence(m, [(0, N)]), f"no neuron {N} of head 0"),
        (lambda m: amplify(m, [(0, 0)], -1), "neurons times -1"),
        (lambda m: intervene(m, force={(0, 0): float("nan")}), "forced to nan"),
        (lambda m: intervene(m, layers=[9]), "no layer 9"),
        (lambda m: cut_synapses(m, m.init_state(), [(0, 0, N, 0)]), "no synapse"),
        (lambda m: cut_synapses(m, m.init_state(), [(0, 0, 0, 0)], text=1), "no text 1"),
        (lambda m: add_to_synapses(m, m.init_state(), {(0, 0, 0, 0): float("inf")}), "a finite number"),
    ],
)
def test_what_the_model_does_not_have_is_refused(wish: object, sentence: str) -> None:
    with pytest.raises(LookError, match=sentence):
        wish(load("numpy"))  # type: ignore[operator]  # a wish is a lambda of a table


def test_a_state_of_another_model_is_refused() -> None:
    with pytest.raises(StateError, match="belongs to another model"):
        cut_synapses(load("numpy"), load("numpy").init_state(), [(0, 0, 0, 0)])
