"""A record is what the model did, byte by byte, in arrays whose axes have names."""

import doctest

import numpy as np
import pytest

import bdh_look
import bdh_spec
from bdh_conformance import Expectation, assert_agrees, expect
from bdh_conformance.yardstick.agreement import by_pair
from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_conformance.yardstick.tolerances import FLOAT64
from bdh_look import LookError, Named, record
from bdh_spec import Model, model

CASE = Case(CONFIGS["three_heads"], batch=1, time=6, seed=4, scale=20)
PORTS = ("numpy", "torch", "jax", "mlx")


def load(port: str, dtype: str = "float32") -> Model:
    return bdh_spec.get_backend(port).load(CASE.params, CASE.config, device="cpu", dtype=dtype)


def layers_of(stages: dict[str, np.ndarray], name: str) -> np.ndarray:
    return np.stack([stages[f"layers.{i}.{name}"][0] for i in range(CASE.config.n_layer)])


def specified(params: bdh_spec.Params) -> dict[str, np.ndarray]:
    """What a record holds, by the specification."""
    stages = model.trace(CASE.tokens, params, CASE.config)
    log_p = model.log_softmax(stages["logits"][0])
    empty = model.init_state(1, CASE.config, params.embed.dtype)
    found = {name: layers_of(stages, name) for name in ("x_sparse", "rotated", "scores", "y_sparse", "xy_sparse")}
    lengths = np.arange(1, CASE.time + 1)
    states = [model.advance(empty, CASE.tokens[:, :n], params, CASE.config)[1] for n in lengths]
    norms = [[np.sqrt(np.sum(layer[0] ** 2, (1, 2))) for layer in state.layers] for state in states]
    return found | {
        "loss": -log_p[np.arange(CASE.time - 1), CASE.tokens[0, 1:]],
        "next_byte": np.exp(log_p)[None],
        "state": by_pair(np.stack([layer[0] for layer in states[-1].layers])),
        "state_norm": np.moveaxis(np.stack(norms), 0, -1),
    }


@pytest.mark.parametrize("port", PORTS)
def test_a_record_is_what_the_specification_says_on_every_port(port: str) -> None:
    seen = record(load(port), CASE.tokens)
    found = {name: array.values for name, array in seen.arrays().items()}
    found["loss"], found["next_byte"] = found["loss"][1:], found["next_byte"][None]
    found["state"] = by_pair(found["state"])
    assert_agrees(port, found, expect(specified, CASE.params, "float32"), str(CASE))


def test_the_mean_loss_of_a_record_is_the_models_loss() -> None:
    reader = load("numpy", "float64")
    seen = record(reader, CASE.tokens)
    assert np.isnan(seen.loss.values[0])
    assert np.nanmean(seen.loss.values) == pytest.approx(reader.loss(CASE.tokens[:, :-1], CASE.tokens[:, 1:]), rel=FLOAT64)


def test_the_state_after_any_byte_is_that_of_reading_so_far() -> None:
    reader = load("numpy", "float64")
    seen = record(reader, CASE.tokens)
    for time in (0, 3, CASE.time - 1):
        _, state = reader.advance(reader.init_state(), CASE.tokens[:, : time + 1])
        expected = np.stack([layer[0] for layer in reader.export_state(state).layers])
        assert_agrees("state", {"state": seen.state_after(time).values}, {"state": Expectation(expected, FLOAT64, FLOAT64)})


def test_axes_have_names_and_can_be_left_out_by_them() -> None:
    seen = record(load("numpy"), CASE.tokens)
    assert seen.scores.axes == ("layer", "head", "time", "earlier")
    row = seen.scores.at(layer=1, head=0, time=4)
    assert row.axes == ("earlier",)
    assert np.array_equal(row.values, seen.scores.values[1, 0, 4])
    with pytest.raises(LookError, match="no axis token: it has layer, head, time, earlier"):
        seen.scores.at(token=1)
    with pytest.raises(LookError, match="2 names for its axes"):
        Named("loss", ("time", "byte"), np.zeros(3))


def test_a_record_goes_to_xarray() -> None:
    seen = record(load("numpy"), CASE.tokens)
    whole = seen.to_xarray()
    assert dict(whole.sizes) | {"time": CASE.time, "earlier": CASE.time} == dict(whole.sizes)
    assert whole["loss"].attrs["units"] == "nats"
    assert np.array_equal(whole["xy_sparse"].sel(layer=0, head=1).values, seen.xy_sparse.values[0, 1])


def test_text_bytes_and_rows_of_tokens_are_the_same_text() -> None:
    reader = bdh_spec.load(backend="numpy")
    kinds = ("dragon", b"dragon", np.frombuffer(b"dragon", np.uint8), np.frombuffer(b"dragon", np.uint8)[None])
    losses = [record(reader, kind).loss.values for kind in kinds]
    assert all(np.array_equal(losses[0], other, equal_nan=True) for other in losses)
    assert record(reader, "dragon").text == b"dragon"


@pytest.mark.parametrize(("tokens", "sentence"), [(np.zeros((2, 3), int), "tokens of 2 texts"), ("", "the prompt is empty")])
def test_what_is_no_one_text_is_refused(tokens: object, sentence: str) -> None:
    with pytest.raises(bdh_spec.BDHError, match=sentence):
        record(load("numpy"), tokens)  # type: ignore[arg-type]  # they are none


@pytest.mark.parametrize("name", ["__init__", "record", "intervene", "page", "causes", "corpus", "neurons", "graph", "state"])
def test_examples_in_docstrings_run(name: str) -> None:
    module = bdh_look if name == "__init__" else __import__(f"bdh_look.{name}", fromlist=["*"])
    assert doctest.testmod(module).failed == 0
