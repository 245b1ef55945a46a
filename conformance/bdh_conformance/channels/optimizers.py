"""R16 as trainers need it: several batches to a step, optimisers that stop and go on, narrow weights that lose nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from bdh_conformance.channels.channel import Observed, against, expect_of, scalar
from bdh_conformance.channels.loading import claims, sibling
from bdh_conformance.channels.training import batch, rate, settings
from bdh_conformance.yardstick.agreement import Comparison
from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.noise import plain
from bdh_conformance.yardstick.reference import Rounding
from bdh_conformance.yardstick.tolerances import PRECISION
from bdh_spec import AdamW, BDHConfig, Model, OptimizerState, Params
from bdh_spec.dtypes import numpy_dtype
from bdh_spec.params import INIT_STD
from bdh_spec.rope import Phase

STOP, END = 3, 6  # the step after which an optimiser is taken out, and the last one

# Steps so small that one alone moves hardly a rounded weight, and so many that together they take it past three neighbours.
SMALL = 0.12
MANY = 24
EITHER = 0.3  # of its way that a set of rounded weights may be off; where steps get lost it is nearly 1
STEADY = AdamW(weight_decay=0.0, eps=1e-2, clip=None)


def observe_accumulation(model: Model, case: Case) -> Observed:
    """Steps of which each reads its texts one after the other: those that it makes reading all at once."""
    seen: Observed = {}
    optimizer = model.optimizer(settings(case))
    for step in range(STOP):
        tokens, targets = batch(case, step)
        texts = [(tokens[b : b + 1], targets[b : b + 1]) for b in range(case.batch)]
        seen[f"{step}.loss"] = scalar(model.train_on(optimizer, texts, rate=rate(case, step)))
    return seen | weights(model, "end")


def observe_optimizer(model: Model, case: Case) -> Observed:
    """What an optimiser remembers, the steps that another model makes with it, and those made with moments that are given."""
    third = sibling(model, case, lambda params: params, case.config.n_layer)  # before anything has moved
    optimizer = model.optimizer(settings(case))
    for step in range(STOP):
        model.train_step(optimizer, *batch(case, step), rate=rate(case, step))
    state, params = model.export_optimizer(optimizer), model.params()
    model.train_step(optimizer, *batch(case, STOP))  # what is exported must not move on
    seen = remembered(state, "stopped")
    other = sibling(model, case, lambda _: params, case.config.n_layer)
    again = other.import_optimizer(state)
    for step in range(STOP, END):
        seen[f"{step}.loss"] = scalar(other.train_step(again, *batch(case, step), rate=rate(case, step)))
    seen |= weights(other, "end")
    from_elsewhere = third.import_optimizer(given(case))
    seen |= remembered(third.export_optimizer(from_elsewhere), "given")
    third.train_step(from_elsewhere, *batch(case, 0))
    return seen | weights(third, "given.moved")


def given(case: Case) -> OptimizerState:
    """What an optimiser of another port might remember after seven steps."""
    rng = np.random.default_rng([case.seed, 16])
    first = Params(*(rng.normal(0, 0.01, w.shape) for w in case.params))
    second = Params(*(rng.uniform(0.5, 1.5, w.shape) * 1e-4 for w in case.params))
    return OptimizerState(settings(case), 7, first, second)


def remembered(state: OptimizerState, name: str) -> Observed:
    """The numbers of an optimiser."""
    held = {"first": state.first, "second": state.second}
    moments = {f"{name}.{which}.{key}": np.ravel(m) for which, five in held.items() for key, m in five._asdict().items()}
    return {f"{name}.step": scalar(state.step), **moments}


def weights(model: Model, name: str) -> Observed:
    """The weights as they are now."""
    return {f"{name}.weights.{key}": np.ravel(weight) for key, weight in model.params()._asdict().items()}


def observe_resumption(model: Model, case: Case) -> Observed:
    """Pairs of runs with dropout: ``name`` goes through, ``name.again`` is stopped, carried into another model, and goes on."""
    stopped = sibling(model, case, lambda params: params, case.config.n_layer)
    through, before = (m.optimizer(settings(case)) for m in (model, stopped))
    for step in range(STOP):
        stopped.train_step(before, *batch(case, step), rate=rate(case, step))
    state, params = stopped.export_optimizer(before), stopped.params()
    resumed = sibling(model, case, lambda _: state.masters or params, case.config.n_layer)
    after = resumed.import_optimizer(state)
    seen: Observed = {}
    for step in range(END):
        loss = model.train_step(through, *batch(case, step), rate=rate(case, step))
        if step >= STOP:
            seen[f"{step}.loss"] = scalar(loss)
            seen[f"{step}.loss.again"] = scalar(resumed.train_step(after, *batch(case, step), rate=rate(case, step)))
    ends = weights(model, "end"), weights(resumed, "end")
    return seen | ends[0] | {f"{name}.again": weight for name, weight in ends[1].items()}


def dropping(case: Case) -> Case:
    """The case with dropout."""
    return replace(case, config=replace(case.config, dropout=0.25))


# Found by search: what rounding makes of its moves is a fifth of them at most, and mostly a hundredth.
MASTERS = (Case(BDHConfig(1, 8, 0.0, 2, 4, 11), 2, 6, seed=0, scale=5.0),)


def observe_masters(model: Model, case: Case) -> Observed:
    """How far narrow weights move in many small steps: what rounding takes off in each is not lost."""
    before = model.params()
    optimizer = model.optimizer(STEADY)
    dtype = model.held.name if isinstance(model, Rounding) else model.dtype
    small = SMALL * 2 * PRECISION[dtype].unit * INIT_STD * case.scale
    for _ in range(MANY):
        model.train_step(optimizer, case.tokens, case.targets, rate=small)
    seen = moved(before, model.params(), "moved")
    if claims(model, "optimizer"):
        state = model.export_optimizer(optimizer)
        seen |= moved(before, state.masters or model.params(), "unrounded")
        seen |= {f"{name}.rounded": scalar(is_rounded(five, dtype)) for name, five in (("m", state.first), ("v", state.second))}
    return seen


def judge_masters(observed: Observed, case: Case, dtype: str, phase: Phase) -> list[Comparison]:
    """Against the specification; but a rounded weight that ends between two neighbours may have become either of them."""
    expected = expect_of((partial(Rounding, held=dtype),), observe_masters, case, dtype, phase)
    rounded = {k: replace(e, allowed=max(e.allowed, EITHER)) for k, e in expected.items() if k.startswith("moved.")}
    return against(observed, {name: e for name, e in (expected | rounded).items() if name in observed})


def is_rounded(five: Params, dtype: str) -> bool:
    """Whether numbers that should be float32 at least are all numbers of a narrow dtype."""
    narrow = numpy_dtype(dtype)
    return all(bool(np.array_equal(plain(v).astype(narrow).astype(np.float64), plain(v).astype(np.float64))) for v in five)


def moved(before: Params, after: Params, name: str) -> Observed:
    """The way of each weight from where it was."""
    return {f"{name}.{key}": np.ravel(a - b) for key, a, b in zip(Params._fields, after, before, strict=True)}
