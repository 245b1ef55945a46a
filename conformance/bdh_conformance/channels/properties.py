"""What must be equal without any reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bdh_conformance.channels.channel import Observed, expect_of
from bdh_conformance.channels.loading import ORIGINS, claims, load_params
from bdh_conformance.channels.recurrent import ragged, read
from bdh_conformance.yardstick.agreement import Comparison, by_pair, compare
from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.reference import Specification, Stepwise
from bdh_conformance.yardstick.tolerances import Expectation
from bdh_spec import Model, Params
from bdh_spec.model import init_state
from bdh_spec.params import Array
from bdh_spec.rope import Phase


def observe_properties(model: Model, case: Case) -> Observed:
    """What must be equal without any reference: ``name`` and ``name.again`` are one up to rounding."""
    logits = model.forward(case.tokens)
    later = case.tokens.copy()
    later[:, -1] = (later[:, -1] + 1) % case.config.vocab_size
    seen = {"causality": logits[:, :-1], "causality.again": model.forward(later)[:, :-1]} if case.time > 1 else {}
    if claims(model, "advance"):
        seen |= {"chunking": logits, "chunking.again": read(model, case.tokens, ragged(case.time))}
    if claims(model, "advance", "state"):
        seen |= added(model, case) | (shifted(model, case, logits) if is_relative(model, case) else {})
    return seen | permuted(model, case, logits)


def is_relative(model: Model, case: Case) -> bool:
    """Whether an offset of positions changes nothing: where every pair of neurons is rotated, by exact phases."""
    freqs = case.config.freqs
    return model.phase == "exact" and (freqs is None or freqs.in_pairs)


def shifted(model: Model, case: Case, logits: Array) -> Observed:
    """Rotations are relative: a text that begins later is the same text."""
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
