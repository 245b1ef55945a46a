"""What the suite looks at: for each channel what a model is made to compute, and what may differ.

``observe`` works on any model of the protocol: a port, a mistake, the specification itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from weakref import WeakKeyDictionary

import numpy as np

from bdh_conformance import dropout, kinks, refusals, texts
from bdh_conformance.agreement import Comparison, compare
from bdh_conformance.cases import POOL, Case
from bdh_conformance.reference import Specification, Stepwise
from bdh_conformance.tolerances import Expectation, as_numpy_dtype, expect
from bdh_spec import AdamW, Backend, BDHConfig, Model, Params, RecurrentState, State
from bdh_spec.model import init_state
from bdh_spec.params import Array
from bdh_spec.protocol import VERBS
from bdh_spec.rope import Phase

Observed = dict[str, Array]
Judge = Callable[[Observed, Case, str, Phase], list[Comparison]]

WIDE = ("float32", "float64")
ALL = (*WIDE, "bfloat16", "float16")

# Where a float32 product loses the phase, where float32 stops counting, and the longest that every port must reach.
POSITIONS: dict[Phase, tuple[int, ...]] = {
    "exact": (0, 10**4, 10**6, 2**24 + 1, 2**40),
    "float32": (0, 10**4, 10**6, 2**24 - 64),
}
LONGEST = 40  # binary digits of the positions that are drawn

# A large eps keeps Adam smooth: with a small one a slope near zero flips the sign of a whole step, and rounding decides it.
TRAINING = AdamW(learning_rate=1e-2, weight_decay=0.1, eps=1e-3, clip=0.05)
OPTIMIZERS = {"clipped": TRAINING, "unclipped": replace(TRAINING, clip=None), "roomy": replace(TRAINING, clip=1e3)}
STEPS = 2


@dataclass(frozen=True)
class Channel:
    """One thing that ports get wrong: what is computed, what is expected, and what a port must claim for it."""

    name: str
    level: str  # that it counts for, where the dtype is the port's first
    says: str
    verbs: tuple[str, ...]
    observe: Callable[[Model, Case], Observed]
    judge: Judge | None = None  # None: against the specification, with the tolerance of rounding
    dtypes: tuple[str, ...] = ALL
    prepare: Callable[[Case], Case | None] = lambda case: case  # the case as this channel needs it; None: not fit for it
    min_time: int = 1
    reference: Callable[[Model, Case], Observed] | None = None  # the same by a shorter way, where all ways are one
    shapes: tuple[tuple[BDHConfig, int, int], ...] = POOL  # that generated cases take

    def expected(self, case: Case, dtype: str, phase: Phase = "exact") -> dict[str, Expectation]:
        """What a port of this dtype must compute, for the channels that have no judge of their own."""
        compute = self.reference or self.observe
        readers = (Specification, Stepwise) if "advance" in self.verbs else (Specification,)
        return expect_of(readers, compute, case, dtype, phase)

    def compare(self, observed: Observed, case: Case, dtype: str, phase: Phase = "exact") -> list[Comparison]:
        """Every array of an observation against what it should be, in the specification's order."""
        if self.judge:
            return self.judge(observed, case, dtype, phase)
        return against(observed, self.expected(case, dtype, phase))


def against(observed: Mapping[str, Array], expected: Mapping[str, Expectation]) -> list[Comparison]:
    """All that is expected, then a complaint about anything else."""
    compared = [compare(name, observed.get(name), expectation) for name, expectation in expected.items()]
    if unknown := [name for name in observed if name not in expected]:
        compared.append(complaint("names", f"unknown stages {', '.join(unknown)}"))
    elif list(observed) != list(expected) and set(observed) == set(expected):
        compared.append(complaint("names", f"the stages come as {', '.join(observed)}: keep the order of computation"))
    return compared


