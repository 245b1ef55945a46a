"""The commands beside the page: neurons, graph and state. Each prints tables, and writes what it found where it is told to."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

import click
import numpy as np

from bdh_look import corpus
from bdh_look.errors import LookError
from bdh_look.options import Chosen, check_free, of_a_model, put
from bdh_look.runs import checkpoints_in, label
from bdh_look.tables import percent, quoted, show
from bdh_spec import checkpoint as files
from bdh_spec.params import Array, fingerprint

FILE = click.Path(path_type=Path)
data_option = click.option("--data", type=FILE, required=True, help="The text to read.")
seed_option = click.option(
    "--seed", type=int, help="Of what is drawn: controls and examples.  [default: a new one, named on stderr]"
)
json_option = click.option("--json", "report", type=FILE, help="Write what was found as JSON too.")
force_option = click.option("--force", is_flag=True, help="Replace files.")


def generator(chosen: Chosen, seed: int | None) -> tuple[int, np.random.Generator]:
    """The seed, said on stderr, and its generator."""
    taken = secrets.randbelow(2**32) if seed is None else seed
    if taken < 0:
        raise LookError(f"the seed is {taken}: give a whole number of at least 0")
    chosen.say(f"seed {taken}")
    return taken, np.random.default_rng(taken)


def write_json(report: Path | None, found: Any) -> None:
    if report is not None:
        put(report, (json.dumps(found, indent=1) + "\n").encode())


@click.command("neurons", short_help="Who is active over a text, and for what, beside what chance gives.")
@data_option
@click.option(
    "--also",
    multiple=True,
    type=FILE,
    help="Density of these checkpoints too, over training: earlier ones, or the folder of a run; may be repeated.",
)
@click.option(
    "--picture", "picture_to", type=FILE, help="Draw density by layer, head and position, over training, to this PNG."
)
@click.option(
    "--kind",
    type=click.Choice(("x_sparse", "y_sparse", "xy_sparse")),
    default="xy_sparse",
    show_default=True,
    help="Whose selectivity.",
)
@click.option("--max-bytes", default=16_384, show_default=True, help="How much of the text to read.")
@click.option("--window", default=256, show_default=True, help="Bytes that are read as one text.")
@click.option("--shifts", default=40, show_default=True, help="How often labels are shifted, as the control.")
@click.option(
    "--synapses",
    is_flag=True,
    help="Ask state entries too, in the first 2,048 bytes: minutes for a model of 400,000 parameters.",
)
@seed_option
@json_option
@force_option
@of_a_model
def neurons(
    chosen: Chosen,
    data: Path,
    also: tuple[Path, ...],
    picture_to: Path | None,
    kind: str,
    max_bytes: int,
    window: int,
    shifts: int,
    synapses: bool,
    seed: int | None,
    report: Path | None,
    force: bool,
) -> None:
    """How many neurons are active over a text, by layer, head and position, and what each is selective for.

    Selectivity is mutual information, in bits, between being active in a layer and what a byte is. Only what exceeds the most
    selective of all neurons in 95 of 100 shifts of the labels round the text is called selective.
    """
    from bdh_look import neurons as study

    for path in (report, picture_to):
        check_free(path, force)
    text, model = corpus.read_text(data, max_bytes), chosen.load()
    taken, rng = generator(chosen, seed)
    window = min(window, len(text))
    seen = study.activity(model, text, window, kind)
    found = study.selectivity(seen, rng, shifts)
    rows = study.predictability(seen, rng, shifts)
    said = study.summary(seen, found, rows) | {"seed": taken, "kind": kind, "model": chosen.name}
    show_density(chosen.name, said)
    earlier = [one for path in also for one in checkpoints_in(path)]
    said["also"] = {str(path): study.summary_of_density(study.activity(chosen.load(path), text, window)) for path in earlier}
    course = [(label(path), said["also"][str(path)]) for path in earlier]
    if chosen.checkpoint is None or chosen.checkpoint.resolve() not in {path.resolve() for path in earlier}:
        course.append((label(Path(chosen.name)), study.summary_of_density(seen)))
    show_training(course)
    if picture_to is not None:
        put(picture_to, study.picture(course))
    show(
        "Share of active neurons against the entropy of what is expected next (Spearman)",
        ("kind", "layer", "with entropy", "with loss", "chance gives up to"),
        [(r["kind"], r["layer"], r["with_entropy"], r["with_loss"], r["chance"]) for r in rows],
    )
    show(
        f"Selective {kind}, of {said['units']:,} (neuron, layer): bits known of a label, the best, and what chance gives",
        ("label", "share of bytes", "entropy", "best", "chance", "selective"),
        [(r["label"], percent(r["share"]), r["entropy"], r["best"], r["chance"], r["selective"]) for r in said["labels"]],
    )
    best, marks = study.most_selective(found), corpus.labels(seen.text)
    said["most_selective"] = [
        {
            "label": name,
            "unit": seen.name(unit),
            "when": study.when(seen, unit, marks[name]),
            "known": known,
            "chance": chance,
            "active": float(seen.active[unit].mean()),
            "contexts": [quoted(some) for some in study.contexts(seen, unit, rng)],
        }
        for name, unit, known, chance in best
    ]
    show(
        "The most selective: share of the label's entropy that it knows, by chance, and where it is active (at the last byte)",
        ("label", "neuron", "there", "knows", "chance", "active", "contexts, drawn at random"),
        [
            (
                r["label"],
                r["unit"],
                r["when"],
                percent(r["known"]),
                percent(r["chance"]),
                percent(r["active"]),
                " | ".join(r["contexts"]),
            )
            for r in said["most_selective"]
        ],
    )
    if synapses:
        entries = study.synapses(model, text[:2048], rng, min(window, 256))
        said["synapses"] = [r | {"contexts": [quoted(some) for some in r["contexts"]]} for r in entries]
        show(
            "State entries whose part in what is read goes most with a label (Pearson), and what chance gives",
            ("label", "synapse (layer, head, neuron, feature)", "r", "chance", "where most passes through (at the last byte)"),
            [(r["label"], str(r["synapse"]), r["r"], r["chance"], " | ".join(r["contexts"])) for r in said["synapses"]],
        )
    write_json(report, said)


def show_density(name: str, said: dict[str, Any]) -> None:
    kinds = ("x_sparse", "y_sparse", "xy_sparse")
    rows = [
        (layer, head, *(percent(said["density"][kind][layer][head]) for kind in kinds))
        for layer in range(said["layers"])
        for head in range(said["heads"])
    ]
    show(f"Active neurons of {name}, {said['bytes']:,} bytes in windows of {said['window']}", ("layer", "head", *kinds), rows)
    show(
        "By position",
        ("bytes", *kinds),
        [(f"{r['from']} to {r['to'] - 1}", *(percent(r[kind]) for kind in kinds)) for r in said["by_position"]],
    )


def show_training(course: list[tuple[str, dict[str, Any]]]) -> None:
    if len(course) < 2:
        return
    kinds = ("x_sparse", "y_sparse", "xy_sparse")
    rows = [
        (
            name,
            *(percent(found[kind]) for kind in kinds),
            " ".join(percent(float(np.mean(heads))) for heads in found["density"]["xy_sparse"]),
            found["bits"],
        )
        for name, found in course
    ]
    show("Over training", ("checkpoint", *kinds, "xy_sparse by layer", "bits per byte"), rows)


@click.command("graph", short_help="Who excites whom: degrees, tails and communities.")
@click.option("--edges", default=8.0, show_default=True, help="Edges per neuron on average: they set the threshold.")
@click.option("--graphml", "graphml_to", type=FILE, help="Write the graphs as GraphML to FILE.Gx.graphml and FILE.Gy.graphml.")
@click.option("--picture", "picture_to", type=FILE, help="Draw them to FILE.Gx.png and FILE.Gy.png.")
@click.option("--data", type=FILE, help="A text, to tell what the largest communities respond to.")
@click.option("--max-bytes", default=16_384, show_default=True, help="How much of that text to read.")
@click.option("--replicas", default=100, show_default=True, help="Synthetic tails for the goodness of the fit.")
@click.option("--controls", default=5, show_default=True, help="Graphs of the same degrees for the modularity.")
@seed_option
@json_option
@force_option
@of_a_model
def graph(
    chosen: Chosen,
    edges: float,
    graphml_to: Path | None,
    picture_to: Path | None,
    data: Path | None,
    max_bytes: int,
    replicas: int,
    controls: int,
    seed: int | None,
    report: Path | None,
    force: bool,
) -> None:
    """The graphs of neurons, Gx = encoder after decoder and Gy = encoder_v after decoder: degrees, tails, communities.

    Beside each stands the same of weights whose entries are shuffled. A tail is a power law if its goodness is 0.1 or more and
    no rival fits much better (z below -2).
    """
    from bdh_look import graph as study

    outputs = {
        (kind, end): path.with_name(f"{path.name}.{kind}.{end}")
        for path, end in ((graphml_to, "graphml"), (picture_to, "png"))
        if path is not None
        for kind in study.KINDS
    }
    for path in (report, *outputs.values()):
        check_free(path, force)
    if controls < 2:
        raise LookError(f"{controls} controls: two or more have a spread")
    params, config = chosen.read()
    taken, rng = generator(chosen, seed)
    seen = None
    if data is not None:
        from bdh_look import neurons as activities

        text = corpus.read_text(data, max_bytes)
        seen = activities.activity(chosen.load(), text, min(256, len(text)), "x_sparse")
    mixed = study.shuffled(params, rng)
    said: dict[str, Any] = {"model": chosen.name, "seed": taken, "edges": edges, "graphs": {}}
    for kind in study.KINDS:
        both = {"trained": study.graph(params, config, kind, edges), "shuffled": study.graph(mixed, config, kind, edges)}
        tails = {
            name: {way: tail_or_none(study, d, rng, replicas) for way, d in one.degrees.items()} for name, one in both.items()
        }
        show(
            f"{kind}: degrees, of {both['trained'].weights.shape[0]:,} neurons and {both['trained'].weights.nnz:,} edges",
            (
                "weights",
                "way",
                "mean",
                "largest",
                "none",
                "exponent",
                "from",
                "in tail",
                "goodness",
                "z to lognormal",
                "z to exponential",
            ),
            [degree_row(name, way, one.degrees[way], tails[name][way]) for name, one in both.items() for way in ("out", "in")],
        )
        found = {name: study.modules(one, rng, controls) for name, one in both.items()}
        show(
            f"{kind}: modularity, against {controls} graphs of the same degrees",
            ("weights", "modularity", "by chance", "z", "communities", "largest"),
            [
                (
                    name,
                    one.modularity,
                    float(np.mean(one.control)),
                    one.z,
                    sum(len(some) > 1 for some in one.communities),
                    len(one.communities[0]),
                )
                for name, one in found.items()
            ],
        )
        said["graphs"][kind] = {
            name: {
                "threshold": one.threshold,
                "edges": int(one.weights.nnz),
                "degrees": {way: {"largest": int(d.max()), "mean": float(d.mean())} for way, d in one.degrees.items()},
                "tails": {way: tail and vars(tail) for way, tail in tails[name].items()},
                "modularity": found[name].modularity,
                "modularity_of_same_degrees": list(found[name].control),
                "z": found[name].z,
                "communities": [len(some) for some in found[name].communities if len(some) > 1],
            }
            for name, one in both.items()
        }
        if seen is not None:
            rows = study.responses(found["trained"], seen, rng)
            said["graphs"][kind]["responses"] = rows
            show(
                f"{kind}: what the largest communities respond to, against as many neurons drawn at random",
                ("community", "neurons", "label", "active there, times the mean", "chance gives up to"),
                [(r["community"], r["neurons"], r["label"], r["times"], r["chance"]) for r in rows],
            )
        if (kind, "graphml") in outputs:
            put(outputs[kind, "graphml"], study.graphml(both["trained"], found["trained"]))
        if (kind, "png") in outputs:
            put(outputs[kind, "png"], study.picture(both["trained"], both["shuffled"], tails["trained"], found["trained"]))
    write_json(report, said)


def tail_or_none(study: Any, degrees: Array, rng: np.random.Generator, replicas: int) -> Any:
    try:
        return study.fit_tail(degrees, rng, replicas)
    except LookError:  # degrees that are all but alike have no tail
        return None


def degree_row(name: str, way: str, degrees: Array, tail: Any) -> tuple[Any, ...]:
    start = (name, way, float(degrees.mean()), int(degrees.max()), percent(float((degrees == 0).mean())))
    if tail is None:
        return (*start, *["-"] * 6)
    return (*start, tail.exponent, tail.start, tail.size, tail.goodness, tail.against_lognormal, tail.against_exponential)


@click.command("state", short_help="What is remembered of a text and how long, or two saved states compared.")
@click.argument("states", nargs=-1, type=FILE)
@click.option("--data", type=FILE, help="A text: norm and rank of the state over it, and how long a planted fact can be read.")
@click.option("--max-bytes", default=100_000, show_default=True, help="How much of the text to read.")
@click.option("--trials", default=12, show_default=True, help="Planted facts.")
@seed_option
@json_option
@force_option
@of_a_model
def state(
    chosen: Chosen,
    states: tuple[Path, ...],
    data: Path | None,
    max_bytes: int,
    trials: int,
    seed: int | None,
    report: Path | None,
    force: bool,
) -> None:
    """What a state holds over a text (--data FILE), or how two saved STATES differ.

    STATES are files of bdh-generate --save-state, of this model.
    """
    from bdh_look import state as study

    if bool(states) == (data is not None) or len(states) not in (0, 2):
        raise click.UsageError("give --data FILE, or two saved states")
    check_free(report, force)
    if states:
        params, config = chosen.read()
        one, other = (files.read_state(path, config, fingerprint(params, config.freqs))[0] for path in states)
        rows = study.difference(one, other)
        show(
            f"{states[0]} at byte {one.position:,}, {states[1]} at byte {other.position:,}",
            ("layer", "norm", "norm of the second", "of the difference", "cosine"),
            [(r["layer"], *r["norms"], r["cosine"]) for r in rows],
        )
        show(
            "Entries that differ most",
            ("layer", "head", "neuron", "feature", "from", "to"),
            [(r["layer"], *entry.values()) for r in rows for entry in r["largest"]],
        )
        write_json(report, {"states": [str(path) for path in states], "layers": rows})
        return
    assert data is not None
    if trials < 2:
        raise LookError(f"{trials} trials: two or more have an error")
    text, model = corpus.read_text(data, max_bytes), chosen.load()
    taken, rng = generator(chosen, seed)
    places = [p for k in range(3, 40) if (p := 2**k) < len(text)]
    rows = study.course(model, text, [*places, len(text)])
    layers = range(model.config.n_layer)
    means = [(r["bytes"], *(float(np.mean(r[name][i])) for name in ("norm", "rank") for i in layers)) for r in rows]
    titles = [f"{name} {i}" for name in ("norm", "rank") for i in layers]
    size = min(model.config.n_neurons, model.config.n_embd)
    show(
        f"The state over {len(text):,} bytes: norm and effective rank (of {size}) by layer, the mean of its heads",
        ("bytes", *titles),
        means,
    )
    distances = [0, *(p for p in places if p <= len(text) // 4)]
    said: dict[str, Any] = {"model": chosen.name, "seed": taken, "course": rows}
    for name, known in (("of random letters", False), ("of the text", True)):
        if known and len(study.vocabulary(text)) < 2:
            chosen.say("the text has no two words of 5 to 9 letters, so none of its words is planted")
            continue
        recalls = study.recall(model, text, distances, rng, trials, known=known)
        show(
            f"A planted word {name}: bits per byte that it costs less than one that was not planted, {trials} trials",
            ("bytes between", "gain", "standard error", "chance gives up to", "readable"),
            [(r.distance, r.gain, r.error, r.chance, "yes" if r.readable else "no") for r in recalls],
        )
        said[f"recall of a word {name}"] = [vars(r) | {"readable": r.readable} for r in recalls]
    write_json(report, said)
