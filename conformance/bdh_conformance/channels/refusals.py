"""Bad input gets one error with one sentence, the same from every port, before any work."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace

import numpy as np

from bdh_conformance.channels.loading import ORIGINS, sibling
from bdh_conformance.yardstick.agreement import Comparison
from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.reference import Specification
from bdh_spec import AdamW, Backend, BDHError, Model, OptimizerState, Params, RecurrentState
from bdh_spec.model import IGNORE, init_state
from bdh_spec.numpy_backend import NumpyBackend
from bdh_spec.params import Array
from bdh_spec.protocol import VERBS
from bdh_spec.rope import Phase

NOTHING = "nothing was refused"


def with_one(array: Array, value: int) -> Array:
    """A copy whose last value is another."""
    changed = array.copy()
    changed.flat[-1] = value
    return changed


def advance_donated_twice(model: Model, case: Case) -> None:
    state = model.init_state(case.batch)
    model.advance(state, case.tokens, donate=True)
    model.advance(state, case.tokens)


def misfit(case: Case) -> RecurrentState:
    """A state with one layer too many."""
    state = init_state(case.batch, case.config)
    return RecurrentState(0, (*state.layers, state.layers[0]))


def narrower(case: Case) -> RecurrentState:
    """A state with half of the neurons, as a model of another width exports it."""
    state = init_state(case.batch, case.config)
    return RecurrentState(0, tuple(memory[:, :, : case.config.n_neurons // 2] for memory in state.layers))


def stepped(model: Model, case: Case, rate: float) -> float:
    """A step at a rate of its own."""
    return model.train_step(model.optimizer(AdamW()), case.tokens, case.targets, rate=rate)


def misfit_moments(model: Model) -> OptimizerState:
    """An optimiser of which one mean is that of another weight."""
    state = model.export_optimizer(model.optimizer(AdamW()))
    return replace(state, second=state.second._replace(lm_head=state.second.decoder))


def another(model: Model) -> Model:
    """A second model of the same kind, whose states are none of the first one's."""
    return copy(model)


def diverged(model: Model, case: Case, value: float = np.nan, ids: slice = slice(None)) -> Model:
    """A model whose logits are NaN, or infinite, for some ids."""

    def spoiled(params: Params) -> Params:
        head = params.lm_head.copy()
        head[:, ids] = 0
        head[0, ids] = value  # infinite times the sign of a feature; no sum of opposite signs
        return params._replace(lm_head=head)

    return sibling(model, case, spoiled, case.config.n_layer)


def train(model: Model, tokens: Array, targets: Array) -> float:
    return model.train_step(model.optimizer(AdamW()), tokens, targets)


def lengths(case: Case) -> Array:
    """One length for each text: the whole row."""
    return np.full(case.batch, case.time)


