"""Where in a file the weights are: the tensors that bear BDH's names, and fit together, under one common prefix.

The rule looks through any mappings and modules around them. What compilers and parallel wrappers put into names is no part
of them: such a part is private, so that it begins with an underscore, or it is ``module``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from bdh_convert.dialects import DIALECTS
from bdh_convert.tensors import Tensor, Unreadable
from bdh_convert.vocabulary import is_a_tensor_of_training, is_an_optimizers
from bdh_spec.errors import CheckpointError, ParamsError
from bdh_spec.files import shown
from bdh_spec.params import Params

Path: TypeAlias = tuple[str, ...]  # the keys of nested mappings that lead to an entry

LAYOUTS = tuple({dialect.names: None for dialect in DIALECTS.values()})  # each way to name the five, once
ENDINGS: dict[Path, list[tuple[Params, str]]] = {}  # how the names of entries end that are weights of a layout
for _layout in LAYOUTS:
    for _name in _layout:
        ENDINGS.setdefault(tuple(_name.split(".")), []).append((_layout, _name))
LENGTHS = sorted({len(ending) for ending in ENDINGS})
ENOUGH = 3  # names of a layout by which a file is taken for one that lacks the others
DEEPEST = 32

FREQS = re.compile(r"(.*\.)?freqs")

# What the name of a tensor tells of another model.
OTHERS = (
    (re.compile(r".*alibi.*"), "alibi"),
    (re.compile(r"(.*\.)?(layers|blocks|encoders?|encoders?_v|decoders?)\.\d+(\..*)?"), "weights per layer"),
    (re.compile(r"(.*\.)?(ln|norm|layer_?norm)\w*\.(weight|bias|gamma|beta|scale)"), "affine norms"),
    (re.compile(r".*bias"), "biases"),
    (re.compile(r"(.*\.)?(wpe|pos_?emb\w*|position_emb\w*)(\..*)?"), "learned positions"),
)


@dataclass(frozen=True)
class Entry:
    """One thing in a file, with the parts of its name that are its own."""

    path: Path
    parts: Path
    value: Any

    @property
    def name(self) -> str:
        return ".".join(self.parts)

    @property
    def home(self) -> Path:
        """The mapping that it is in."""
        return self.path[:-1]


@dataclass
class Candidate:
    """Entries that bear a layout's names under one prefix."""

    layout: Params
    prefix: Path
    named: dict[str, list[Entry]] = field(default_factory=dict)  # by the layout's names

    @property
    def label(self) -> str:
        """What the user calls it."""
        return ".".join(self.prefix) or "."

    def is_whole(self) -> bool:
        """Whether every name is there, but for a head that transformers ties to the embedding."""
        tied = {self.layout.lm_head} if self.layout == DIALECTS["hf"].names else set()
        return all(self._tensor(name) for name in self.layout if name not in tied)

    def _tensor(self, name: str) -> Tensor | None:
        return next((entry.value for entry in self.named.get(name, []) if isinstance(entry.value, Tensor)), None)

    def entries(self) -> set[Path]:
        """Where in the file they are."""
        return {entry.path for of_name in self.named.values() for entry in of_name}

    def count(self) -> int:
        """How many names stand for numbers, readable or not."""
        return sum(not all(_is_plain(entry.value) for entry in of_name) for of_name in self.named.values())

    def fits(self) -> bool:
        """Whether the shapes are those of one model."""
        shapes = [tensor.shape if (tensor := self._tensor(name)) else None for name in self.layout]
        embed, encoder, encoder_v, decoder, head = shapes
        if embed is None or encoder is None or len(embed) != 2 or len(encoder) != 3:
            return False
        (V, D), (nh, _, N) = embed, encoder
        square = head is None or sorted(head) == sorted((D, V))
        return encoder == encoder_v == (nh, D, N) and decoder == (nh * N, D) and square

    def order(self) -> tuple[bool, bool, int, int]:
        """What makes one candidate more likely than another."""
        return self.is_whole(), self.fits(), self.count(), sum(name.count(".") for name in self.layout)


@dataclass(frozen=True)
class Found:
    """The weights of a file, under the names of their layout, and what lies around them."""

    layout: Params
    prefix: str
    home: Path
    tensors: dict[str, Tensor]  # the weights, and all else under their prefix or in their mapping that is no bookkeeping
    tables: tuple[str, ...]  # those that are frequencies
    ignored: tuple[str, ...]  # what is about training, or another set


