"""From what a file holds to a checkpoint of ours, step by step: opening raises what a step raises, inspection collects it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from bdh_convert import containers, tokenizer
from bdh_convert.configs import complete, is_a_configuration, is_tied, refuse_alibi, unreadable_in, written_in
from bdh_convert.dialects import DIALECTS, GATE, Dialect, from_dialect, speaker
from bdh_convert.find import complain, find, some
from bdh_convert.frequencies import as_frequencies, deviation, is_the_table, values_of
from bdh_convert.metadata import parse_config
from bdh_convert.raw import read_small
from bdh_convert.scaled import join, speaks_int8
from bdh_convert.tensors import FLOATS, Contents, Tensor
from bdh_spec.config import BDHConfig
from bdh_spec.errors import ParamsError
from bdh_spec.params import Array, Params, check_params, shapes
from bdh_spec.registry import Freqs


@dataclass(frozen=True)
class Wishes:
    """What a user can say of a file that does not say it, or says more than one thing."""

    dialect: str | None = None
    weights: str | None = None  # the prefix of the set to take, where a file holds several
    n_layer: int | None = None
    dropout: float | None = None
    freqs: Freqs | None = None


NOTHING_SAID = Wishes()


@dataclass
class Draft:
    """A checkpoint as far as it is understood."""

    contents: Contents
    wishes: Wishes
    tensors: dict[str, Tensor] = field(default_factory=dict)
    tables: list[Tensor] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what the user should know of how the file was read
    dialect: Dialect | None = None
    weights: Params | None = None  # of Tensor
    config: BDHConfig | None = None
    own: Array | None = None  # frequencies (N,) that the file holds and that are not BDH's
    undecided: bool = False  # whether the user has to say what becomes of them


@dataclass(frozen=True)
class Step:
    """One thing to understand, once the fields of a draft that it builds on are there."""

    take: Callable[[Draft], None]
    needs: tuple[str, ...] = ()

    def is_ready(self, draft: Draft) -> bool:
        return all(getattr(draft, name) is not None for name in self.needs)


def begin(path: Path, wishes: Wishes) -> Draft:
    """What a path holds, of which nothing is understood yet."""
    contents = containers.read(path)
    return Draft(contents, wishes, {name: tensor for name, tensor in contents.tree.items() if isinstance(tensor, Tensor)})


def find_weights(draft: Draft) -> None:
    """The one set of tensors with BDH's names, and whose dialect they are."""
    contents, wishes = draft.contents, draft.wishes
    found = find(contents.tree, wishes.weights)
    draft.tensors = found.tensors
    draft.tables = [found.tensors[name] for name in found.tables]
    draft.dialect = speaker(found.layout, contents.container, wishes.dialect or contents.dialect)
    if wishes.dialect and draft.dialect.name != wishes.dialect:
        raise ParamsError(
            f"the file holds the names of {draft.dialect.name}, not of {wishes.dialect}: say {draft.dialect.name} or nothing"
        )
    config = contents.config or written_in(contents.tree, found.home)
    draft.contents = replace(contents, config=config)
    known = [name for name in found.ignored if not is_a_configuration(name, contents.tree)]
    draft.notes += [f"left out, being no weights: {some(known)}"] if known else []
    if unreadable := unreadable_in(contents.tree):
        draft.notes.append(f"nothing can be read of {some(unreadable)}: give what it says of the model, and look what it was")


def join_scales(draft: Draft) -> None:
    """A weight in int8 and its scales are one."""
    assert draft.dialect is not None
    int8, wish = DIALECTS["int8"], draft.wishes.dialect
    if draft.dialect.names != int8.names or not (draft.dialect.is_int8 or speaks_int8(draft.tensors)):
        return
    if wish not in (None, int8.name):
        raise ParamsError(f"the file holds weights in int8, and {wish} files hold none: say int8 or nothing")
    if not speaks_int8(draft.tensors):
        raise ParamsError("the file holds no weights in int8: say whose it is, or nothing")
    draft.dialect = int8
    draft.tensors, wrong = join(draft.tensors)
    if wrong:
        raise ParamsError(wrong[0])


def look_beside(draft: Draft) -> None:
    """What a file does not say itself stands in a config.json beside it: its configuration, and whose tokens it reads."""
    contents = draft.contents
    if contents.path.is_dir():
        draft.contents = tokenizer.with_tokenizer(contents, contents.path)
    elif contents.config is None:
        beside = contents.path.parent / "config.json"
        config = parse_config(beside, read_small(beside)) if beside.is_file() else None
        draft.contents = tokenizer.with_tokenizer(replace(contents, config=config), beside.parent)
    draft.notes += tokenizer.notes(draft.contents.tokenizer)


def refuse_positions(draft: Draft) -> None:
    """burn's default is another model."""
    if draft.dialect == DIALECTS["burn"]:
        refuse_alibi(draft.contents.config)


