"""R14 across ports: do they write one text from one seed, and where they do not, was the draw too close to call?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bdh_conformance.channels.loading import claims
from bdh_conformance.yardstick.agreement import Comparison
from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.reference import Specification
from bdh_conformance.yardstick.tolerances import FACTOR, FLOOR
from bdh_spec.dtypes import numpy_dtype
from bdh_spec.numpy_backend import NumpyBackend
from bdh_spec.params import Array, cast
from bdh_spec.protocol import Model
from bdh_spec.rope import Phase
from bdh_spec.sampling import Sampling, probabilities, sample, uniform

# How texts are drawn; the case's own seed is added to the seed of each.
SETTINGS = (
    Sampling(1.0, None, 0),
    Sampling(0.8, 3, 1),
    Sampling(2.0, 0, 2**63),
    Sampling(1.0, 1, 2),
    Sampling(0.0, None, 3),
    Sampling(0.0, 2, 4),
    Sampling(3.0, 2, 5),
    Sampling(1e-6, None, 6),
    Sampling(1e6, None, 7),
    Sampling(1.0, 10**6, 8),
)
PLAIN = SETTINGS[0]
NEW = 8
LONG_TEXT = 300
LETTERS = "Drachenblüte, дракон, 龍 ☃ "
PERTURBATIONS = 64
MOST_SHOWN = 8  # candidates


@dataclass(frozen=True)
class Difference:
    """The first token at which a port's text leaves the specification's."""

    row: int
    position: int
    gap: float  # from the draw to the nearest edge between two candidates, in probability
    rounding: float  # how far float32 rounding of the specification moves those edges there


def differences(port: Model, reference: Model, prompts: Array, new: int, how: Sampling) -> list[Difference]:
    """Where texts of ``port`` part from those of ``reference``, the float64 specification; prompts (B, T)."""
    written, expected = (generated(model, prompts, new, how) for model in (port, reference))
    rows = np.flatnonzero((written != expected).any(axis=1))
    return [part(reference, expected[row], written[row], int(row), how) for row in rows]


def part(reference: Model, expected: Array, written: Array, row: int, how: Sampling) -> Difference:
    """The first difference between two texts, and how close the draw that made it was."""
    position = int(np.argmax(expected != written))
    before = expected[None, :position]
    edges = cumulative(reference.forward(before)[0, -1], how)
    rounded = cumulative(float32_of(reference).forward(before)[0, -1], how)
    gap = float(np.abs(edges - uniform(how.seed, position, row)).min())
    return Difference(row, position, gap, float(np.abs(edges - rounded).max()))


def cumulative(logits: Array, how: Sampling) -> Array:
    """The edges between candidates, from 0 to 1."""
    edges: Array = np.cumsum(probabilities(logits, how))
    return edges


def float32_of(reference: Model) -> Model:
    """The specification in float32 with the same weights."""
    return NumpyBackend().load(reference.params(), reference.config, dtype="float32", phase=reference.phase)


def generated(model: Model, tokens: Array, new: int, how: Sampling) -> Array:
    """Tokens (B, T) and their continuation."""
    return model.generate(tokens, new, how.temperature, how.top_k, how.seed)


def name(setting: Sampling) -> str:
    """What a report calls the texts of a setting."""
    return f"temperature_{setting.temperature}_top_k_{setting.top_k}"


def written(model: Model, case: Case) -> dict[str, Array]:
    """The texts that a model writes on a case's tokens: by setting, then by each way of asking for the same text."""
    texts = {name(setting): write(model, case.tokens, NEW, setting, case) for setting in settings(case)}
    texts |= {key: way(model, case) for key, way in ways(case).items()}
    far = FAR[model.phase] if claims(model, "state") else ()
    return texts | {f"from_{position}": from_afar(model, case, position) for position in far}


def settings(case: Case) -> tuple[Sampling, ...]:
    """The settings, and one that keeps exactly as many candidates as there are."""
    return (*SETTINGS, Sampling(1.0, case.config.vocab_size, 9))


def write(model: Model, tokens: Array, new: int, setting: Sampling, case: Case) -> Array:
    """Tokens (B, T) and their continuation in a setting of this case."""
    return generated(model, tokens, new, seeded(setting, case))


def seeded(setting: Sampling, case: Case) -> Sampling:
    """A setting with the seed that a case gives it."""
    return replace(setting, seed=case.seed + setting.seed)


