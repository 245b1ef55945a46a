"""Each stage of a trace from the stages before it as a port has them: which one is wrong, and which merely amplifies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from bdh_conformance.yardstick.agreement import Comparison, compare
from bdh_conformance.yardstick.noise import Noisy
from bdh_conformance.yardstick.tolerances import expect
from bdh_spec.config import BDHConfig
from bdh_spec.model import embed, frequencies_of, layer_norm, merge_heads, readout, relu, scores
from bdh_spec.params import Array, Params
from bdh_spec.rope import Phase, rope, rotation

Trace = Mapping[str, Array]


def blame(trace: Trace, tokens: Array, params: Params, config: BDHConfig, dtype: str, phase: Phase, first: str) -> str:
    """Where a trace that differs first at a stage goes wrong, in words; nothing where it is that stage.

    An error that is within the tolerance of one stage may be beyond that of a later one, which did nothing wrong.
    """
    names = list(trace)[: list(trace).index(first) + 1]
    wrong = next(
        (c for c in by_themselves(trace, tokens, params, config, dtype, phase) if c.complaint or c.stage == first), None
    )
    if wrong is None or wrong.stage not in names or (wrong.complaint and wrong.stage == first):
        return ""
    if wrong.complaint:
        return f"{first} amplifies it: the specification makes something else of what stands before {wrong.stage}"
    return f"{first} follows from the stages before it and amplifies what they are off by: the mistake is earlier"


def by_themselves(
    trace: Trace, tokens: Array, params: Params, config: BDHConfig, dtype: str, phase: Phase
) -> Iterator[Comparison]:
    """Every stage against what the specification makes of the port's own stages before it."""

    def run(held: Params) -> dict[str, Array]:
        return dict(from_own(trace, tokens, held, config, phase))

    for name, expectation in expect(run, params, dtype).items():
        yield compare(name, trace[name], expectation)


def from_own(trace: Trace, tokens: Array, params: Params, config: BDHConfig, phase: Phase) -> Iterator[tuple[str, Array]]:
    """What the specification makes of the stages before each, in the precision of the weights."""

    def own(name: str) -> Array:
        weight = params.embed
        if isinstance(weight, Noisy):
            return Noisy.wrap(trace[name], weight.precision, weight.rng)
        return trace[name].astype(weight.dtype)

    cos, sin = rotation(0, tokens.shape[1], frequencies_of(config), params.encoder.dtype, phase)
    yield "embed", embed(tokens, params)
    x = own("embed")
    for i in range(config.n_layer):
        at = f"layers.{i}."
        yield f"{at}x_sparse", relu(x[:, None] @ params.encoder)
        yield f"{at}rotated", rope(own(f"{at}x_sparse"), cos, sin)
        yield f"{at}scores", scores(own(f"{at}rotated"))
        yield f"{at}attention", own(f"{at}scores") @ x[:, None]
        yield f"{at}yKV", layer_norm(own(f"{at}attention"))
        yield f"{at}y_sparse", relu(own(f"{at}yKV") @ params.encoder_v)
        yield f"{at}xy_sparse", own(f"{at}x_sparse") * own(f"{at}y_sparse")
        yield f"{at}decoded", merge_heads(own(f"{at}xy_sparse")) @ params.decoder
        yield f"{at}y", layer_norm(own(f"{at}decoded"))
        yield f"{at}x", layer_norm(x + own(f"{at}y"))
        x = own(f"{at}x")
    yield "logits", readout(x, params)


def is_whole(trace: object, config: BDHConfig) -> bool:
    """Whether every stage is there, as an array of finite numbers: only then can each be made from those before it."""
    if not isinstance(trace, Mapping):
        return False
    stages = ("x_sparse", "rotated", "scores", "attention", "yKV", "y_sparse", "xy_sparse", "decoded", "y", "x")
    names = ["embed", *(f"layers.{i}.{stage}" for i in range(config.n_layer) for stage in stages), "logits"]
    return list(trace) == names and all(isinstance(v, np.ndarray) and np.isfinite(v).all() for v in trace.values())