def expect_of(
    readers: Sequence[type[Specification]], compute: Callable[[Model, Case], Observed], case: Case, dtype: str, phase: Phase
) -> dict[str, Expectation]:
    """What is expected, with the largest tolerance of these ways to read a text: a port may go any of them."""

    def by(reader: type[Specification]) -> dict[str, Expectation]:
        return expect(lambda p: compute(reader(p, case.config, phase), case), case.params, dtype, seed=case.seed)

    ways = [by(reader) for reader in readers]
    return {
        name: Expectation(
            expectation.reference,
            max(way[name].allowed for way in ways),
            max(way[name].allowed_slope for way in ways),
        )
        for name, expectation in ways[0].items()
    }


def complaint(stage: str, sentence: str) -> Comparison:
    """A comparison that no number tells."""
    return Comparison(stage, float("inf"), 0.0, sentence)


@dataclass(frozen=True)
class Origin:
    """Where a loaded model came from."""

    backend: Backend
    device: str | None
    dtype: str
    phase: Phase


ORIGINS: WeakKeyDictionary[Model, Origin] = WeakKeyDictionary()


def load(backend: Backend, case: Case, dtype: str, phase: Phase = "exact", device: str | None = None) -> Model:
    """A model of this case, which knows how to load its like: some properties compare two sets of weights."""
    return load_params(Origin(backend, device, dtype, phase), case.params, case)


def load_params(origin: Origin, params: Params, case: Case) -> Model:
    model = origin.backend.load(params, case.config, device=origin.device, dtype=origin.dtype, phase=origin.phase)
    ORIGINS[model] = origin
    return model


def loaded_again(model: Model, case: Case) -> Model:
    """Another model of the same port with the weights of the case."""
    origin = ORIGINS.get(model)
    return load_params(origin, case.params, case) if origin else Specification(case.params, case.config, model.phase)


def claims(model: Model, *verbs: str) -> bool:
    """Whether the model's port has these verbs."""
    origin = ORIGINS.get(model)
    return set(verbs) <= set(origin.backend.capabilities.verbs if origin else VERBS)


def observe_logits(model: Model, case: Case) -> Observed:
    return {"logits": model.forward(case.tokens)}


def observe_traces(model: Model, case: Case) -> Observed:
    return model.trace(case.tokens)


def observe_loss(model: Model, case: Case) -> Observed:
    """The loss with an ignored target, and with none."""
    none_ignored = np.where(case.targets < 0, 0, case.targets)
    return {
        "loss": scalar(model.loss(case.tokens, case.targets)),
        "loss.none_ignored": scalar(model.loss(case.tokens, none_ignored)),
    }


def observe_gradients(model: Model, case: Case) -> Observed:
    loss, slopes = model.gradients(case.tokens, case.targets)
    return {"loss": scalar(loss)} | {f"gradients.{name}": slope for name, slope in slopes._asdict().items()}


def observe_states(model: Model, case: Case) -> Observed:
    """The state of half the text and of all of it, carried over by export and import in between."""
    half = case.time // 2 or 1
    logits, state = model.advance(model.init_state(case.batch), case.tokens[:, :half])
    first = model.export_state(state)
    seen = {"half.logits": logits} | memories("half", first)
    if half < case.time:
        logits, state = model.advance(model.import_state(first), case.tokens[:, half:])
        seen |= {"whole.logits": logits} | memories("whole", model.export_state(state))
    return seen | {"position": scalar(state.position)}


def memories(prefix: str, state: RecurrentState) -> Observed:
    """A state's matrices by layer."""
    return {f"{prefix}.layers.{i}.state_by_pair": by_pair(memory) for i, memory in enumerate(state.layers)}


