"""How many neurons are active, and what each is selective for, over a corpus, with labels moved by chance as the control.

Density is the share of neurons above zero. Selectivity is the mutual information, in bits, between a neuron's being active in a
layer and a byte's being of a kind. Of thousands of neurons some fit any labels, so the same is asked of the labels shifted
round the text by random amounts, which keeps how they follow one another; only what exceeds the largest of all neurons in
nearly all of these counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from bdh_look.corpus import labels, windows
from bdh_look.errors import LookError
from bdh_spec import Model
from bdh_spec.model import log_softmax
from bdh_spec.params import Array

KINDS = ("x_sparse", "y_sparse", "xy_sparse")
BLOCK = 512  # units asked at once
ROWS = 32  # neurons whose synapses are asked at once
CHANCE = 0.05  # of an experiment without any selective neuron to find one


@dataclass(frozen=True, eq=False)
class Activity:
    """Which neurons were active over a corpus, and how well it was predicted."""

    text: bytes  # what was read, T bytes of whole windows
    window: int  # W
    density: dict[str, Array]  # of each kind: (L, h, W), shares
    active: Array  # (L*h*N, T) booleans of xy_sparse, or of the kind asked for
    amount: dict[str, Array]  # of each kind: (L, T), the share of neurons that are active at each byte
    entropy: Array  # (T,) nats of what is expected next
    loss: Array  # (T,) nats of the byte that comes next, NaN at the end of a window
    shape: tuple[int, int, int]  # L h N

    def name(self, unit: int) -> str:
        """Where a unit is: its layer, head and neuron."""
        layer, head, neuron = np.unravel_index(unit, self.shape)
        return f"layer {layer} head {head} neuron {neuron}"


def activity(model: Model, text: bytes, window: int = 256, kind: str = "xy_sparse") -> Activity:
    """Read a corpus in windows without earlier context, and keep which neurons of a kind were active."""
    if kind not in KINDS:
        raise LookError(f"no neurons are called {kind!r}: choose from {', '.join(KINDS)}")
    L, h, N = model.config.n_layer, model.config.n_head, model.config.n_neurons
    sums = {name: np.zeros((L, h, window)) for name in KINDS}
    amounts: dict[str, list[Array]] = {name: [] for name in KINDS}
    parts: list[Array] = []
    entropies: list[Array] = []
    losses: list[Array] = []
    for tokens in windows(text, window):
        stages = model.trace(tokens)
        log_p = log_softmax(stages["logits"].astype(np.float64))
        entropies.append(-(np.exp(log_p) * log_p).sum(-1).ravel())
        following = -np.take_along_axis(log_p[:, :-1], tokens[:, 1:, None].astype(int), -1)[..., 0]
        losses.append(np.pad(following, ((0, 0), (0, 1)), constant_values=np.nan).ravel())
        for name in KINDS:
            above = np.stack([stages.pop(f"layers.{i}.{name}") > 0 for i in range(L)])  # L B h W N
            sums[name] += above.mean(-1).sum(1)
            amounts[name].append(above.mean((2, 4)).reshape(L, -1))
            if name == kind:
                parts.append(np.moveaxis(above, (1, 3), (3, 4)).reshape(L * h * N, -1))
    read = sum(part.shape[1] for part in parts)
    return Activity(
        text=text[:read],
        window=window,
        density={name: total / (read // window) for name, total in sums.items()},
        active=np.concatenate(parts, 1),
        amount={name: np.concatenate(some, 1) for name, some in amounts.items()},
        entropy=np.concatenate(entropies),
        loss=np.concatenate(losses),
        shape=(L, h, N),
    )


def information(active: Array, marks: Array) -> Array:
    """Mutual information in bits (units, K) between being active, (units, T), and each of the marks, (K, T)."""
    T = active.shape[1]
    both = (active.astype(np.float32) @ marks.T.astype(np.float32)).astype(np.float64)  # counts below 2^24, so exact
    on, marked = active.sum(1, dtype=np.float64)[:, None], marks.sum(1, dtype=np.float64)[None]
    total = np.zeros(both.shape)
    for joint, p, q in (
        (both, on, marked),
        (on - both, on, T - marked),
        (marked - both, T - on, marked),
        (T - on - marked + both, T - on, T - marked),
    ):
        ratio = np.divide(joint * T, p * q, out=np.ones(both.shape), where=joint > 0)
        total += joint / T * np.log2(ratio)
    return np.maximum(total, 0)


@dataclass(frozen=True, eq=False)
class Selectivity:
    """What units are selective for, and what chance would give."""

    names: tuple[str, ...]  # K labels
    share: Array  # (K,) of bytes that are of each kind
    bits: Array  # (units, K)
    entropy: Array  # (K,) bits: the most that a unit could know
    chance: Array  # (K,) bits that the most selective unit of all exceeds by chance once in 20 times
    control: Array  # (shifts, K): the largest of all units, each time the labels are shifted

    def selective(self) -> Array:
        """Which units know more than chance, (units, K)."""
        return self.bits > self.chance


def selectivity(seen: Activity, rng: np.random.Generator, shifts: int = 40) -> Selectivity:
    """Ask each unit about each label, and again with the labels shifted round the text by random amounts."""
    if shifts < 1 / CHANCE:
        raise LookError(f"{shifts} shifts: a chance of {CHANCE} takes {1 / CHANCE:.0f} or more to tell")
    found = labels(seen.text)
    marks = np.stack(list(found.values()))
    T = marks.shape[1]
    least = min(seen.window, T // 4)
    if least < 2:
        raise LookError(f"{T} bytes are too few to shift labels in: give a longer text")
    moved = [np.roll(marks, int(one), axis=1) for one in rng.integers(least, T - least + 1, shifts)]
    asked, K = np.concatenate([marks, *moved]).astype(np.float32), len(marks)
    bits, control = np.empty((len(seen.active), K)), np.zeros((shifts, K))
    for start in range(0, len(seen.active), BLOCK):
        known = information(seen.active[start : start + BLOCK], asked)
        bits[start : start + BLOCK] = known[:, :K]
        control = np.maximum(control, known[:, K:].max(0).reshape(shifts, K))
    return Selectivity(
        names=tuple(found),
        share=marks.mean(1),
        bits=bits,
        entropy=information(marks, marks).diagonal(),
        chance=np.quantile(control, 1 - CHANCE, axis=0, method="higher"),
        control=control,
    )


def correlation(a: Array, b: Array) -> float:
    """Spearman's rank correlation, of pairs without NaN."""
    from scipy.stats import rankdata

    known = ~(np.isnan(a) | np.isnan(b))
    ranks = [rankdata(values[known]) for values in (a, b)]
    if min(np.ptp(r) for r in ranks) == 0:
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def predictability(seen: Activity, rng: np.random.Generator, shifts: int = 40) -> list[dict[str, Any]]:
    """How the share of active neurons goes with the entropy of what is expected next, by kind and layer.

    ``chance`` is the largest magnitude among so many shifts of the one against the other, round the text.
    """
    T, rows = len(seen.entropy), []
    least = min(seen.window, T // 4)
    by = rng.integers(least, T - least + 1, shifts)
    for kind, amounts in seen.amount.items():
        for layer, amount in enumerate(amounts):
            chance = max(abs(correlation(amount, np.roll(seen.entropy, int(one)))) for one in by)
            rho = correlation(amount, seen.entropy)
            rows.append(
                {
                    "kind": kind,
                    "layer": layer,
                    "with_entropy": rho,
                    "with_loss": correlation(amount, seen.loss),
                    "chance": chance,
                }
            )
    return rows


def contexts(seen: Activity, unit: int, rng: np.random.Generator, most: int = 4, around: int = 12) -> list[bytes]:
    """Places where a unit is active, drawn at random: the bytes before, and the one at which it is, last."""
    places = np.flatnonzero(seen.active[unit])
    drawn = sorted(rng.choice(places, min(most, len(places)), replace=False).tolist()) if len(places) else []
    return [seen.text[max(0, at - around) : at + 1] for at in drawn]


def when(seen: Activity, unit: int, marks: Array) -> str:
    """Whether a unit is more often active where the label is, or less."""
    here = float(seen.active[unit][marks].mean())
    return "active" if here > float(seen.active[unit].mean()) else "silent"


def most_selective(found: Selectivity, most: int = 3) -> list[tuple[str, int, float, float]]:
    """For each label the units that know most of it: label, unit, share of the label's entropy, and the same by chance."""
    rows = []
    for k, name in enumerate(found.names):
        if found.entropy[k] == 0:
            continue
        for unit in np.argsort(-found.bits[:, k], kind="stable")[:most]:
            if found.bits[unit, k] > found.chance[k]:
                rows.append(
                    (name, int(unit), float(found.bits[unit, k] / found.entropy[k]), float(found.chance[k] / found.entropy[k]))
                )
    return rows


def synapses(model: Model, text: bytes, rng: np.random.Generator, window: int = 256, shifts: int = 20) -> list[dict[str, Any]]:
    """For each label the state entry whose part in what is read goes most with it, against labels shifted by chance.

    What passes through an entry S[n, d] at a byte is q[n] S[n, d], before the byte is written. Its size is correlated (Pearson)
    with each label over the text, and with the labels shifted round it. Asks every entry at every byte.
    """
    config, found = model.config, labels(text[: len(text) // window * window])
    marks = np.stack(list(found.values())).astype(np.float64)
    T = marks.shape[1]
    names = [name for name, row in zip(found, marks, strict=True) if 0 < row.sum() < T]
    some = marks[[row in names for row in found]]
    some = (some - some.mean(1, keepdims=True)) / (some.std(1, keepdims=True) * np.sqrt(T))
    least = min(window, T // 4)
    moved = [np.roll(some, int(one), axis=1) for one in rng.integers(least, T - least + 1, shifts)]
    asked, K = np.concatenate([some, *moved]).astype(np.float32), len(names)  # (1 + shifts) K, T
    best, where, places = np.zeros(len(asked)), [(0, 0, 0, 0)] * len(asked), [[0]] * len(asked)
    traced = [model.trace(part) for part in windows(text, window, batch=1)]
    for i, j in np.ndindex(config.n_layer, config.n_head):
        q = np.stack([stages[f"layers.{i}.rotated"][0, j] for stages in traced])  # windows W N
        x = np.stack([stages["embed" if i == 0 else f"layers.{i - 1}.x"][0] for stages in traced])  # windows W D
        for start in range(0, config.n_neurons, ROWS):
            reads = q[..., start : start + ROWS, None]
            wrote = reads * x[:, :, None]  # windows W n D
            passed = np.abs(reads * (np.cumsum(wrote, axis=1) - wrote)).reshape(T, -1)
            passed -= passed.mean(0)
            r = np.abs(asked @ passed) / np.maximum(np.sqrt((passed**2).sum(0)), 1e-30)
            for k in np.flatnonzero(r.max(1) > best):
                neuron, feature = divmod(int(r[k].argmax()), config.n_embd)
                best[k], where[k] = r[k].max(), (i, j, start + neuron, feature)
                places[k] = np.argsort(-passed[:, r[k].argmax()], kind="stable")[:4].tolist()
    chance = np.quantile(best[K:].reshape(shifts, K), 1 - CHANCE, axis=0, method="higher")
    return [
        {
            "label": name,
            "synapse": where[k],
            "r": float(best[k]),
            "chance": float(chance[k]),
            "contexts": [text[max(0, at - 12) : at + 1] for at in places[k]],  # where most passes through, at the last byte
        }
        for k, name in enumerate(names)
    ]


def summary(seen: Activity, found: Selectivity, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that was found as plain numbers, for JSON."""
    L, h, _ = seen.shape
    selective = found.selective()
    return {
        "bytes": len(seen.text),
        "window": seen.window,
        **densities(seen),
        "never_active": float((~seen.active.any(1)).mean()),
        "predictability": list(rows),
        "labels": [
            {
                "label": name,
                "share": float(found.share[k]),
                "entropy": float(found.entropy[k]),
                "selective": int(selective[:, k].sum()),
                "best": float(found.bits[:, k].max()),
                "chance": float(found.chance[k]),
                "exceeding_in_control": float((found.control[:, k] > found.chance[k]).mean()),
            }
            for k, name in enumerate(found.names)
        ],
        "units": int(np.prod(seen.shape)),
        "layers": L,
        "heads": h,
    }


def densities(seen: Activity) -> dict[str, Any]:
    """The share of active neurons of each kind by layer and head, and by position in the window."""
    edges = [0, *(2**k for k in range(3, 20) if 2**k < seen.window), seen.window]
    return {
        "density": {kind: values.mean(-1).tolist() for kind, values in seen.density.items()},
        "by_position": [
            {"from": a, "to": b, **{kind: float(values[..., a:b].mean()) for kind, values in seen.density.items()}}
            for a, b in pairwise(edges)
        ],
    }


def summary_of_density(seen: Activity) -> dict[str, Any]:
    """The share of active neurons of each kind, over all and in parts, and the bits per byte, of a checkpoint among others."""
    shares = {kind: float(values.mean()) for kind, values in seen.density.items()}
    return shares | densities(seen) | {"bits": float(np.nanmean(seen.loss) / np.log(2))}


def picture(course: Sequence[tuple[str, dict[str, Any]]]) -> bytes:
    """A PNG: the share of active neurons by layer and head over checkpoints, and below by position in the window.

    ``course`` has a label and the ``densities`` of each checkpoint, in the order of training; of one it shows that one.
    """
    import io

    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.4), layout="constrained")
    panels = figure.subplots(2, 3, sharey="col")
    labels_of = [label for label, _ in course]
    for (above, below), kind in zip(panels.T, KINDS, strict=True):
        shares = 100 * np.array([found["density"][kind] for _, found in course])  # C L h
        for layer, colour in enumerate(colormaps["viridis"](np.linspace(0, 0.85, shares.shape[1]))):
            above.plot(shares[:, layer], "-", color=colour, alpha=0.25, linewidth=0.8)
            above.plot(shares[:, layer].mean(-1), "o-", color=colour, markersize=3.5, label=f"layer {layer}")
        shown = np.unique(np.linspace(0, len(course) - 1, 6).round().astype(int))
        above.set_xticks(shown, [labels_of[i] for i in shown], rotation=20 if len(course) > 1 else 0)
        above.set(title=f"{kind}, % active", xlabel="checkpoint", ylim=(0, None))
        colours = colormaps["plasma"](np.linspace(0, 0.85, len(course)))
        for i, ((label, found), colour) in enumerate(zip(course, colours, strict=True)):
            rows = found["by_position"]
            middle = [np.sqrt(max(row["from"], 1) * row["to"]) for row in rows]
            name = label if i in (0, len(course) - 1) else None
            below.semilogx(middle, [100 * row[kind] for row in rows], ".-", base=2, color=colour, label=name)
        below.set(xlabel="bytes read before; mean of all layers and heads", ylim=(0, None))
        below.xaxis.set_major_formatter("{x:.0f}")
    panels[0, 0].legend(fontsize=8, title="thin: its heads", title_fontsize=8)
    panels[1, 0].legend(fontsize=8, title="checkpoint", title_fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140, metadata={"Software": None})
    return buffer.getvalue()
