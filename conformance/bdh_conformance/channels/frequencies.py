"""Frequencies of a model's own (R4): everything that a port computes, by a table that an optimiser has moved."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bdh_conformance.channels.channel import Observed, scalar
from bdh_conformance.channels.loading import claims
from bdh_conformance.channels.parallel import at_once
from bdh_conformance.channels.recurrent import memories, ragged, read
from bdh_conformance.channels.training import batch, settings, trainable
from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.reference import Stepwise
from bdh_conformance.yardstick.sizes import LONG
from bdh_spec import Model, RecurrentState
from bdh_spec.rope import Phase

LATER: dict[Phase, tuple[int, ...]] = {"exact": (300, 10**6, 2**40 + 7), "float32": (300, 70_000)}
STEPS = 2


def with_own(case: Case) -> Case:
    """The case with a table of its own, without dropout, and with relus that rounding does not flip."""
    return trainable(replace(case, freqs=case.freqs if case.freqs != "published" else "trained"))


def observe_frequencies(model: Model, case: Case) -> Observed:
    """Whatever the port claims, on a model that brings its own table; of a long text the logits."""
    logits = model.forward(case.tokens)
    if case.time > LONG:
        return {"logits": logits}
    seen = {"logits": logits} | observe_decode(model, case) | observe_padded(model, case)
    if claims(model, "trace"):
        seen |= prefixed("trace", model.trace(case.tokens))
    if claims(model, "loss"):
        seen["loss"] = scalar(model.loss(case.tokens, case.targets))
    if claims(model, "gradients"):
        _, slopes = model.gradients(case.tokens, case.targets)
        seen |= prefixed("gradients", slopes._asdict())
    if claims(model, "advance", "state"):
        seen |= observe_later(model, case)
    return seen | (observe_steps(model, case) if claims(model, "train") else {})


def frequencies_reference(model: Model, case: Case) -> Observed:
    """The same; of a long text from one reading, as it is written or by way of a state: a port may go either."""
    if case.time <= LONG:
        return observe_frequencies(model, case)
    return {"logits": at_once(model, case.tokens) if isinstance(model, Stepwise) else model.forward(case.tokens)}


def observe_decode(model: Model, case: Case) -> Observed:
    """The text token by token and in pieces."""
    if not claims(model, "advance"):
        return {}
    plans = {"ones": (1,) * case.time, "ragged": ragged(case.time)}
    return {f"{name}.logits": read(model, case.tokens, plan) for name, plan in plans.items()}


def observe_padded(model: Model, case: Case) -> Observed:
    """Texts of different lengths, whose positions count from the first token of each."""
    if not claims(model, "padded"):
        return {}
    lengths = np.maximum(case.time - 1 - np.arange(case.batch) % 2, 1)  # of one token alone no position shows
    is_padding = np.arange(case.time) < case.time - lengths[:, None]  # B T
    drawn = np.random.default_rng(case.seed).integers(0, case.config.vocab_size, case.tokens.shape)
    return {"padded.logits": model.forward_padded(np.where(is_padding, drawn, case.tokens), lengths)}


def observe_later(model: Model, case: Case) -> Observed:
    """The rest of a text whose beginning is remembered, at positions where the table makes another function of it."""
    half = max(case.time // 2, 1)
    begun = model.export_state(model.advance(model.init_state(case.batch), case.tokens[:, :half])[1])
    seen: Observed = memories("begun", begun)
    for start in LATER[model.phase]:
        state, logits = model.import_state(RecurrentState(start, begun.layers)), []
        for part in (case.tokens, case.tokens[:, :1]):  # a chunk, then a single token
            answer, state = model.advance(state, part)
            logits.append(answer)
        seen |= {f"at_{start}.logits": np.concatenate(logits, axis=1)} | memories(f"at_{start}", model.export_state(state))
    return seen


def observe_steps(model: Model, case: Case) -> Observed:
    """Some steps of training, and what the model then says: the table stays as it is."""
    optimizer = model.optimizer(settings(case))
    losses = {f"{step}.step.loss": scalar(model.train_step(optimizer, *batch(case, step))) for step in range(STEPS)}
    weights = {f"trained.weights.{name}": np.ravel(weight) for name, weight in model.params()._asdict().items()}
    return losses | weights | {"trained.logits": model.forward(case.tokens)}


def prefixed(prefix: str, seen: Observed) -> Observed:
    """An observation among others."""
    return {f"{prefix}.{name}": value for name, value in seen.items()}