def complete_head(draft: Draft) -> None:
    """transformers leaves a head out that is tied to the embedding, and ties where a configuration is silent."""
    if draft.dialect != DIALECTS["hf"]:
        return
    embed, head = draft.dialect.names.embed, draft.dialect.names.lm_head
    tied, tensors = is_tied(draft.contents.config), draft.tensors
    if head not in tensors and tied is not False and embed in tensors:
        draft.notes.append("the head is tied to the embedding and absent: it is written out as the embedding's transpose")
        draft.tensors = tensors | {head: tensors[embed].named(head)}
    elif {embed, head} <= set(tensors) and tied and not np.array_equal(tensors[head].load(), tensors[embed].load()):
        raise ParamsError(
            f"config.json ties the head to the embedding, but {head} differs from it: set tie_word_embeddings to what is right"
        )


def refuse_strangers(draft: Draft) -> None:
    """Tensors that are no weights, no frequencies and no bookkeeping make a file another model's."""
    assert draft.dialect is not None
    known = {*draft.dialect.names, *(table.name for table in draft.tables)}
    rest = [name for name in draft.tensors if name not in known]
    draft.notes += [f"{GATE} is left out: no equation uses it"] if GATE in rest else []
    if unknown := [name for name in rest if name != GATE]:
        raise ParamsError(complain(unknown))


def name_weights(draft: Draft) -> None:
    """The five weights by our names; those with an axis more are one set per layer."""
    assert draft.dialect is not None
    weights = from_dialect(draft.dialect, draft.tensors)
    if len(weights.encoder.shape) == 4:
        raise ParamsError(
            f"encoder has shape {weights.encoder.shape}, weights per layer, which BDH has not: this is another model"
        )
    draft.weights = weights


def complete_config(draft: Draft) -> None:
    """The six numbers, from whoever tells them."""
    assert draft.weights is not None
    sizes, wishes = Params(*(weight.shape for weight in draft.weights)), draft.wishes
    draft.config, notes = complete(draft.contents.config, sizes, wishes.n_layer, wishes.dropout)
    draft.notes += notes


def check_layout(draft: Draft) -> None:
    """Refuse shapes and dtypes that do not fit, with a word where a matrix only lies on its side."""
    assert draft.weights is not None
    assert draft.config is not None
    for weight, shape in zip(draft.weights, shapes(draft.config), strict=True):
        if weight.shape != shape and weight.shape == shape[::-1] and len(shape) == 2:
            raise ParamsError(
                f"{weight.name} has shape {weight.shape}, its dialect stores {shape}: it is transposed, so mend the file"
            )
        if weight.dtype not in FLOATS:
            raise ParamsError(f"{weight.name} has dtype {weight.dtype}: weights are float64, float32, float16 or bfloat16")
    check_params(draft.weights, draft.config)


def decide_frequencies(draft: Draft) -> None:
    """BDH's table is one for all. A canonical file's own is part of its model; any other was trained by accident.

    What to do with that the user decides: whether the model computes by it, or by BDH's.
    """
    assert draft.config is not None
    config, tables = draft.config, [(stored, values_of(stored, draft.config)) for stored in draft.tables]
    foreign = next((pair for pair in tables if not is_the_table(pair[0], config)), None)
    if foreign is None:
        return
    name, own = foreign[0].name, foreign[1]
    off = f"{name} differs from BDH's frequency table by up to {deviation(foreign[0], config):.3g} of a value"
    wish = draft.wishes.freqs or ("keep" if describes_itself(draft, foreign[0]) else None)
    if wish is None:
        draft.undecided = True
        raise ParamsError(
            f"{off}, so it was trained or belongs to another model: --freqs reset takes BDH's table, which changes what the"
            " model computes, --freqs keep this one (in Python freqs=)"
        )
    if other := next((stored for stored, values in tables if not np.array_equal(values, own, equal_nan=True)), None):
        raise ParamsError(f"{other.name} and {name} differ, and BDH has one table for all layers: this is another model")
    draft.own = own
    if wish == "keep":
        draft.config = replace(config, freqs=as_frequencies(name, own))
        draft.notes.append(f"{off}: it is kept, the model computes by it, and the result is not BDH by the published table")
    else:
        draft.notes.append(f"{off}: BDH's table is written instead, which changes what the model computes")


def describes_itself(draft: Draft, stored: Tensor) -> bool:
    """Whether a table is one that our canonical files carry."""
    assert draft.dialect is not None
    return draft.contents.is_ours and stored.name == draft.dialect.own_freqs


STEPS: Sequence[Step] = (
    Step(find_weights),
    Step(join_scales, ("dialect",)),
    Step(look_beside),
    Step(refuse_positions, ("dialect",)),
    Step(complete_head, ("dialect",)),
    Step(refuse_strangers, ("dialect",)),
    Step(name_weights, ("dialect",)),
    Step(complete_config, ("weights",)),
    Step(check_layout, ("weights", "config")),
    Step(decide_frequencies, ("config",)),
)
