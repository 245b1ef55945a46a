"""What the paper says of the inside of BDH, tried on a model: the figures of docs/look.md, each beside its control.

python examples/look_claims.py                   # prints them
python examples/look_claims.py docs/look.md      # writes them into the page, between its two marks
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from hatchling_data import corpus

import bdh_spec
from bdh_look import graph as graphs
from bdh_look import neurons, state
from bdh_spec import BDHConfig, Model, Params
from bdh_spec.params import fingerprint

BEGIN, END = "<!-- figures: python examples/look_claims.py docs/look.md -->\n", "<!-- end of figures -->\n"
SEED = 1
KINDS = ("x_sparse", "y_sparse", "xy_sparse")


def table(titles: list[str], rows: list[list[Any]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n\n"


def prose(*sentences: str) -> str:
    """A paragraph."""
    return textwrap.fill(" ".join(sentences), 128, break_long_words=False, break_on_hyphens=False) + "\n\n"


def density(models: dict[str, Model], text: bytes) -> Iterator[str]:
    seen = {name: neurons.activity(model, text) for name, model in models.items()}
    yield "## About 5% of neurons are active\n\n"
    yield prose(f"{len(text):,} held-out bytes in windows of 256; the control is a fresh model.")
    rows = [[name, *(f"{100 * one.density[kind].mean():.1f} %" for kind in KINDS)] for name, one in seen.items()]
    yield table(["weights", *(f"`{kind}`" for kind in KINDS)], rows)
    both = 100 * float(seen["trained"].density["xy_sparse"].mean())
    word = "Reproduced for" if 2.5 <= both <= 10 else "Not reproduced, even for"
    yield prose(f"**{word} `xy_sparse`, at {both:.1f} %,** which is what reaches the decoder.")


def predictable(models: dict[str, Model], text: bytes, rng: np.random.Generator) -> Iterator[str]:
    yield "## Activity goes with how predictable the text is\n\n"
    yield prose(
        "Spearman's correlation of the share of active neurons at a byte with the entropy of what is expected after it.",
        "The control is the largest of 40 shifts of the one against the other, and a fresh model.",
    )
    found = {name: neurons.predictability(neurons.activity(model, text), rng) for name, model in models.items()}
    rows = [
        [f"`{a['kind']}`", a["layer"], f"{a['with_entropy']:+.2f}", f"{a['chance']:.2f}", f"{b['with_entropy']:+.2f}"]
        for a, b in zip(found["trained"], found["fresh"], strict=True)
    ]
    yield table(["neurons", "layer", "trained", "chance gives up to", "fresh model"], rows)
    beyond = [r["with_entropy"] for r in found["trained"] if r["kind"] == "xy_sparse" and abs(r["with_entropy"]) > r["chance"]]
    if beyond and (min(beyond) > 0 or max(beyond) < 0):
        way = "fewer" if beyond[0] > 0 else "more"
        yield prose(
            f"**A correlation is there, beyond chance in {len(beyond)} of {models['trained'].config.n_layer} layers:**",
            f"`xy_sparse` has {way} active neurons where the text is predictable.",
        )
    else:
        yield prose("**Not reproduced:** layers disagree on the sign, or stay within chance.")


def selective(models: dict[str, Model], text: bytes, rng: np.random.Generator) -> Iterator[str]:
    yield "## Neurons are selective\n\n"
    yield prose(
        "Mutual information, in bits, between a neuron's `xy_sparse` being above zero in a layer and what a byte",
        "is. Chance is what",
        "the most selective of all reaches in 95 of 100 shifts of the labels; a fresh model reads the same text.",
    )
    found = {name: neurons.selectivity(neurons.activity(model, text), rng) for name, model in models.items()}
    trained, fresh = found["trained"], found["fresh"]
    best = {name: one.bits.max(0) for name, one in found.items()}
    rows = [
        [
            name,
            f"{trained.entropy[k]:.3f}",
            f"{best['trained'][k]:.3f}",
            f"{trained.chance[k]:.3f}",
            f"{int(trained.selective()[:, k].sum()):,}",
            f"{best['fresh'][k]:.3f}",
            f"{int(fresh.selective()[:, k].sum()):,}",
        ]
        for k, name in enumerate(trained.names)
    ]
    titles = ["label", "bits there are", "best neuron", "chance", "selective", "best of a fresh model", "selective there"]
    yield table(titles, rows)
    better = [name for k, name in enumerate(trained.names) if best["trained"][k] > 1.5 * best["fresh"][k]]
    yield prose(
        f"Of {len(trained.bits):,} neurons in layers. What kind a byte itself is stands in the embedding, so",
        "neurons of a fresh model",
        "tell it as well. **The best trained neuron knows more than one and a half times as much as the best fresh one of:",
        f"{', '.join(better) or 'no label'}.**",
    )


def monosemantic(models: dict[str, Model], text: bytes, rng: np.random.Generator) -> Iterator[str]:
    yield "## Synapses are monosemantic\n\n"
    yield prose(
        "Our bytes have no currencies and countries; the labels are those above. For each the state entry of which the part in",
        f"what is read goes most with it (Pearson), over {len(text):,} bytes; chance as above, over all entries; and the best",
        "entry of a fresh model.",
    )
    found = {name: neurons.synapses(model, text, rng) for name, model in models.items()}
    pairs = list(zip(found["trained"], found["fresh"], strict=True))
    yield table(
        ["label", "layer, head, neuron, feature", "r", "chance", "fresh model"],
        [
            [one["label"], ", ".join(map(str, one["synapse"])), *(f"{r:.2f}" for r in (one["r"], one["chance"], other["r"]))]
            for one, other in pairs
        ],
    )
    beyond = [one["label"] for one, _ in pairs if one["r"] > one["chance"]]
    pure = [one["label"] for one, _ in pairs if one["r"] > max(one["chance"], 0.8)]
    more = [one["label"] for one, other in pairs if one["r"] > max(one["chance"], other["r"] + 0.1)]
    yield prose(
        f"**Beyond chance for {len(beyond)} of {len(pairs)} labels; more than 0.1 above a fresh model's best for {len(more)}**",
        f"({', '.join(more) or 'none'}). With r above 0.8, as a synapse would have that is active for one thing alone:",
        f"{', '.join(pure) or 'none'}.",
    )


def graph(params: Params, config: BDHConfig, rng: np.random.Generator) -> Iterator[str]:
    yield "## Graphs of neurons are heavy-tailed and modular\n\n"
    yield prose(
        "Gx = `encoder` after `decoder`, Gy = `encoder_v` after `decoder`, the strongest 8 positive edges per",
        "neuron on average.",
        "Shuffled: the entries of each matrix in another order. A tail may be a power law if its goodness is 0.1",
        "or more and z to the",
        "lognormal not below -2. Modularity stands beside that of graphs with the same degrees.",
    )
    rows, verdicts = [], []
    mixed = graphs.shuffled(params, rng)
    for kind in graphs.KINDS:
        largest, scores, tails = {}, {}, {}
        for name, weights in (("trained", params), ("shuffled", mixed)):
            one = graphs.graph(weights, config, kind)
            found, out = graphs.modules(one, rng), one.degrees["out"]
            tail = graphs.fit_tail(out, rng)
            largest[name], scores[name], tails[name] = int(out.max()), found.z, tail
            fit = [
                f"{tail.exponent:.2f}",
                f"{tail.goodness:.2f}",
                f"{tail.against_lognormal:+.1f}",
                f"{tail.against_exponential:+.1f}",
            ]
            parts = [f"{found.modularity:.2f}", f"{np.mean(found.control):.2f}", f"{found.z:.0f}"]
            rows.append([kind, name, largest[name], *fit, *parts])
        power = tails["trained"].goodness >= 0.1 and tails["trained"].against_lognormal >= -2
        heavy, modular = largest["trained"] > 1.5 * largest["shuffled"], scores["trained"] > 2 * abs(scores["shuffled"]) + 5
        verdicts.append(
            f"{kind} is {'' if heavy else 'not '}heavier-tailed than that of shuffled weights, its tail"
            f" {'may be' if power else 'is not'} a power law, and it is {'' if modular else 'not '}more modular than its"
            " degrees make it."
        )
    titles = ["graph", "weights", "largest out-degree", "exponent", "goodness", "z to lognormal", "z to exponential"]
    yield table([*titles, "modularity", "same degrees", "z"], rows)
    yield prose(f"**{' '.join(verdicts)}**")


def memory(model: Model, text: bytes, rng: np.random.Generator) -> Iterator[str]:
    yield "## What the state holds\n\n"
    places = [place for k in range(3, 12) if (place := 4**k) < len(text)]
    layers = range(model.config.n_layer)
    cells = [
        [
            f"{r['bytes']:,}",
            *(f"{np.mean(r['norm'][i]):,.0f}" for i in layers),
            *(f"{np.mean(r['rank'][i]):.1f}" for i in layers),
        ]
        for r in state.course(model, text, [*places, len(text)])
    ]
    most = min(model.config.n_neurons, model.config.n_embd)
    yield prose(
        f"Norm and effective rank (of {most}) by layer, the mean of its heads, over {len(text):,} bytes of the training text."
    )
    yield table(["bytes", *(f"norm {i}" for i in layers), *(f"rank {i}" for i in layers)], cells)
    yield prose(
        "A word is planted in a sentence, `The name is ...`, and asked for after other bytes: how much less it",
        "costs than one that was not planted, in bits per byte, of 12 words, with the standard error. Readable is what exceeds",
        "95 of 100 exchanges of the two, which one cell in twenty would without any memory.",
    )
    distances = [0, 16, 64, 256, 1024, 4096]
    kinds = {"random letters": False, "a word of the text": True}
    found = [state.recall(model, text, distances, rng, known=known) for known in kinds.values()]

    def cell(one: state.Recall) -> str:
        return f"{one.gain:+.2f} ± {one.error:.2f}{', readable' if one.readable else ''}"

    yield table(["bytes between", *kinds], [[f"{d:,}", *(cell(one[k]) for one in found)] for k, d in enumerate(distances)])


@click.command()
@click.argument("page", required=False, type=click.Path(path_type=Path, exists=True))
def main(page: Path | None) -> None:
    """Try the claims on the embedded model, and print the figures or write them into PAGE."""
    params, config = bdh_spec.read()
    port = bdh_spec.choose("numpy")
    fresh = bdh_spec.init(config, np.random.default_rng(0))
    models = {"trained": port.load(params, config), "fresh": port.load(fresh, config)}
    training, held_out = corpus()
    rng = np.random.default_rng(SEED)
    parts = [
        f"Of the embedded model {fingerprint(params)[:12]}, by the specification, seed {SEED}.\n\n",
        *density(models, held_out),
        *predictable(models, held_out, rng),
        *selective(models, held_out, rng),
        *monosemantic(models, held_out[:2048], rng),
        *graph(params, config, rng),
        *memory(models["trained"], training[:100_000], rng),
    ]
    figures = "".join(parts)
    if page is None:
        click.echo(figures)
        return
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise click.UsageError(f"{page} has no marks between which figures stand")
    whole = re.sub(re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: BEGIN + figures + END, text, flags=re.DOTALL)
    page.write_text(whole, encoding="utf-8")


if __name__ == "__main__":
    main()
