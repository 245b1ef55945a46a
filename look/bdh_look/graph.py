"""The graphs of a model: which neuron excites which, Gx = encoder after decoder and Gy = encoder_v after decoder.

An edge from i to j is decoder[i] . encoder[:, j] where that is above a threshold, which is chosen so that a neuron has so many
edges on average. The norm between them (R2) takes the mean of decoder[i] away, and so is done here; its scale depends on all
active neurons and is left out. The controls: the same of weights whose entries are shuffled within each matrix, and, for
modularity, graphs with the same degrees and edges exchanged by chance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bdh_look.corpus import labels
from bdh_look.errors import LookError
from bdh_spec import BDHConfig, Params
from bdh_spec.params import Array

if TYPE_CHECKING:
    from scipy.sparse import csr_array

KINDS = ("Gx", "Gy")
BLOCK = 512  # rows of the graph computed at once
SAMPLE = 4_000_000  # entries that the threshold is estimated from, where there are more


@dataclass(frozen=True, eq=False)
class Graph:
    """Neurons of all heads, head-major, and who excites whom."""

    name: str
    weights: csr_array  # h*N by h*N: from row to column, above the threshold
    threshold: float
    config: BDHConfig

    @property
    def degrees(self) -> dict[str, Array]:
        """Of each neuron how many it excites, and how many it."""
        ones = self.weights.astype(bool).astype(int)
        return {"out": np.asarray(ones.sum(1)).ravel(), "in": np.asarray(ones.sum(0)).ravel()}

    def undirected(self) -> Any:
        """The same as a networkx graph without directions and weights; a neuron that excites itself is left out."""
        import networkx as nx

        graph = nx.Graph()
        graph.add_nodes_from(range(self.weights.shape[0]))
        rows, columns = self.weights.nonzero()
        graph.add_edges_from((int(i), int(j)) for i, j in zip(rows, columns, strict=True) if i != j)
        return graph


def graph(params: Params, config: BDHConfig, kind: str = "Gx", edges: float = 8.0) -> Graph:
    """The graph of a kind with so many edges per neuron on average, of the strongest positive entries."""
    from scipy.sparse import csr_array, vstack

    if kind not in KINDS:
        raise LookError(f"no graph is called {kind!r}: choose from {', '.join(KINDS)}")
    decoder = np.asarray(params.decoder, np.float32)
    decoder = decoder - decoder.mean(-1, keepdims=True)
    towards = np.concatenate(list(np.asarray(params.encoder if kind == "Gx" else params.encoder_v, np.float32)), -1)  # D hN
    n = len(decoder)
    if not 0 < edges < n:
        raise LookError(f"{edges} edges per neuron: choose between 0 and the {n} neurons")
    threshold = max(0.0, quantile(decoder, towards, 1 - edges / n))
    rows = []
    for start in range(0, n, BLOCK):
        block = decoder[start : start + BLOCK] @ towards
        rows.append(csr_array(np.where(block > threshold, block, 0)))
    return Graph(kind, csr_array(vstack(rows)), threshold, config)


def quantile(decoder: Array, towards: Array, share: float) -> float:
    """The value below which a share of all entries of the product lies: of all of them, or of evenly spaced rows."""
    n = len(decoder)
    step = max(1, -(-n * n // SAMPLE))
    return float(np.quantile(decoder[::step] @ towards, share))


def shuffled(params: Params, rng: np.random.Generator) -> Params:
    """Weights with the entries of each matrix in another order: the same values, and no structure."""
    return params._replace(**{name: rng.permuted(np.array(values), axis=None) for name, values in params._asdict().items()})


@dataclass(frozen=True)
class Tail:
    """A power law fitted to the largest degrees: p(k) ~ k^-exponent from k = start on."""

    exponent: float
    start: int
    size: int  # neurons in the tail
    distance: float  # Kolmogorov-Smirnov, of the fit
    goodness: float  # share of synthetic power laws that fit their own fit no better: below 0.1 it is no power law
    against_lognormal: (
        float  # log likelihood ratio, normalised (Vuong): positive favours the power law, |z| below 2 decides nothing
    )
    against_exponential: float


def fit_tail(degrees: Array, rng: np.random.Generator, replicas: int = 100) -> Tail:
    """The discrete power law that fits the tail best, its goodness by bootstrap, and two rivals on the same tail.

    The method of Clauset, Shalizi and Newman (2009): the start is where the distance of the fit is least.
    """
    counted = np.sort(degrees[degrees > 0])
    if len(np.unique(counted)) < 4:
        raise LookError(f"degrees of {len(np.unique(counted))} sizes: a tail takes more to fit, so give more --edges")
    exponent, start, distance = best_fit(counted)
    tail = counted[counted >= start]
    below = counted[counted < start]
    worse = 0
    for _ in range(replicas):
        drawn = rng.random(len(counted)) < len(tail) / len(counted)
        synthetic = np.concatenate(
            [draw(exponent, start, int(drawn.sum()), rng), rng.choice(below, int((~drawn).sum())) if len(below) else []]
        )
        worse += best_fit(np.sort(synthetic.astype(np.int64)))[2] >= distance
    rivals = [
        vuong(power_log(tail, exponent, start), log) for log in (lognormal_log(tail, start), exponential_log(tail, start))
    ]
    return Tail(exponent, int(start), len(tail), distance, worse / max(1, replicas), *rivals)


def best_fit(counted: Array) -> tuple[float, int, float]:
    """Exponent, start and distance of the power law that fits the tail of sorted degrees best."""
    starts = np.unique(counted)[:-1]
    starts = starts[[np.count_nonzero(counted >= start) >= 50 for start in starts]]
    if not len(starts):
        starts = np.unique(counted)[:1]
    if len(starts) > 30:
        starts = np.unique(np.round(np.geomspace(starts[0], starts[-1], 30)).astype(int))
    fits = []
    for start in starts:
        tail = counted[counted >= start]
        exponent = exponent_of(tail, int(start))
        fits.append((exponent, int(start), distance_of(tail, exponent, int(start))))
    return min(fits, key=lambda fit: fit[2])


def exponent_of(tail: Array, start: int) -> float:
    """The likeliest exponent of a discrete power law."""
    from scipy.optimize import minimize_scalar
    from scipy.special import zeta

    mean = float(np.log(tail).mean())
    return float(minimize_scalar(lambda a: np.log(zeta(a, start)) + a * mean, bounds=(1.01, 20), method="bounded").x)


def distance_of(tail: Array, exponent: float, start: int) -> float:
    """The largest difference between the tail's distribution and the power law's."""
    from scipy.special import zeta

    sizes, counts = np.unique(tail, return_counts=True)
    seen = np.cumsum(counts) / len(tail)
    expected = 1 - zeta(exponent, sizes + 1.0) / zeta(exponent, start)
    return float(np.abs(seen - expected).max())


def draw(exponent: float, start: int, count: int, rng: np.random.Generator) -> Array:
    """Degrees drawn from a discrete power law, by the usual approximation of rounding a continuous one."""
    return np.floor((start - 0.5) * (1 - rng.random(count)) ** (-1 / (exponent - 1)) + 0.5)


def power_log(tail: Array, exponent: float, start: int) -> Array:
    """Log-probabilities of the tail by the power law."""
    from scipy.special import zeta

    return -exponent * np.log(tail) - np.log(zeta(exponent, start))


def exponential_log(tail: Array, start: int) -> Array:
    """Log-probabilities of the tail by the likeliest geometric distribution."""
    rate = np.log1p(1 / max(float(tail.mean()) - start, 1e-9))
    return np.log(-np.expm1(-rate)) - rate * (tail - start)


def lognormal_log(tail: Array, start: int) -> Array:
    """Log-probabilities of the tail by the likeliest lognormal, rounded to whole numbers and cut off at the start."""
    from scipy.optimize import minimize
    from scipy.stats import norm

    def log_p(wanted: Array) -> Array:
        mean, spread = wanted[0], np.exp(wanted[1])
        above = norm.sf((np.log(tail - 0.5) - mean) / spread) - norm.sf((np.log(tail + 0.5) - mean) / spread)
        everything = norm.sf((np.log(start - 0.5) - mean) / spread)
        return np.log(np.maximum(above, 1e-300)) - np.log(max(everything, 1e-300))

    logs = np.log(tail)
    found = minimize(lambda w: -log_p(w).sum(), [logs.mean(), np.log(max(float(logs.std()), 0.1))], method="Nelder-Mead")
    return log_p(found.x)


def vuong(one: Array, other: Array) -> float:
    """How many standard errors the log likelihood of the one is above the other's."""
    ratio = one - other
    return float(ratio.sum() / max(np.sqrt(len(ratio)) * float(ratio.std()), 1e-12))