def again(model: Model, case: Case) -> Array:
    """A second text of the same seed: draws go by the position and not by the call."""
    write(model, case.tokens, 3, PLAIN, case)
    return write(model, case.tokens, NEW, PLAIN, case)


def token_by_token(model: Model, case: Case) -> Array:
    """One new token at a time, the text so far as the prompt."""
    tokens = case.tokens
    for _ in range(NEW):
        tokens = write(model, tokens, 1, PLAIN, case)
    return tokens


def nothing_new(model: Model, case: Case) -> Array:
    """No new token at all, then the rest."""
    return write(model, write(model, case.tokens, 0, PLAIN, case), NEW, PLAIN, case)


def from_a_state(model: Model, case: Case) -> Array:
    """The end of the prompt on a state of its beginning; then on, from the last state and the token that it has not read."""
    tokens, half = case.tokens, case.time // 2
    state = model.advance(model.init_state(case.batch), tokens[:, :half])[1] if half else None
    new: list[Array] = []
    pending = tokens[:, half:]
    for count in (3, NEW - 3):
        steps = list(model.stream(pending, count, 1.0, None, case.seed, state=state))
        new += [np.asarray(chosen)[:, None] for chosen, _ in steps]
        state = steps[-1][1]
        pending = new[-1]
    return np.concatenate([tokens, *new], axis=1)


def of_a_prompt_in_two(model: Model, case: Case) -> Array:
    """A prompt of which all but the first token is read by stream, from the state of the first."""
    tokens = case.tokens
    if case.time == 1:
        return write(model, tokens, NEW, PLAIN, case)
    state = model.advance(model.init_state(case.batch), tokens[:, :1])[1]
    new = [np.array(chosen)[:, None] for chosen, _ in model.stream(tokens[:, 1:], NEW, 1.0, None, case.seed, state=state)]
    return np.concatenate([tokens, *new], axis=1)


def kept(model: Model, case: Case) -> Array:
    """All tokens of a stream, looked at when it has ended."""
    new = [chosen for chosen, _ in list(model.stream(case.tokens, NEW, 1.0, None, case.seed))]
    return np.concatenate([case.tokens, np.stack(new, axis=1)], axis=1)


def from_afar(model: Model, case: Case, position: int) -> Array:
    """A text that goes on from a state far from its start: as its new tokens, behind the prompt."""
    exported = model.export_state(model.advance(model.init_state(case.batch), case.tokens)[1])
    state = model.import_state(replace(exported, position=position))
    new = [np.array(chosen)[:, None] for chosen, _ in model.stream(case.tokens, NEW, 1.0, None, case.seed, state=state)]
    return np.concatenate([case.tokens, *new], axis=1)


def a_long_text(model: Model, case: Case) -> Array:
    """A text longer than what code reads or writes at once."""
    return write(model, case.tokens[:1], LONG_TEXT, PLAIN, case)


def of_bytes(model: Model, case: Case) -> Array:
    """A text whose letters take more than one byte."""
    text = model.generate(LETTERS, NEW, 1.0, None, case.seed)
    return np.frombuffer(text, np.uint8)[None].astype(np.int64)


# Positions whose draws a counter of 16 or 32 bits takes for others. Two parts of a text lie so far from one another that their
# phases differ on no port.
FAR: dict[Phase, tuple[int, ...]] = {"exact": (70_000, 2**32 + 5), "float32": (70_000,)}

# Each writes the text of the plain setting in another way, but for the last two, which write texts of their own.
WAYS: dict[str, Callable[[Model, Case], Array]] = {
    "again": again,
    "token_by_token": token_by_token,
    "nothing_new": nothing_new,
    "from_a_state": from_a_state,
    "of_a_prompt_in_two": of_a_prompt_in_two,
    "kept": kept,
    "a_long_text": a_long_text,
    "of_bytes": of_bytes,
}


def ways(case: Case) -> dict[str, Callable[[Model, Case], Array]]:
    """The ways to ask that a case is fit for: only bytes make letters, and long texts take their time."""
    unfit = {key for key, fit in (("of_bytes", case.config.vocab_size == 256), ("a_long_text", case.batch == 1)) if not fit}
    return {key: way for key, way in WAYS.items() if key not in unfit}


