"""Graphs, tails and modules of which the answer is known."""

import io

import networkx as nx
import numpy as np
import pytest

import bdh_spec
from bdh_look import LookError, graph
from bdh_spec import BDHConfig, Params

CONFIG = BDHConfig(n_layer=1, n_embd=16, n_head=2, mlp_internal_dim_multiplier=12)


@pytest.fixture(scope="module")
def params() -> Params:
    return bdh_spec.init(CONFIG, np.random.default_rng(5))


def test_edges_are_the_largest_entries_of_encoder_after_decoder(params: Params) -> None:
    for kind, towards in (("Gx", params.encoder), ("Gy", params.encoder_v)):
        found = graph.graph(params, CONFIG, kind, edges=4)
        whole = (params.decoder - params.decoder.mean(-1, keepdims=True)) @ np.concatenate(list(towards), -1)
        assert found.weights.nnz == pytest.approx(4 * len(whole), abs=2)
        held = found.weights.toarray()
        assert held[held > 0].min() >= np.sort(whole.ravel())[::-1][found.weights.nnz]
        i, j = np.unravel_index(whole.argmax(), whole.shape)
        assert held[i, j] == held.max() > 0
        assert found.degrees["out"].sum() == found.degrees["in"].sum() == found.weights.nnz


def test_a_power_law_is_told_from_what_is_none() -> None:
    rng = np.random.default_rng(1)
    tail = graph.fit_tail(graph.draw(2.5, 3, 1000, rng).astype(int), rng, replicas=10)
    assert tail.exponent == pytest.approx(2.5, abs=4 * 1.5 / np.sqrt(tail.size))  # four standard errors
    assert tail.goodness >= 0.1
    assert tail.against_exponential > 2
    other = graph.fit_tail(rng.poisson(30, 1000), rng, replicas=10)
    assert other.goodness < 0.1 or other.against_exponential < 2
    assert graph.fit_tail(rng.geometric(0.1, 1000), rng, replicas=1).against_exponential < 2


def test_degrees_that_are_all_alike_have_no_tail() -> None:
    with pytest.raises(LookError, match="degrees of 1 sizes"):
        graph.fit_tail(np.full(100, 4), np.random.default_rng(0))


def test_exchanging_edges_keeps_degrees_and_loses_modules() -> None:
    rng = np.random.default_rng(2)
    clear = nx.planted_partition_graph(4, 20, 0.5, 0.02, seed=3)
    mixed = graph.exchanged(clear, rng)
    assert dict(mixed.degree) == dict(clear.degree)
    assert not any(a == b for a, b in mixed.edges)
    assert set(mixed.edges) != set(clear.edges)
    rows, columns = nx.to_numpy_array(clear).nonzero()
    from scipy.sparse import csr_array

    whole = graph.Graph("Gx", csr_array((np.ones(len(rows)), (rows, columns)), shape=(80, 80)), 0.0, CONFIG)
    found = graph.modules(whole, rng)
    assert found.z > 5
    assert sorted(map(len, found.communities)) == [20] * 4
    again = graph.Graph("Gx", csr_array(nx.to_scipy_sparse_array(mixed)), 0.0, CONFIG)
    assert abs(graph.modules(again, rng).z) < found.z / 2


def test_shuffled_weights_are_the_same_values_elsewhere(params: Params) -> None:
    mixed = graph.shuffled(params, np.random.default_rng(0))
    for before, after in zip(params, mixed, strict=True):
        assert np.array_equal(np.sort(before.ravel()), np.sort(after.ravel()))
        assert not np.array_equal(before, after)


def test_graphml_and_the_picture_can_be_read_again(params: Params) -> None:
    rng = np.random.default_rng(0)
    found = graph.graph(params, CONFIG, "Gx", 4)
    parts = graph.modules(found, rng, controls=2)
    read = nx.read_graphml(io.BytesIO(graph.graphml(found, parts)))
    assert read.number_of_edges() == found.weights.nnz
    assert read.nodes["100"] == {"head": 1, "neuron": 4, "community": read.nodes["100"]["community"]}
    image = graph.picture(found, found, {"out": graph.fit_tail(found.degrees["out"], rng, 1), "in": None}, parts)
    assert image.startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_refused(params: Params) -> None:
    with pytest.raises(LookError, match="no graph is called 'Gz'"):
        graph.graph(params, CONFIG, "Gz")
    with pytest.raises(LookError, match="0 edges per neuron"):
        graph.graph(params, CONFIG, "Gx", 0)