def entries(tree: Mapping[Any, Any]) -> Iterator[Entry]:
    """Everything in nested mappings and lists, each mapping once however often it is referred to."""
    seen: set[int] = set()
    open_: list[tuple[Path, Any]] = [((), tree)]
    while open_:
        path, value = open_.pop()
        inner = children(value) if len(path) < DEEPEST else None
        if inner is None:
            yield Entry(path, _own_parts(path), value)
        elif id(value) not in seen:
            seen.add(id(value))
            open_ += [((*path, str(key)), child) for key, child in reversed(inner)]


def children(value: Any) -> list[tuple[Any, Any]] | None:
    """What a mapping holds, or a list of mappings, tensors or named tensors, by key; None for all else."""
    if isinstance(value, Mapping):
        return list(value.items())
    if not isinstance(value, (list, tuple)):
        return None
    if value and all(isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Tensor) for item in value):
        return [(name, tensor) for name, tensor in value]
    return list(enumerate(value)) if any(isinstance(item, (Mapping, Tensor)) for item in value) else None


SEPARATORS = re.compile(r"\.|/|'\]\['|^\['|'\]$")  # of torch and MLX, of Flax, and of JAX's keystr


def _own_parts(path: Path) -> Path:
    parts = [part for key in path for part in SEPARATORS.split(key) if part or key == part]
    return tuple(part for part in parts[:-1] if not part.startswith("_") and part != "module") + tuple(parts[-1:])


def candidates(found: Iterable[Entry]) -> list[Candidate]:
    """Every prefix under which names of a layout stand, the likeliest first."""
    sets: dict[tuple[Params, Path], Candidate] = {}
    for entry in found:
        if any(map(is_an_optimizers, entry.parts[:-1])):
            continue
        for length in LENGTHS:
            for layout, name in ENDINGS.get(entry.parts[-length:], []):
                prefix = entry.parts[:-length]
                candidate = sets.setdefault((layout, prefix), Candidate(layout, prefix))
                candidate.named.setdefault(name, []).append(entry)
    listing = DIALECTS["paper"].names
    sound = (candidate for candidate in sets.values() if candidate.layout != listing or _is_listing(candidate))
    return sorted(sound, key=Candidate.order, reverse=True)


def _is_listing(candidate: Candidate) -> bool:
    """The listing's ``encoder`` is our decoder, which its rank tells."""
    tensors = [entry.value for entry in candidate.named.get(candidate.layout.decoder, [])]
    return all(isinstance(tensor, Tensor) and len(tensor.shape) == 2 for tensor in tensors)


def has_weights(tree: Mapping[Any, Any]) -> bool:
    """Whether a file holds a whole set of weights."""
    return any(candidate.is_whole() for candidate in candidates(entries(tree)))


def find(tree: Mapping[Any, Any], wanted: str | None = None) -> Found:
    """The set of weights in a file; where there are several, the one under the prefix ``wanted``."""
    everything = list(entries(tree))
    found = candidates(everything)
    whole = _largest([candidate for candidate in found if candidate.is_whole()])
    fitting = [candidate for candidate in whole if candidate.fits()]
    chosen = _choose(fitting or whole or found[:1], wanted)
    if chosen is None or chosen.count() < ENOUGH:
        raise CheckpointError(_nothing_in(everything))
    return _sorted_out(chosen, everything, whole)


def _nothing_in(everything: Sequence[Entry]) -> str:
    """Why a file without weights is none of BDH: an object that holds them, or other names."""
    names = [entry.name for entry in everything if isinstance(entry.value, Tensor)]
    module = next((entry for entry in everything if isinstance(entry.value, Unreadable) and entry.value.is_module()), None)
    if module and not names:
        pickled = f"{shown(module.name, 80)} as a pickled {shown(module.value.qualified, 80)} object"
        return f"the file holds {pickled}: save its state_dict() instead"
    return (
        f"the file holds {some(names or [entry.name for entry in everything]) or 'nothing'}: no dialect of BDH has these names"
    )


def _largest(whole: Sequence[Candidate]) -> list[Candidate]:
    """Those that are no part of another, as a set without its head is."""
    entries = {id(candidate): candidate.entries() for candidate in whole}
    return [candidate for candidate in whole if not any(entries[id(candidate)] < other for other in entries.values())]


