"""The recurrent form: states, one text in pieces of all kinds, positions far from the start."""

from __future__ import annotations

from itertools import accumulate

import numpy as np

from bdh_conformance.channels.channel import Observed, scalar
from bdh_conformance.yardstick.agreement import by_pair
from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.sizes import LONG, in_reads_of, pieces, turns
from bdh_spec import Model, RecurrentState, State
from bdh_spec.params import Array
from bdh_spec.rope import Phase

# Where positions of 8, 15, 16, 31 and 32 bits end, a float32 product loses the phase, and float32 and float64 stop counting.
POSITIONS: dict[Phase, tuple[int, ...]] = {
    "exact": (0, 300, 5053, 10**4, 40_000, 70_000, 10**6, 2**24 + 1, 2**31 + 5, 2**32 + 7, 2**40, 2**53 + 3, 2**62 + 9),
    "float32": (0, 300, 5053, 10**4, 40_000, 70_000, 10**6, 2**24 - 64),
}
EDGES: dict[Phase, tuple[int, ...]] = {"exact": (2**16, 2**24, 2**31, 2**32), "float32": (2**16,)}  # that lie within a piece
LONGEST = 62  # binary digits of the positions that are drawn

SHORT = 5  # tokens
FULL = 500.0  # how much more a full state holds than a fresh one: a narrower sum loses what is added to it


def observe_states(model: Model, case: Case) -> Observed:
    """The state of the beginning of a text and of all of it, carried over by export and import in between.

    And what a text adds to a state that is full already: all of it has to arrive (R13).
    """
    T, state = case.time, model.init_state(case.batch)
    first = max(turns(case))[0] if T > LONG else T // 2 or 1
    logits, state = model.advance(state, case.tokens[:, :first])
    begun = model.export_state(state)
    seen = {"begun.logits": logits} | memories("begun", begun)
    if first < T:
        state, middle = model.import_state(begun), first + SHORT
        if middle < T:  # a short turn after a long one
            state = model.advance(state, case.tokens[:, first:middle])[1]
        logits, state = model.advance(state, case.tokens[:, middle if middle < T else first :])
        seen |= {"whole.logits": logits} | memories("whole", model.export_state(state))
    full = RecurrentState(state.position, tuple(FULL * memory for memory in begun.layers))
    logits, later = model.advance(model.import_state(full), case.tokens)
    return seen | {"added.logits": logits, "position": scalar(state.position)} | growth(full, model.export_state(later))


def growth(before: RecurrentState, after: RecurrentState) -> Observed:
    """What was added to a state, by layer."""
    pairs = zip(before.layers, after.layers, strict=True)
    return {f"added.layers.{i}.state_by_pair": by_pair(new - old) for i, (old, new) in enumerate(pairs)}


def memories(prefix: str, state: RecurrentState) -> Observed:
    """A state's matrices by layer."""
    return {f"{prefix}.layers.{i}.state_by_pair": by_pair(memory) for i, memory in enumerate(state.layers)}


def observe_decode(model: Model, case: Case) -> Observed:
    """The logits of one text, read in all the ways that a port can be asked to read it."""
    T = case.time
    seen = {f"{name}.logits": read(model, case.tokens, plan) for name, plan in plans(case).items()}
    if T > 1:
        start = model.advance(model.init_state(case.batch), case.tokens[:, :-1])[1]
        for name, last in (("again", case.tokens[:, -1:]), ("branch", case.tokens[:, :1]), ("back", case.tokens[:, -1:])):
            seen[f"{name}.logits"] = model.advance(start, last)[0]
    begun: dict[int, State] = {}
    for first, both in turns(case):
        if first not in begun:
            begun[first] = model.advance(model.init_state(case.batch), case.tokens[:, :first])[1]
        logits, state = model.advance(begun[first], case.tokens[:, first:both])
        seen[f"turn_{first}_{both}.logits"] = logits
        seen[f"after_{first}_{both}.logits"] = model.advance(state, case.tokens[:, both : both + 1])[0]
    return seen


def decode_reference(model: Model, case: Case) -> Observed:
    """The same logits, read in one way."""
    if case.time == 1:
        logits, _ = model.advance(model.init_state(case.batch), case.tokens)
        return {f"{way}.logits": logits for way in plans(case)}
    before, state = model.advance(model.init_state(case.batch), case.tokens[:, :-1])
    last, other = (model.advance(state, token)[0] for token in (case.tokens[:, -1:], case.tokens[:, :1]))
    logits = np.concatenate([before, last], axis=1)
    seen = {f"{way}.logits": logits for way in plans(case)}
    seen |= {"again.logits": last, "branch.logits": other, "back.logits": last}
    for first, both in turns(case):
        seen[f"turn_{first}_{both}.logits"] = logits[:, first:both]
        seen[f"after_{first}_{both}.logits"] = logits[:, both : both + 1]
    return seen


def plans(case: Case) -> dict[str, tuple[int, ...]]:
    """Ways to read a text, as the lengths of its pieces."""
    T = case.time
    ways = {"whole": (T,), "prefill": (T - 1, 1), "ones": (1,) * T}
    if T <= LONG:
        ways["ragged"] = ragged(T)
    else:
        ways["pieces"] = pieces(case)
        ways |= {f"reads_of_{size}": in_reads_of(size, T) for size in (64, 100, 128, 256, 300, 512, 1000, 1024) if size < T}
    return {name: way for name, way in ways.items() if 0 not in way}


def ragged(T: int) -> tuple[int, ...]:
    """Pieces of 2, 3, 1, 2, 3, 1, ... tokens: the state is read after pieces of every kind."""
    lengths: list[int] = []
    while sum(lengths) < T:
        lengths.append(min((2, 3, 1)[len(lengths) % 3], T - sum(lengths)))
    return tuple(lengths)


def read(model: Model, tokens: Array, plan: tuple[int, ...]) -> Array:
    """The logits of tokens (B, T) read in pieces, the state of each piece given away to the next."""
    state, logits = model.init_state(tokens.shape[0]), []
    for end, length in zip(accumulate(plan), plan, strict=True):
        part, state = model.advance(state, tokens[:, end - length : end], donate=True)
        logits.append(part)
    return np.concatenate(logits, axis=1)


def observe_phases(model: Model, case: Case) -> Observed:
    """What a model that remembers the start of the text says of the rest, if that follows a long time later."""
    half = case.time // 2
    begun = model.export_state(model.advance(model.init_state(case.batch), case.tokens[:, :half])[1])
    seen: Observed = {}
    for start in starts(case, model.phase):
        later = model.import_state(RecurrentState(start + half, begun.layers))
        logits, state = model.advance(later, case.tokens[:, half:])
        after = model.export_state(state)
        seen |= {f"at_{start}.logits": logits} | memories(f"at_{start}", after)
        seen[f"at_{start}.read"] = scalar(after.position - start)
    return seen


def starts(case: Case, phase: Phase) -> list[int]:
    """Positions of a text's first token, in order: fixed ones, edges in its second half, and drawn ones."""
    rng, half = np.random.default_rng(case.seed), case.time // 2
    near, far = 2 ** rng.uniform(10, 20, 2), 2 ** rng.uniform(20, LONGEST, 2)
    drawn = [int(position) for position in (*near, *far)] if phase == "exact" else []
    edges = [edge - half - 1 for edge in EDGES[phase]]
    return sorted({*POSITIONS[phase], *edges, *drawn})
