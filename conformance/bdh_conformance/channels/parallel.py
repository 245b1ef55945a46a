"""The parallel form: logits, stages, losses, slopes, texts beside one another and texts behind padding."""

from __future__ import annotations

import numpy as np

from bdh_conformance.channels.channel import Observed, scalar
from bdh_conformance.yardstick.cases import Case
from bdh_spec import Model
from bdh_spec.params import Array


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