def _choose(found: Sequence[Candidate], wanted: str | None) -> Candidate | None:
    named = {candidate.label: candidate for candidate in reversed(found)}
    labels = some(list(dict.fromkeys(candidate.label for candidate in found)))
    if wanted is not None:
        plain = ".".join(_own_parts((*wanted.split("."), ""))[:-1]) or "."
        meant = [label for label in named if label == plain] or [label for label in named if label.endswith(f".{plain}")]
        if len(meant) != 1:
            raise ParamsError(f"no weights are named {shown(wanted, 80)}: there are {labels}")
        return named[meant[0]]
    if len(named) > 1:
        raise ParamsError(
            f"the file holds several sets of weights, {labels}:"
            f" bdh-convert --weights {shown(found[0].label, 80)} takes the first"
        )
    return found[0] if found else None


def _sorted_out(chosen: Candidate, everything: Sequence[Entry], whole: Sequence[Candidate]) -> Found:
    """Every entry of the file as a weight, a table, something left alone, or something that nobody knows."""
    home = _common([entry.home for of_name in chosen.named.values() for entry in of_name])
    prefixes = sorted({candidate.prefix for candidate in whole}, key=len, reverse=True)
    tensors: dict[str, Tensor] = {}
    tables, ignored = [], []
    for entry in everything:
        name = _name_in(chosen.prefix, entry)
        owner = next((prefix for prefix in prefixes if entry.parts[: len(prefix)] == prefix), chosen.prefix)
        table = FREQS.fullmatch(name) is not None and not any(map(is_an_optimizers, entry.parts[:-1]))
        known = table or name in chosen.layout
        if owner != chosen.prefix or not (table or entry.path[: len(home)] == home) or _is_plain(entry.value):
            ignored.append(entry.path[0])
        elif isinstance(entry.value, Unreadable) and known:
            raise CheckpointError(
                f"the file holds {shown(name, 80)} as {shown(entry.value.qualified, 80)}, which is no array of floating point"
                " numbers: save a state_dict() of whole tensors in float32 or bfloat16"
            )
        elif isinstance(entry.value, Unreadable) or (not known and _is_bookkeeping(name, entry.value)):
            ignored.append(name.split(".")[0] if is_a_tensor_of_training(name) else name)
        elif name in tensors:
            raise ParamsError(f"the file holds {shown(name, 80)} more than once, in different wrappings: remove all but one")
        else:
            tensors[name] = entry.value.named(name)
            tables += [name] * table
    return Found(chosen.layout, chosen.label, home, tensors, tuple(tables), tuple(dict.fromkeys(ignored)))


def _name_in(prefix: Path, entry: Entry) -> str:
    """An entry's name as seen from where its way parts from that to the weights."""
    under = entry.parts[: len(prefix)] == prefix
    shared = len(prefix) if under else len(_common([prefix, entry.parts[:-1]]))
    return ".".join(entry.parts[shared:])


def _is_plain(value: Any) -> bool:
    return not isinstance(value, (Tensor, Unreadable))


def _common(homes: Sequence[Path]) -> Path:
    """The innermost mapping that holds all of them."""
    first, last = min(homes), max(homes)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]


def _is_bookkeeping(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is a random state, a counter, or named as something of the training."""
    counts = tensor.dtype.kind in "iu" and math.prod(tensor.shape) == 1
    random = tensor.dtype == np.uint8 and len(tensor.shape) == 1 and "mask" not in name
    return counts or random or is_a_tensor_of_training(name)


def complain(unknown: Iterable[str]) -> str:
    """Why tensors that no dialect has make a file another model's."""
    unknown = list(unknown)
    for pattern, switch in OTHERS:
        if named := [name for name in unknown if pattern.fullmatch(name)]:
            return f"the file holds {shown(named[0], 80)}, a sign of {switch}, which BDH has not: this is another model"
    return f"the file holds {some(unknown)}, which no dialect of BDH has: this is another model"


def some(names: Sequence[str], most: int = 8) -> str:
    """A few names, each of bounded length, and how many more there are."""
    few = ", ".join(shown(name, 80) for name in names[:most])
    return few + (f" and {len(names) - most:,} more" if len(names) > most else "")
