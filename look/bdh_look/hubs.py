"""The hubs of a model's graphs, worked out for the live page as javascript/graph.mjs works them out of weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bdh_look.graph import KINDS, graph, shuffled
from bdh_spec import BDHConfig, Params
from bdh_spec.params import Array

if TYPE_CHECKING:
    from scipy.sparse import csr_array

EDGES = 8.0  # per neuron, on average
HUBS = 12  # neurons of the largest degree, which are drawn
PARTNERS = 12  # of each, those at the other ends of its strongest edges, which are drawn too
LINKS = 600  # edges between all these, the strongest


def hubs(params: Params, config: BDHConfig) -> dict[str, dict[str, Any]]:
    """Of Gx and Gy each: degrees of all neurons, the largest hubs, the strongest edges between these, and a control.

    The control has how many neurons have each degree where the entries of each matrix stand in another order.
    """
    mixed = shuffled(params, np.random.default_rng(0))
    return {kind: _of_one(params, mixed, config, kind) for kind in KINDS}


def _of_one(params: Params, mixed: Params, config: BDHConfig, kind: str) -> dict[str, Any]:
    n = config.n_head * config.n_neurons
    edges = min(EDGES, n / 2)
    whole, by_chance = graph(params, config, kind, edges), graph(mixed, config, kind, edges).degrees
    out, into = whole.degrees["out"], whole.degrees["in"]
    chance = {"out": by_chance["out"], "into": by_chance["in"], "both": by_chance["out"] + by_chance["in"]}
    weights = whole.weights.tocsr()
    drawn = _with_partners(weights, np.argsort(-(out + into), kind="stable")[:HUBS])
    links, strengths = _strongest(weights[drawn][:, drawn].toarray())
    return {
        "threshold": whole.threshold,
        "edges": int(whole.weights.nnz),
        "out": counted(out),
        "into": counted(into),
        "drawn": counted(drawn),
        "links": counted(links),
        "weights": strengths,
        "chance": {way: counted(np.bincount(degrees)) for way, degrees in chance.items()},
    }


def _with_partners(weights: csr_array, found: Array) -> Array:
    """Hubs, and then the neurons at the other ends of the strongest edges of each, either way; nobody twice."""
    drawn = dict.fromkeys(found.tolist())
    for hub in found:
        either = np.maximum(weights[[hub]].toarray()[0], weights[:, [hub]].toarray()[:, 0])
        either[hub] = 0
        order = np.argsort(-either, kind="stable")[:PARTNERS]
        drawn |= dict.fromkeys(order[either[order] > 0].tolist())
    return np.array(list(drawn))


def _strongest(between: Array) -> tuple[Array, Array]:
    """The strongest edges (E, 2) of a graph (K, K), from and to, and their weights; a neuron's edge to itself is none."""
    np.fill_diagonal(between, 0)
    order = np.argsort(-between, axis=None, kind="stable")[:LINKS]
    order = order[between.ravel()[order] > 0]
    return np.stack(np.unravel_index(order, between.shape), -1).reshape(-1), between.ravel()[order].astype(np.float32)


def counted(values: Array) -> Array:
    """Whole numbers in as few bytes as hold them."""
    return values.astype(np.uint16 if values.max(initial=0) < 2**16 else np.uint32)
