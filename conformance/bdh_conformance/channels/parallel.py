"""The parallel form: logits, stages, losses, slopes, texts beside one another and texts behind padding."""

from __future__ import annotations

import numpy as np

from bdh_conformance.channels.channel import Observed, scalar
from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.sizes import LONG, few_lengths, lengths
from bdh_spec import Model
from bdh_spec.model import IGNORE, loss
from bdh_spec.params import Array


def observe_logits(model: Model, case: Case) -> Observed:
    """The logits of a text, and of its beginnings if it is long."""
    seen = {f"of_{length}.logits": model.forward(case.tokens[:, :length]) for length in lengths(case)}
    return {"logits": model.forward(case.tokens)} | seen


def logits_reference(model: Model, case: Case) -> Observed:
    """The same from one reading: what follows in a text changes no earlier logit."""
    logits = at_once(model, case.tokens)
    return {"logits": logits} | {f"of_{length}.logits": logits[:, :length] for length in lengths(case)}


def at_once(model: Model, tokens: Array) -> Array:
    """The specification's logits of tokens (B, T); of many by way of a state, where scores would grow by the square of T."""
    if tokens.shape[1] <= LONG:
        return model.forward(tokens)
    return model.advance(model.init_state(tokens.shape[0]), tokens)[0]


def observe_traces(model: Model, case: Case) -> Observed:
    return model.trace(case.tokens)


def observe_loss(model: Model, case: Case) -> Observed:
    """The loss with an ignored target, with none, with a text of which none counts; and of the beginnings of a long text."""
    return {name: scalar(model.loss(case.tokens[:, : y.shape[1]], y)) for name, y in loss_targets(case).items()}


def loss_reference(model: Model, case: Case) -> Observed:
    """The same from one reading."""
    logits = at_once(model, case.tokens)
    return {name: np.asarray(loss(logits[:, : y.shape[1]], y)) for name, y in loss_targets(case).items()}


def loss_targets(case: Case) -> dict[str, Array]:
    """The targets (B, T) of each loss that is asked for."""
    beginnings = {f"of_{length}.loss": case.targets[:, :length] for length in few_lengths(case)}
    whole = {"loss": case.targets, "none_ignored.loss": np.where(case.targets == IGNORE, 0, case.targets)}
    return whole | ignored(case) | {name: y for name, y in beginnings.items() if (y != IGNORE).any()}


def ignored(case: Case) -> dict[str, Array]:
    """Targets of which those of the first text do not count, of which half do not, and of which the last alone counts."""
    if case.targets.size == 1:
        return {}
    targets = np.where(case.targets == IGNORE, 0, case.targets)
    drawn = np.random.default_rng(case.seed).random(targets.shape) < 0.5
    drawn.flat[0], last = False, np.full_like(targets, IGNORE)
    last[-1, -1] = targets[-1, -1]
    found = {"half_ignored.loss": np.where(drawn, IGNORE, targets), "last_alone.loss": last}
    if case.batch > 1:
        targets[0] = IGNORE
        found["text_ignored.loss"] = targets
    return found


def observe_gradients(model: Model, case: Case) -> Observed:
    """The slopes of a loss with an ignored target; of losses with more of them ignored as well."""
    seen: Observed = {}
    others = ignored(case) if case.time <= LONG else {}
    for name, targets in ({"": case.targets} | others).items():
        value, slopes = model.gradients(case.tokens, targets)
        prefix = name.removesuffix("loss")
        seen |= {f"{prefix}loss": scalar(value)}
        seen |= {f"{prefix}gradients.{weight}": slope for weight, slope in slopes._asdict().items()}
    return seen


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
    for name, of_texts in padded_lengths(case).items():
        is_padding = np.arange(case.time) < case.time - of_texts[:, None]  # B T
        for kind, ids in paddings(case).items():
            tokens = np.where(is_padding, ids, case.tokens)
            seen[f"{name}.{kind}.logits"] = model.forward_padded(tokens, of_texts)
    return seen


def padding_reference(model: Model, case: Case) -> Observed:
    """The same from each text by itself."""
    seen: Observed = {}
    for name, of_texts in padded_lengths(case).items():
        logits = np.zeros((case.batch, case.time, case.config.vocab_size))
        for b, start in enumerate(case.time - of_texts):
            logits[b, start:] = at_once(model, case.tokens[b : b + 1, start:])[0]
        seen |= {f"{name}.{kind}.logits": logits for kind in paddings(case)}
    return seen


def padded_lengths(case: Case) -> dict[str, Array]:
    """How long the texts of a batch are: from one token to the whole row, the other way round, and in between."""
    B, T = case.batch, case.time
    if found := lengths(case):
        return {"long": np.random.default_rng(case.seed).choice(found, B)}
    rising, falling = (np.linspace(*ends, B).round().astype(np.int64) for ends in ((1, T), (T, 1)))
    return {"rising": rising, "falling": falling, "middle": T // 2 + np.arange(B) % 2}


def paddings(case: Case) -> dict[str, Array]:
    """The ids (B, T) that padding is made of."""
    V, shape = case.config.vocab_size, (case.batch, case.time)
    drawn = np.random.default_rng(case.seed).integers(0, V, shape)
    if case.time > LONG:
        return {"drawn": drawn}
    return {"zeros": np.zeros(shape, np.int64), "last_id": np.full(shape, V - 1), "drawn": drawn}