def judge(observed: Mapping[str, Array], case: Case, dtype: str, phase: Phase) -> list[Comparison]:
    """The specification's texts, token by token, except where rounding decides between two candidates (R14)."""
    held = cast(case.params, numpy_dtype(dtype))
    wide, narrow = (Specification(cast(held, d), case.config, phase) for d in (np.float64, np.float32))
    by_name = {name(setting): setting for setting in settings(case)}
    texts = written(wide, case)
    if missing := [key for key in observed if key not in texts]:
        raise ValueError(f"unknown texts {', '.join(missing)}")
    compared = []
    for key, expected in texts.items():
        if key.startswith("from_") and key not in observed and key not in WAYS:
            continue  # a port that claims no states has none from afar
        asked = Asked(wide, narrow, case, seeded(by_name.get(key, PLAIN), case), far_from(key))
        wrong = complaint(observed.get(key), expected, asked)
        compared.append(Comparison(key, float("inf") if wrong else 0.0, 0.0, wrong))
    return compared


def far_from(name: str) -> int:
    """The position from which a text of this name goes on, beyond its place in the array."""
    number = name.removeprefix("from_")
    return int(number) if number.isdigit() else 0


@dataclass(frozen=True)
class Asked:
    """What a text was asked of: the specification, how texts are drawn, and how far from the start."""

    wide: Specification
    narrow: Specification
    case: Case
    how: Sampling
    far: int

    def logits(self, row: int, before: Array) -> tuple[Array, Array]:
        """Of the token after a text (T,), in float64 and in float32."""
        return self.last(self.wide, row, before), self.last(self.narrow, row, before)

    def last(self, model: Model, row: int, before: Array) -> Array:
        if not self.far:
            return model.forward(before[None])[0, -1].astype(np.float64)
        exported = model.export_state(model.advance(model.init_state(1), self.case.tokens[row : row + 1])[1])
        state = model.import_state(replace(exported, position=self.far))
        return model.advance(state, before[None])[0][0, -1].astype(np.float64)

    def draw(self, row: int, position: int) -> float:
        return uniform(self.how.seed, self.far + position, row)


def complaint(text: Any, expected: Array, asked: Asked) -> str:
    """What is wrong with the texts of a batch, or an empty string."""
    if not isinstance(text, np.ndarray) or text.dtype.kind not in "iu" or text.shape != expected.shape:
        return f"it is {describe_array(text)}, wanted whole numbers of shape {expected.shape}"
    for row in np.flatnonzero((text != expected).any(axis=1)):
        at = int(np.argmax(text[row] != expected[row]))
        if not excused(int(row), text[row, : at + 1], asked):
            chosen = f"text {row} has token {text[row, at]} at {at}, wanted {expected[row, at]}"
            return chosen + shown(int(row), text[row], at, asked)
    return ""


def shown(row: int, text: Array, at: int, asked: Asked) -> str:
    """The draw that chose a token, and what it was chosen from: logits, k, u, and where each candidate's part of it ends."""
    how, logits = asked.how, asked.logits(row, text[:at])[0]
    asked_for = f"temperature {how.temperature:g}, k {how.top_k}, seed {how.seed}, position {asked.far + at}, row {row}"
    ends = np.full(logits.size, np.nan) if how.temperature == 0 else np.cumsum(probabilities(logits, how))
    told = sorted({*np.argsort(-logits, kind="stable")[:MOST_SHOWN].tolist(), int(text[at]) % logits.size})
    each = ", ".join(f"{i}: {logits[i]:.6g}" + ("" if np.isnan(ends[i]) else f" to {ends[i]:.6f}") for i in told)
    return f"; {asked_for}; u {asked.draw(row, at):.6f}; logits and ends of candidates {each}"


def describe_array(value: Any) -> str:
    return f"{value.dtype} of shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__


def excused(row: int, text: Array, asked: Asked) -> bool:
    """Whether rounding of the logits could have chosen the last token of this text (T,).

    Logits that tie exactly stay tied: rounding moves equal numbers alike.
    """
    position = len(text) - 1
    exact, rounded = asked.logits(row, text[:-1])
    reach = FACTOR["float32"] * np.abs(rounded - exact).max() + FLOOR * np.abs(exact).max()
    ids, rng = np.unique(exact, return_inverse=True)[1], np.random.default_rng(asked.how.seed)
    moved = (exact + rng.uniform(-reach, reach, exact.size)[ids] for _ in range(PERTURBATIONS))
    draw = asked.draw(row, position)
    return any(sample(logits, draw, asked.how) == text[-1] for logits in moved)
