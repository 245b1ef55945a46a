"""A run equals itself, and nobody writes into what is not theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from bdh_conformance.channels.channel import Observed, complaint
from bdh_conformance.channels.loading import ORIGINS, Origin, claims, load_params
from bdh_conformance.yardstick.agreement import Comparison
from bdh_conformance.yardstick.cases import Case
from bdh_spec import AdamW, Model, Params, State
from bdh_spec.dtypes import numpy_dtype
from bdh_spec.params import Array
from bdh_spec.rope import Phase


def observe_determinism(model: Model, case: Case) -> Observed:
    """Pairs of runs: ``name`` and ``name.again`` must be one, bit for bit, whatever was asked in between.

    And the first answer must still be what it was, when the same verb has answered to other tokens.
    """
    seen: Observed = {}
    other = (case.tokens + 1) % case.config.vocab_size
    for name, ask in questions(model, case).items():
        first = ask(case.tokens)
        before = {key: value.copy() for key, value in first.items()}
        ask(other)
        after = {key: value.copy() for key, value in first.items()}  # now: the next answer to the same tokens puts it right
        second = ask(case.tokens)
        for key, value in before.items():
            seen |= {f"{name}.{key}": value, f"{name}.{key}.again": second[key]}
            seen |= {f"kept.{name}.{key}": value, f"kept.{name}.{key}.again": after[key]}
    return seen | carried(model, case) if claims(model, "advance", "state") else seen


def questions(model: Model, case: Case) -> dict[str, Callable[[Array], Observed]]:
    """Everything that a model answers to tokens with arrays."""
    asks: dict[str, Callable[[Array], Observed]] = {"forward": lambda tokens: {"logits": model.forward(tokens)}}
    if claims(model, "advance"):
        asks["decode"] = lambda tokens: {"logits": model.advance(model.init_state(case.batch), tokens)[0]}
    if claims(model, "gradients"):
        asks["gradients"] = lambda tokens: dict(model.gradients(tokens, case.targets)[1]._asdict())
    if claims(model, "trace"):
        asks["trace"] = model.trace
    if claims(model, "padded"):
        whole = np.full(case.batch, case.time)
        asks["padded"] = lambda tokens: {"logits": model.forward_padded(tokens, whole)}
    return asks


def carried(model: Model, case: Case) -> Observed:
    """A state of full float32 numbers, and what is exported of it: a state is no narrower, whatever the weights are (R13)."""
    shapes = model.export_state(model.init_state(case.batch))
    rng = np.random.default_rng(case.seed)
    sizes = 10 ** rng.uniform(-6, 9, len(shapes.layers))
    layers = tuple((size * rng.normal(size=m.shape)).astype(np.float32) for size, m in zip(sizes, shapes.layers, strict=True))
    given = replace(shapes, layers=layers, position=7)
    back = model.export_state(model.import_state(given))
    pairs = zip(given.layers, back.layers, strict=True)
    return {
        key: np.asarray(memory, np.float32)
        for i, (one, other) in enumerate(pairs)
        for key, memory in ((f"carried.{i}", one), (f"carried.{i}.again", other))
    }


def judge_pairs(observed: Observed, case: Case, dtype: str, phase: Phase) -> list[Comparison]:
    """Bit for bit."""
    names = [name for name in observed if not name.endswith(".again")]
    different = [name for name in names if not identical(observed[name], observed[f"{name}.again"])]
    return [
        complaint(name, "a second run gives other bits, or the first result was overwritten by it")
        if name in different
        else Comparison(name, 0.0, 0.0)
        for name in names
    ]


def identical(one: Array, other: Array) -> bool:
    """Whether two arrays are equal in form and in every value; NaN is what it is."""
    return one.shape == other.shape and bool(np.array_equal(one, other, equal_nan=one.dtype.kind == "f"))


def observe_mutation(model: Model, case: Case) -> Observed:
    """Everything a caller owns, after the model worked with it; and the model, after the caller wrote into its answers."""
    tokens, targets = case.tokens.copy(), case.targets.copy()
    before = model.forward(tokens).copy()
    answers = [model.forward(tokens)]
    if claims(model, "train"):
        answers += model.params()
    if claims(model, "loss"):
        model.loss(tokens, targets)
    if claims(model, "gradients"):
        answers += model.gradients(tokens, targets)[1]
    if claims(model, "trace"):
        answers += model.trace(tokens).values()
    kept: Observed = {}
    if claims(model, "advance"):
        state = model.advance(model.init_state(case.batch), tokens)[1]
        kept = {"state.logits": model.advance(state, tokens)[0].copy()}
        kept["state.logits.again"] = model.advance(state, tokens)[0]
        kept |= imported_state(model, state, tokens) | overwritten_state(model, state) if claims(model, "state") else {}
    spoil(answers)
    seen = {"answers": before, "answers.again": model.forward(tokens), **kept}
    lengths = np.arange(case.batch) % case.time + 1
    if claims(model, "padded"):
        model.forward_padded(tokens, lengths)
    if claims(model, "advance"):
        list(model.stream(tokens, 2))
    seen |= {"lengths": lengths, "lengths.again": np.arange(case.batch) % case.time + 1}
    if claims(model, "train"):
        model.train_step(model.optimizer(AdamW()), tokens, targets)
    seen |= {"tokens": tokens, "tokens.again": replace(case).tokens, "targets": targets, "targets.again": replace(case).targets}
    return seen | caller_weights(model, case)


def overwritten_state(model: Model, state: State) -> Observed:
    """A state before and after its exported copy was written into; such a copy before and after the state was given away."""
    first = model.export_state(state).layers[0].copy()
    spoil(model.export_state(state).layers)
    seen = {"exported": first, "exported.again": model.export_state(state).layers[0].copy()}
    held = model.export_state(state).layers
    before = [memory.copy() for memory in held]
    model.advance(state, np.zeros((state.batch, 1), np.int64), donate=True)
    return seen | {"donated": np.stack(before), "donated.again": np.stack(held)}


def imported_state(model: Model, state: State, tokens: Array) -> Observed:
    """The arrays that a state was imported from, after it was given away; and what it says once they are written into."""
    exported = model.export_state(state)
    given = replace(exported, layers=tuple(map(adoptable, exported.layers)))
    before = model.advance(model.import_state(given), tokens)[0].copy()
    model.advance(model.import_state(given), tokens, donate=True)
    seen = {"given": np.stack(exported.layers), "given.again": np.stack(given.layers)}
    imported = model.import_state(given)
    spoil(given.layers)
    return seen | {"imported.logits": before, "imported.logits.again": model.advance(imported, tokens)[0]}


def adoptable(values: Array) -> Array:
    """A copy that begins at a multiple of 64 bytes: memory that some frameworks take over as it is, and no other."""
    memory = np.empty(values.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy: Array = memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


def caller_weights(model: Model, case: Case) -> Observed:
    """The arrays that models were loaded from, after a step of training if they train, beside what they were.

    The second model is given its own dtype: nothing needs to be converted, and a port that shares memory gives itself away.
    """
    train(model, case)
    seen = beside("weights", case.params, replace(case).params)
    if origin := ORIGINS.get(model):
        kept = Params(*(weight.astype(numpy_dtype(model.dtype)) for weight in replace(case).params))
        given = Params(*map(adoptable, kept))
        train(load_params(origin, given, case), case)
        seen |= beside("own_dtype", given, kept)
        for name, weights in (("float64", replace(case).params), ("own_dtype", kept)):
            seen |= changed_after_load(origin, Params(*map(adoptable, weights)), case, name)
    return seen


def changed_after_load(origin: Origin, given: Params, case: Case, name: str) -> Observed:
    """What a model says before and after its caller wrote into the arrays that it was loaded from."""
    model = load_params(origin, given, case)
    before = model.forward(case.tokens).copy()
    for weight in given:
        weight[...] = -weight
    return {f"loaded.{name}.logits": before, f"loaded.{name}.logits.again": model.forward(case.tokens)}


def train(model: Model, case: Case) -> None:
    """One step, if the model trains; one look at the text if not."""
    model.forward(case.tokens)
    if claims(model, "train"):
        model.train_step(model.optimizer(AdamW(learning_rate=0.1)), case.tokens, case.targets)


def beside(name: str, weights: Params, kept: Params) -> Observed:
    """Pairs of weights."""
    pairs = zip(Params._fields, weights, kept, strict=True)
    return {key: value for field, w, k in pairs for key, value in ((f"{name}.{field}", w), (f"{name}.{field}.again", k))}


def spoil(arrays: Iterator[Array] | list[Array] | tuple[Array, ...]) -> None:
    """Write nonsense into every array that lets itself be written."""
    for array in arrays:
        if array.flags.writeable:
            array[...] = -7