@dataclass(frozen=True, eq=False)
class Modules:
    """How the graph falls into communities, and graphs of the same degrees."""

    modularity: float
    control: tuple[float, ...]  # of graphs with the same degrees
    communities: tuple[tuple[int, ...], ...]  # neurons, the largest first

    @property
    def z(self) -> float:
        """By how many standard deviations of the control the modularity exceeds it."""
        return float((self.modularity - np.mean(self.control)) / max(float(np.std(self.control, ddof=1)), 1e-12))


def modules(whole: Graph, rng: np.random.Generator, controls: int = 5) -> Modules:
    """Communities by Louvain's method, and the modularity that it finds in graphs of the same degrees."""
    from networkx.algorithms.community import louvain_communities, modularity

    plain = whole.undirected()

    def best(graph: Any) -> tuple[float, list[set[int]]]:
        found = louvain_communities(graph, seed=int(rng.integers(2**31)))
        return float(modularity(graph, found)), found

    value, found = best(plain)
    others = tuple(best(exchanged(plain, rng))[0] for _ in range(controls))
    return Modules(
        value, others, tuple(tuple(sorted(some)) for some in sorted(found, key=lambda some: (-len(some), min(some))))
    )


def exchanged(graph: Any, rng: np.random.Generator, times: int = 10) -> Any:
    """A graph of the same degrees: pairs of edges exchange ends, ``times`` as often as there are edges, if none doubles."""
    edges = [tuple(edge) for edge in graph.edges]
    held = {frozenset(edge) for edge in edges}
    pairs = rng.integers(0, len(edges), (times * len(edges), 2))
    flips = rng.random(len(pairs)) < 0.5
    for (i, j), flip in zip(pairs.tolist(), flips.tolist(), strict=True):
        (a, b), (c, d) = edges[i], edges[j][::-1] if flip else edges[j]
        one, other = frozenset((a, d)), frozenset((c, b))
        if len(one) < 2 or len(other) < 2 or one == other or one in held or other in held:
            continue
        held -= {frozenset((a, b)), frozenset((c, d))}
        held |= {one, other}
        edges[i], edges[j] = (a, d), (c, b)
    made = graph.__class__()
    made.add_nodes_from(graph.nodes)
    made.add_edges_from(edges)
    return made


