"""The order of calls: lengths, batches, states and models in turns. Whatever a port keeps for the next call must fit it."""

from __future__ import annotations

import numpy as np

from bdh_conformance.channels.channel import Observed
from bdh_conformance.channels.loading import claims, sibling
from bdh_conformance.yardstick.cases import Case
from bdh_spec import Model, Params


def observe_order(model: Model, case: Case) -> Observed:
    """Texts of several lengths and batches, one after another and again, with other models in between."""
    seen = in_turns(model, case, "first")
    for name, other in others(model, case).items():
        seen[f"{name}.logits"] = other.forward(case.tokens)
        seen[f"after_{name}.logits"] = model.forward(case.tokens)
    return (
        seen
        | in_turns(model, case, "again")
        | in_place(model, case)
        | (states_in_turns(model, case) if claims(model, "advance") else {})
    )


def in_turns(model: Model, case: Case, name: str) -> Observed:
    """Texts of different shapes, long and short, many and few; those of one shape are different texts."""
    B, T = case.tokens.shape
    shapes = [(B, T), (1, T), (B, T - 1), (1, 1), (B, T), (B, 1), (1, T - 1)]
    return {f"{name}.{i}.logits": model.forward(np.roll(case.tokens, i)[:b, :t]) for i, (b, t) in enumerate(shapes)}


def in_place(model: Model, case: Case) -> Observed:
    """Two texts from one array: its owner writes the second over the first."""
    tokens, seen = case.tokens.copy(), {}
    for name, shift in (("one", 0), ("other", 1)):
        tokens[...] = np.roll(case.tokens, shift)
        seen[f"in_place.{name}.logits"] = model.forward(tokens)
        if claims(model, "advance"):
            seen[f"in_place.{name}.decode.logits"] = model.advance(model.init_state(case.batch), tokens)[0]
    return seen


def others(model: Model, case: Case) -> dict[str, Model]:
    """Models beside this one: of other weights, and of another depth."""

    def mirrored(params: Params) -> Params:
        return params._replace(lm_head=-params.lm_head, encoder=params.encoder[..., ::-1].copy())

    c = case.config
    return {
        "other": sibling(model, case, mirrored, c.n_layer),
        "deeper": sibling(model, case, lambda params: params, c.n_layer + 1),
    }


def states_in_turns(model: Model, case: Case) -> Observed:
    """Two texts read by turns, one state kept and one given away at each step; then the first again from its kept states."""
    B, T = case.tokens.shape
    seen: Observed = {}
    kept, given = [model.init_state(B)], model.init_state(1)
    for t in range(T):
        logits, state = model.advance(kept[-1], case.tokens[:, t : t + 1])
        kept.append(state)
        alone, given = model.advance(given, case.tokens[:1, T - 1 - t : T - t], donate=True)
        seen |= {f"turn_{t}.kept.logits": logits, f"turn_{t}.given.logits": alone}
    for t in (0, T // 2):
        seen[f"from_{t}.logits"] = model.advance(kept[t], case.tokens[:, t:])[0]
    return seen