def by_pair(memory: Array) -> Array:
    """A state (B, h, N, D) as (B, h, N/2, 2 D): a row is a pair of neurons.

    Rotation moves the length of a pair from one neuron to the other. What is left of it in one of them can be as small as
    rounding, and its relative error says nothing.
    """
    if not isinstance(memory, np.ndarray) or memory.ndim != 4 or memory.shape[2] % 2:
        return memory  # no state at all: the comparison says so
    B, h, N, D = memory.shape
    return memory.reshape(B, h, N // 2, 2 * D)


def observe_decode(model: Model, case: Case) -> Observed:
    """The logits of one text, read in all the ways that a port can be asked to read it."""
    T = case.time
    plans = {"whole": (T,), "prefill": (T - 1, 1), "ones": (1,) * T, "ragged": ragged(T)}
    seen = {f"{name}.logits": read(model, case.tokens, plan) for name, plan in plans.items() if 0 not in plan}
    if T > 1:
        start = model.advance(model.init_state(case.batch), case.tokens[:, :-1])[1]
        for name, last in (("again", case.tokens[:, -1:]), ("branch", case.tokens[:, :1]), ("back", case.tokens[:, -1:])):
            seen[f"{name}.logits"] = model.advance(start, last)[0]
    return seen


def decode_reference(model: Model, case: Case) -> Observed:
    """The same logits, read in one way."""
    if case.time == 1:
        logits, _ = model.advance(model.init_state(case.batch), case.tokens)
        return {f"{way}.logits": logits for way in ("whole", "ones", "ragged")}
    before, state = model.advance(model.init_state(case.batch), case.tokens[:, :-1])
    last, other = (model.advance(state, token)[0] for token in (case.tokens[:, -1:], case.tokens[:, :1]))
    logits = np.concatenate([before, last], axis=1)
    seen = {f"{way}.logits": logits for way in ("whole", "prefill", "ones", "ragged")}
    return seen | {"again.logits": last, "branch.logits": other, "back.logits": last}


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


def observe_batch(model: Model, case: Case) -> Observed:
    """Each text of the batch by itself, and the batch upside down."""
    alone = [model.forward(case.tokens[b : b + 1]) for b in range(case.batch)]
    return {
        "together.logits": model.forward(case.tokens),
        "alone.logits": np.concatenate(alone),
        "reversed.logits": model.forward(case.tokens[::-1].copy())[::-1],
    }


def batch_reference(model: Model, case: Case) -> Observed:
    logits = model.forward(case.tokens)
    return {"together.logits": logits, "alone.logits": logits, "reversed.logits": logits}


def observe_padding(model: Model, case: Case) -> Observed:
    """The logits of texts of all lengths, with ids of three kinds in front of them, which must not show."""
    seen: Observed = {}
    for name, lengths in padded_lengths(case).items():
        is_padding = np.arange(case.time) < case.time - lengths[:, None]  # B T
        for kind, ids in paddings(case).items():
            tokens = np.where(is_padding, ids, case.tokens)
            seen[f"{name}.{kind}.logits"] = model.forward_padded(tokens, lengths)
    return seen


def padding_reference(model: Model, case: Case) -> Observed:
    """The same from each text by itself."""
    seen: Observed = {}
    for name, lengths in padded_lengths(case).items():
        logits = np.zeros((case.batch, case.time, case.config.vocab_size))
        for b, start in enumerate(case.time - lengths):
            logits[b, start:] = model.forward(case.tokens[b : b + 1, start:])[0]
        seen |= {f"{name}.{kind}.logits": logits for kind in paddings(case)}
    return seen


def padded_lengths(case: Case) -> dict[str, Array]:
    """How long the texts of a batch are: from one token to the whole row, the other way round, and in between."""
    B, T = case.batch, case.time
    rising, falling = (np.linspace(*ends, B).round().astype(np.int64) for ends in ((1, T), (T, 1)))
    return {"rising": rising, "falling": falling, "middle": T // 2 + np.arange(B) % 2}


def paddings(case: Case) -> dict[str, Array]:
    """The ids (B, T) that padding is made of."""
    V, shape = case.config.vocab_size, (case.batch, case.time)
    drawn = np.random.default_rng(case.seed).integers(0, V, shape)
    return {"zeros": np.zeros(shape, np.int64), "last_id": np.full(shape, V - 1), "drawn": drawn}


def observe_training(model: Model, case: Case) -> Observed:
    """Losses of steps with and without clipping, the weights after them, and what the model then says.

    The logits tell whether anything moved that is none of the five weights, a frequency table for one.
    """
    seen: Observed = {}
    for name, settings in OPTIMIZERS.items():
        for step, loss in enumerate(steps(model, case, settings)):
            seen[f"{name}.{step}.loss"] = scalar(loss)
        seen |= {f"{name}.weights.{key}": np.ravel(weight) for key, weight in model.params()._asdict().items()}
    return seen | {"trained.logits": model.forward(case.tokens)}


def steps(model: Model, case: Case, settings: AdamW) -> Iterator[float]:
    """The losses of a few steps, each before it is made."""
    optimizer = model.optimizer(settings)
    return (model.train_step(optimizer, case.tokens, case.targets) for _ in range(STEPS))


def trainable(case: Case) -> Case | None:
    """The case without dropout, or one like it, whose relus rounding flips at no step."""
    still = replace(case, config=replace(case.config, dropout=0.0))
    return next((c for c in kinks.next_seeds(still) if stays_clear(c)), None)


def stays_clear(case: Case) -> bool:
    """Whether training meets no kink."""
    model = Specification(case.params, case.config)
    path = (model.params() for settings in OPTIMIZERS.values() for _ in steps(model, case, settings))
    return all(kinks.is_clear(case.tokens, params, case.config) for params in (case.params, *path))


def observe_phases(model: Model, case: Case) -> Observed:
    """What a model that remembers the start of the text says of the rest, if that follows a long time later."""
    half = case.time // 2
    begun = model.export_state(model.advance(model.init_state(case.batch), case.tokens[:, :half])[1])
    drawn = (2 ** np.random.default_rng(case.seed).uniform(10, LONGEST, 2)).astype(np.int64) if model.phase == "exact" else ()
    seen: Observed = {}
    for start in (*POSITIONS[model.phase], *map(int, drawn)):
        later = model.import_state(RecurrentState(start + half, begun.layers))
        logits, state = model.advance(later, case.tokens[:, half:])
        seen |= {f"at_{start}.logits": logits} | memories(f"at_{start}", model.export_state(state))
    return seen


def observe_determinism(model: Model, case: Case) -> Observed:
    """Pairs of runs: ``name`` and ``name.again`` must be one, bit for bit, whatever was asked in between."""
    first = model.forward(case.tokens)
    before = first.copy()
    model.forward((case.tokens + 1) % case.config.vocab_size)
    after = first.copy()  # now, for the next answer to the same text would put right what a shared buffer has lost
    seen = {"logits": before, "logits.again": model.forward(case.tokens), "kept": before, "kept.again": after}
    if claims(model, "advance"):
        seen |= {name: model.advance(model.init_state(case.batch), case.tokens)[0] for name in ("decode", "decode.again")}
    if claims(model, "gradients"):
        for name in ("gradients", "gradients.again"):
            _, slopes = model.gradients(case.tokens, case.targets)
            seen |= {f"{key}.{name}": slope for key, slope in slopes._asdict().items()}
    return seen


def judge_pairs(observed: Observed, case: Case, dtype: str, phase: Phase) -> list[Comparison]:
    """Bit for bit."""
    names = [name for name in observed if not name.endswith(".again")]
    different = [name for name in names if not np.array_equal(observed[name], observed[f"{name}.again"])]
    return [
        complaint(name, "a second run gives other bits, or the first result was overwritten by it")
        if name in different
        else Comparison(name, 0.0, 0.0)
        for name in names
    ]


def observe_mutation(model: Model, case: Case) -> Observed:
    """Everything a caller owns, after the model worked with it; and the model, after the caller wrote into its answers."""
    tokens, targets = case.tokens.copy(), case.targets.copy()
    before = model.forward(tokens).copy()
    answers = [model.forward(tokens), *model.params()]
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
        kept |= overwritten_state(model, state) | imported_state(model, state, tokens) if claims(model, "state") else {}
    spoil(answers)
    seen = {"answers": before, "answers.again": model.forward(tokens), **kept}
    seen |= {"tokens": tokens, "tokens.again": replace(case).tokens, "targets": targets, "targets.again": replace(case).targets}
    return seen | caller_weights(model, case)


def overwritten_state(model: Model, state: State) -> Observed:
    """A state before and after its exported copy was written into."""
    first = model.export_state(state).layers[0].copy()
    spoil(model.export_state(state).layers)
    return {"exported": first, "exported.again": model.export_state(state).layers[0]}


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
        kept = Params(*(weight.astype(as_numpy_dtype(model.dtype)) for weight in replace(case).params))
        given = Params(*map(adoptable, kept))
        train(load_params(origin, given, case), case)
        seen |= beside("own_dtype", given, kept)
    return seen


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


def observe_properties(model: Model, case: Case) -> Observed:
    """What must be equal without any reference: ``name`` and ``name.again`` are one up to rounding."""
    logits = model.forward(case.tokens)
    later = case.tokens.copy()
    later[:, -1] = (later[:, -1] + 1) % case.config.vocab_size
    seen = {"causality": logits[:, :-1], "causality.again": model.forward(later)[:, :-1]} if case.time > 1 else {}
    if claims(model, "advance"):
        seen |= {"chunking": logits, "chunking.again": read(model, case.tokens, ragged(case.time))}
    if claims(model, "advance", "state"):
        seen |= added(model, case) | (shifted(model, case, logits) if model.phase == "exact" else {})
    return seen | permuted(model, case, logits)


def shifted(model: Model, case: Case, logits: Array) -> Observed:
    """RoPE is relative: a text that begins later is the same text."""
    empty = init_state(case.batch, case.config, np.dtype("float64" if model.dtype == "float64" else "float32"))
    logits_later, _ = model.advance(model.import_state(replace(empty, position=3)), case.tokens)
    return {"position_shift": logits, "position_shift.again": logits_later}


def added(model: Model, case: Case) -> Observed:
    """The first layer's state of a text is the sum of the states of its parts, each at its own position."""
    half = case.time // 2
    if not half:
        return {}
    empty = model.export_state(model.init_state(case.batch))
    whole = model.export_state(model.advance(model.init_state(case.batch), case.tokens)[1])
    first = model.export_state(model.advance(model.init_state(case.batch), case.tokens[:, :half])[1])
    late = model.import_state(replace(empty, position=half))
    second = model.export_state(model.advance(late, case.tokens[:, half:])[1])
    return {"added.state": by_pair(whole.layers[0]), "added.state.again": by_pair(first.layers[0] + second.layers[0])}


def permuted(model: Model, case: Case, logits: Array) -> Observed:
    """The order of heads, of features and of the vocabulary is a matter of naming."""
    origin = ORIGINS.get(model)
    if origin is None:
        return {}
    c, p, rng = case.config, case.params, np.random.default_rng(case.seed)
    heads, features, ids = (rng.permutation(n) for n in (c.n_head, c.n_embd, c.vocab_size))
    by_head = p.decoder.reshape(c.n_head, c.n_neurons, c.n_embd)[heads].reshape(p.decoder.shape)
    other_heads = p._replace(encoder=p.encoder[heads], encoder_v=p.encoder_v[heads], decoder=by_head)
    other_features = Params(
        p.embed[:, features], p.encoder[:, features], p.encoder_v[:, features], p.decoder[:, features], p.lm_head[features]
    )
    other_ids = p._replace(embed=p.embed[ids], lm_head=p.lm_head[:, ids])
    return {
        "heads": logits,
        "heads.again": load_params(origin, other_heads, case).forward(case.tokens),
        "features": logits,
        "features.again": load_params(origin, other_features, case).forward(case.tokens),
        "vocabulary": logits[..., ids],
        "vocabulary.again": load_params(origin, other_ids, case).forward(np.argsort(ids)[case.tokens]),
    }


def judge_properties(observed: Observed, case: Case, dtype: str, phase: Phase) -> list[Comparison]:
    """Both sides of a pair may be as far from the specification as rounding takes them, so twice that from one another."""
    pairs = [name for name in observed if not name.endswith(".again")]
    expected = expect_of((Specification, Stepwise), allowances, case, dtype, phase)
    compared = []
    for name in pairs:
        like = expected["state" if name.endswith(".state") else "logits"]
        reference = np.asarray(observed[name], np.float64)
        held = Expectation(reference, 2 * like.allowed, 2 * like.allowed_slope)
        compared.append(compare(name, observed.get(f"{name}.again"), held))
    return compared


def allowances(model: Model, case: Case) -> Observed:
    """What the properties' pairs are made of."""
    logits, state = model.advance(model.init_state(case.batch), case.tokens)
    return {"logits": logits, "state": by_pair(model.export_state(state).layers[0])}


def observe_sampling(model: Model, case: Case) -> Observed:
    return texts.written(model, case)


def observe_dropout(model: Model, case: Case) -> Observed:
    return dropout.observe(model, case, lambda: loaded_again(model, case))


def observe_refusals(model: Model, case: Case) -> Observed:
    origin = ORIGINS.get(model)
    return refusals.observe(model, case, origin.backend if origin else None)


def judge_refusals(observed: Observed, case: Case, dtype: str, phase: Phase) -> list[Comparison]:
    return refusals.judge(observed, case)


def scalar(value: float) -> Array:
    return np.array(value, np.float64)


CHANNELS = {
    channel.name: channel
    for channel in (
        Channel("logits", "forward", "logits of the parallel form", ("forward",), observe_logits),
        Channel("traces", "traces", "every stage of every layer", ("trace",), observe_traces),
        Channel("loss", "forward", "mean cross entropy", ("loss",), observe_loss),
        Channel(
            "gradients",
            "gradients",
            "the slope of the loss in each weight",
            ("gradients",),
            observe_gradients,
            dtypes=WIDE,
            prepare=kinks.clear_of_kinks,
        ),
        Channel("states", "decode", "the recurrent state", ("advance", "state"), observe_states),
        Channel(
            "decode",
            "decode",
            "one text read in pieces of all kinds",
            ("advance",),
            observe_decode,
            reference=decode_reference,
        ),
        Channel("batch", "forward", "texts of a batch do not touch", ("forward",), observe_batch, reference=batch_reference),
        Channel(
            "padding",
            "padding",
            "texts of different lengths in one batch",
            ("padded",),
            observe_padding,
            min_time=2,
            reference=padding_reference,
        ),
        Channel(
            "dropout",
            "training",
            "dropped in training only, in the right place, by the right share",
            ("train",),
            observe_dropout,
            dropout.judge,
            WIDE,
            dropout.prepare,
            min_time=2,
        ),
        Channel(
            "training",
            "training",
            "AdamW moves the five weights and nothing else",
            ("train",),
            observe_training,
            dtypes=WIDE,
            prepare=trainable,
            min_time=2,
            shapes=(POOL[1], POOL[4]),  # JAX takes two seconds to compile a step
        ),
        Channel("sampling", "sampling", "one seed, one text", ("advance",), observe_sampling, texts.judge, WIDE),
        Channel("determinism", "forward", "a run equals itself", ("forward",), observe_determinism, judge_pairs),
        Channel(
            "mutation",
            "forward",
            "nobody writes into what is not theirs",
            ("forward",),
            observe_mutation,
            judge_pairs,
            WIDE,
            shapes=(POOL[1], POOL[4]),
        ),
        Channel("phases", "long positions", "phases far from the start", ("advance", "state"), observe_phases, min_time=2),
        Channel("properties", "forward", "what holds without a reference", ("forward",), observe_properties, judge_properties),
        Channel(
            "refusals", "refusals", "bad input gets its one sentence", ("forward",), observe_refusals, judge_refusals, WIDE
        ),
    )
}