MISTAKES: dict[str, dict[str, Callable[[Model, Case], object]]] = {
    "forward": {
        "id_too_large": lambda m, c: m.forward(with_one(c.tokens, c.config.vocab_size)),
        "id_negative": lambda m, c: m.forward(with_one(c.tokens, -1)),
        **{  # mypy takes no lambda whose defaults its type does not tell
            f"id_of_{bits}_bits": lambda m, c, bits=bits: m.forward(with_one(c.tokens, 2**bits))  # type: ignore[misc]
            for bits in (16, 31, 32, 40)
        },
        "id_of_64_bits": lambda m, c: m.forward(with_one(c.tokens.astype(np.uint64), 2**63 + 1)),
        "id_far_below_zero": lambda m, c: m.forward(with_one(c.tokens, -(2**32))),
        "three_axes": lambda m, c: m.forward(c.tokens[None]),
        "words": lambda m, c: m.forward(c.tokens.astype(str)),
        "objects": lambda m, c: m.forward(c.tokens.astype(object)),
        "no_axis": lambda m, c: m.forward(0),
        "no_texts": lambda m, c: m.forward(c.tokens[:0]),
        "no_tokens": lambda m, c: m.forward(c.tokens[:, :0]),
        "floats": lambda m, c: m.forward(c.tokens * 1.0),
        "booleans": lambda m, c: m.forward(c.tokens > 0),
        "one_axis": lambda m, c: m.forward(c.tokens[0]),
        "ragged": lambda m, c: m.forward([[0, 1], [0]]),
    },
    "advance": {
        "id_too_large_in_decode": lambda m, c: m.advance(m.init_state(c.batch), with_one(c.tokens, c.config.vocab_size)),
        "no_tokens_in_decode": lambda m, c: m.advance(m.init_state(c.batch), c.tokens[:, :0]),
        "empty_prompt": lambda m, c: m.generate("", 1),
        "state_of_another_batch": lambda m, c: m.advance(m.init_state(c.batch + 1), c.tokens),
        "state_of_no_texts": lambda m, c: m.init_state(0),
        "state_of_another_model": lambda m, c: m.advance(another(m).init_state(c.batch), c.tokens),
        "state_given_away": advance_donated_twice,
        "temperature_of_nan": lambda m, c: m.generate(c.tokens, 1, temperature=float("nan")),
        "negative_temperature": lambda m, c: m.generate(c.tokens, 1, temperature=-1.0),
        "negative_top_k": lambda m, c: m.generate(c.tokens, 1, top_k=-1),
        "negative_length": lambda m, c: m.generate(c.tokens, -1),
        "infinite_temperature": lambda m, c: m.generate(c.tokens, 1, temperature=float("inf")),
        "seed_of_65_bits": lambda m, c: m.generate(c.tokens, 1, seed=2**64),
        "id_negative_in_decode": lambda m, c: m.advance(m.init_state(c.batch), with_one(c.tokens, -1)),
        "floats_in_decode": lambda m, c: m.advance(m.init_state(c.batch), c.tokens * 1.0),
        "id_too_large_in_a_prompt": lambda m, c: m.generate(with_one(c.tokens, c.config.vocab_size), 1),
        "logits_of_infinity": lambda m, c: diverged(m, c, np.inf, slice(0, 1)).generate(c.tokens, 1),
        "logits_of_one_nan": lambda m, c: diverged(m, c, np.nan, slice(-1, None)).generate(c.tokens, 1),
        "logits_of_nan_beyond_top_k": lambda m, c: diverged(m, c, np.nan, slice(0, 1)).generate(c.tokens, 1, top_k=1),
        "logits_of_nan_in_a_stream": lambda m, c: list(diverged(m, c).stream(c.tokens, 1)),
        "logits_of_nan": lambda m, c: diverged(m, c).generate(c.tokens, 1),
        "logits_of_nan_at_best": lambda m, c: diverged(m, c).generate(c.tokens, 1, temperature=0.0),
        "negative_seed": lambda m, c: m.generate(c.tokens, 1, seed=-1),
    },
    "loss": {
        "target_too_large": lambda m, c: m.loss(c.tokens, with_one(c.targets, c.config.vocab_size)),
        "target_negative": lambda m, c: m.loss(c.tokens, with_one(c.targets, -1)),
        "target_of_33_bits": lambda m, c: m.loss(c.tokens, with_one(c.targets, 2**32)),
        "floats_as_targets": lambda m, c: m.loss(c.tokens, c.targets * 1.0),
        "booleans_as_targets": lambda m, c: m.loss(c.tokens, c.targets > 0),
        "id_too_large_in_loss": lambda m, c: m.loss(with_one(c.tokens, c.config.vocab_size), c.targets),
        "targets_of_one_text": lambda m, c: m.loss(c.tokens, c.targets[:1, :-1]),
        "no_target_counts": lambda m, c: m.loss(c.tokens, np.full_like(c.targets, IGNORE)),
    },
    "gradients": {
        "id_negative_in_gradients": lambda m, c: m.gradients(with_one(c.tokens, -1), c.targets),
        "target_too_large_in_gradients": lambda m, c: m.gradients(c.tokens, with_one(c.targets, c.config.vocab_size)),
        "no_target_counts_in_gradients": lambda m, c: m.gradients(c.tokens, np.full_like(c.targets, IGNORE)),
        "targets_of_another_shape": lambda m, c: m.gradients(c.tokens, np.concatenate([c.targets, c.targets])),
    },
    "train": {
        "id_too_large_in_training": lambda m, c: train(m, with_one(c.tokens, c.config.vocab_size), c.targets),
        "target_negative_in_training": lambda m, c: train(m, c.tokens, with_one(c.targets, -1)),
        "no_target_counts_in_training": lambda m, c: train(m, c.tokens, np.full_like(c.targets, IGNORE)),
        "rate_of_nan": lambda m, c: stepped(m, c, rate=float("nan")),
        "negative_rate": lambda m, c: stepped(m, c, rate=-1e-3),
        "optimizer_of_another_model": lambda m, c: m.train_step(another(m).optimizer(AdamW()), c.tokens, c.targets),
        "no_batch": lambda m, c: m.train_on(m.optimizer(AdamW()), []),
        "no_target_counts_in_a_step": lambda m, c: m.train_on(
            m.optimizer(AdamW()), [(c.tokens, np.full_like(c.targets, IGNORE))]
        ),
    },
    "optimizer": {
        "optimizer_of_another_model_exported": lambda m, c: m.export_optimizer(another(m).optimizer(AdamW())),
        "moments_of_other_sizes": lambda m, c: m.import_optimizer(misfit_moments(m)),
        "steps_below_none": lambda m, c: m.import_optimizer(replace(m.export_optimizer(m.optimizer(AdamW())), step=-1)),
    },
    "trace": {
        "id_too_large_in_trace": lambda m, c: m.trace(with_one(c.tokens, c.config.vocab_size)),
        "floats_in_trace": lambda m, c: m.trace(c.tokens * 1.0),
    },
    "padded": {
        "no_token_left": lambda m, c: m.forward_padded(c.tokens, with_one(lengths(c), 0)),
        "length_beyond_its_row": lambda m, c: m.forward_padded(c.tokens, with_one(lengths(c), c.time + 1)),
        "one_length_for_all": lambda m, c: m.forward_padded(c.tokens, c.time),
        "lengths_of_floats": lambda m, c: m.forward_padded(c.tokens, lengths(c) * 1.0),
        "id_negative_as_padding": lambda m, c: m.forward_padded(with_one(c.tokens[..., ::-1], -1)[..., ::-1], lengths(c)),
    },
    "state": {
        "exported_state_with_a_layer_more": lambda m, c: m.import_state(misfit(c)),
        "exported_state_of_other_sizes": lambda m, c: m.import_state(narrower(c)),
        "position_past_the_end": lambda m, c: m.import_state(RecurrentState(2**63, init_state(c.batch, c.config).layers)),
    },
}  # by the verb that a port must claim for it
LOADING: dict[str, Callable[[Backend, Case], object]] = {
    "transposed_head": lambda b, c: b.load(c.params._replace(lm_head=c.params.lm_head[:, :-1]), c.config),
    "whole_numbers_as_weights": lambda b, c: b.load(Params(*(w.astype(np.int64) for w in c.params)), c.config),
    "no_such_dtype": lambda b, c: b.load(c.params, c.config, dtype="int8"),
    "no_such_device": lambda b, c: b.load(c.params, c.config, device="abacus"),
    "no_such_phase": lambda b, c: b.load(c.params, c.config, phase="half"),  # type: ignore[arg-type]  # that is the mistake
}


