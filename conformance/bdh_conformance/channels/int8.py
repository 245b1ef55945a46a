"""Weights in int8 (R17): everything that a port computes, given values and scales and not the numbers that they stand for."""

from __future__ import annotations

from dataclasses import replace

from bdh_conformance.channels.channel import Observed, scalar
from bdh_conformance.channels.frequencies import observe_decode, observe_padded, observe_steps, prefixed
from bdh_conformance.channels.loading import claims
from bdh_conformance.channels.recurrent import memories, read
from bdh_conformance.channels.training import trainable
from bdh_conformance.yardstick import kinks
from bdh_conformance.yardstick.cases import Case
from bdh_spec import Model


def with_int8(case: Case) -> Case:
    """The case with weights in int8, without dropout, and with relus that rounding does not flip."""
    return trainable(replace(case, stored="int8"))


def observe_int8(model: Model, case: Case) -> Observed:
    """Whatever the port claims, of a model whose weights it was given in int8; of a large one its logits, read in all ways."""
    seen = {"logits": model.forward(case.tokens)} | observe_decode(model, case)
    if kinks.crowded(case):
        return seen
    seen |= observe_padded(model, case)
    if claims(model, "trace"):
        seen |= prefixed("trace", model.trace(case.tokens))
    if claims(model, "loss"):
        seen["loss"] = scalar(model.loss(case.tokens, case.targets))
    if claims(model, "advance", "state"):
        seen |= memories("whole", model.export_state(model.advance(model.init_state(case.batch), case.tokens)[1]))
    if claims(model, "gradients"):
        _, slopes = model.gradients(case.tokens, case.targets)
        seen |= prefixed("gradients", slopes._asdict())
    return seen | (observe_moved(model, case) if claims(model, "train") else {})


def observe_moved(model: Model, case: Case) -> Observed:
    """Some steps of training, which move what the weights stand for; then the text again, token by token."""
    seen = observe_steps(model, case)
    if claims(model, "advance"):
        seen["trained.ones.logits"] = read(model, case.tokens, (1,) * case.time)
    return seen