def responses(found: Modules, seen: Any, rng: np.random.Generator, most: int = 6, draws: int = 200) -> list[dict[str, Any]]:
    """For the largest communities the label at which their neurons are most active, relative to their mean over the text.

    ``chance`` is what the most responsive of as many neurons drawn at random reaches, over all labels, in 95 of 100 draws.
    """
    L, h, N = seen.shape
    marks = {name: where for name, where in labels(seen.text).items() if where.any()}
    active = np.stack([(seen.active[:, where].mean(1)).reshape(L, h * N).mean(0) for where in marks.values()])  # K hN
    usual = seen.active.mean(1).reshape(L, h * N).mean(0)  # hN

    def times(neurons: Array) -> Array:
        return active[:, neurons].mean(1) / max(float(usual[neurons].mean()), 1e-12)

    rows = []
    for k, some in enumerate(found.communities[:most]):
        here = times(np.array(some))
        drawn = [times(rng.choice(h * N, len(some), replace=False)).max() for _ in range(draws)]
        best = int(here.argmax())
        rows.append(
            {
                "community": k,
                "neurons": len(some),
                "label": list(marks)[best],
                "times": float(here[best]),
                "chance": float(np.quantile(drawn, 0.95)),
            }
        )
    return rows


def graphml(whole: Graph, found: Modules) -> bytes:
    """The graph with heads, numbers and communities as GraphML."""
    import io

    import networkx as nx

    community = {neuron: k for k, some in enumerate(found.communities) for neuron in some}
    N = whole.config.n_neurons
    directed = nx.DiGraph(name=whole.name)
    for node in range(whole.weights.shape[0]):
        directed.add_node(node, head=node // N, neuron=node % N, community=community[node])
    coo = whole.weights.tocoo()
    for i, j, weight in zip(*coo.coords, coo.data, strict=True):
        directed.add_edge(int(i), int(j), weight=float(weight))
    buffer = io.BytesIO()
    nx.write_graphml(directed, buffer)
    return buffer.getvalue()


def picture(whole: Graph, control: Graph, tails: dict[str, Tail | None], found: Modules) -> bytes:
    """A PNG: the degrees' distributions beside those of shuffled weights, and the edges with communities side by side."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (way, degrees), colour in zip(whole.degrees.items(), ("tab:orange", "tab:blue"), strict=True):
        left.loglog(*exceeding(degrees), ".", color=colour, markersize=4, label=f"{way}-degree")
        left.loglog(*exceeding(control.degrees[way]), "-", color=colour, alpha=0.35, label=f"{way}, weights shuffled")
        if tail := tails[way]:
            sizes = np.geomspace(tail.start, degrees.max(), 40)
            share = tail.size / len(degrees)
            left.loglog(sizes, share * (sizes / tail.start) ** (1 - tail.exponent), "--", color=colour, linewidth=1)
    left.set(xlabel="degree k", ylabel="share of neurons with at least k", title=f"{whole.name}: degrees; dashed: fitted tail")
    left.title.set_fontsize(10)
    left.legend(fontsize=8)
    order = np.empty(whole.weights.shape[0], int)
    order[[neuron for some in found.communities for neuron in some]] = np.arange(len(order))
    rows, columns = whole.weights.nonzero()
    right.plot(order[columns], order[rows], ",", color="tab:orange", alpha=0.6)
    right.set(xlim=(0, len(order)), ylim=(len(order), 0), aspect="equal", xlabel="to neuron", ylabel="from neuron")
    right.set_title(
        f"edges by community: modularity {found.modularity:.2f}, by chance {np.mean(found.control):.2f}", fontsize=10
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140, metadata={"Software": None})
    return buffer.getvalue()


def exceeding(degrees: Array) -> tuple[Array, Array]:
    """Each size above zero, and the share of all that is at least that large."""
    sizes = np.unique(degrees[degrees > 0])
    return sizes, np.array([(degrees >= size).mean() for size in sizes])