def observe(model: Model, case: Case) -> dict[str, Array]:
    """The error and its sentence for each mistake that a port's verbs allow to make."""
    origin = ORIGINS.get(model)
    return refused(model, case, origin.backend if origin else None)


def refused(model: Model, case: Case, backend: Backend | None) -> dict[str, Array]:
    """The same of the port that the model came from, where there is one."""
    claimed = backend.capabilities.verbs if backend else VERBS
    makers = {name: make for verb in claimed for name, make in MISTAKES.get(verb, {}).items()}
    seen = {name: refusal(lambda: make(model, case)) for name, make in makers.items()}  # noqa: B023  called at once
    if backend is not None:
        seen |= {name: refusal(lambda: make(backend, case)) for name, make in LOADING.items()}  # noqa: B023  likewise
    return seen


def refusal(make: Callable[[], object]) -> Array:
    """What was raised, as text."""
    try:
        make()
    except BDHError as error:
        return np.array(f"{type(error).__name__}: {error}")
    except Exception as error:  # noqa: BLE001  whatever a port raises instead is the finding
        return np.array(f"{type(error).__name__} (no BDHError): {error}")
    return np.array(NOTHING)


def judge(observed: dict[str, Array], case: Case, dtype: str, phase: Phase) -> list[Comparison]:
    """Sentence against sentence; where they name the port and what it has, error against error."""
    wanted = refused(Specification(case.params, case.config), case, NumpyBackend())
    return [held_against(name, str(said), str(wanted[name])) for name, said in observed.items()]


def held_against(name: str, said: str, wanted: str) -> Comparison:
    if name.startswith("no_such"):
        said, wanted = (text.split(":")[0] for text in (said, wanted))
    if said == wanted:
        return Comparison(name, 0.0, 0.0)
    return Comparison(name, float("inf"), 0.0, f"it says {said!r}, wanted {wanted!r}")
