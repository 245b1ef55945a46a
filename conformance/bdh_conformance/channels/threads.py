"""Threads: a model may be loaded on one, used on another, and asked by several at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier
from typing import Any, TypeAlias

import numpy as np

from bdh_conformance.channels.channel import Observed, scalar
from bdh_conformance.channels.loading import ORIGINS, claims, sibling
from bdh_conformance.channels.recurrent import read
from bdh_conformance.channels.training import batch, settings
from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.sizes import in_reads_of
from bdh_spec import Model
from bdh_spec.params import Array

Run: TypeAlias = Callable[[Callable[[], Any]], Any]  # makes a call, perhaps on another thread

AT_ONCE = 4  # threads
ROUNDS = 5  # texts that each of them reads
TRAINED = 2  # models
LONGER = 5  # times the case's text, so that the threads meet


def observe_threads(model: Model, case: Case) -> Observed:
    """What a model says on other threads than the one it was loaded on, alone and beside others.

    Where nobody came from a port, in the specification, there is one thread only.
    """
    spread = ORIGINS.get(model) is not None
    run: Run = elsewhere if spread else here
    seen = {"elsewhere.logits": run(lambda: model.forward(case.tokens))}
    if claims(model, "advance"):
        seen |= decoded(model, case, run)
    if claims(model, "loss"):
        seen["elsewhere.loss"] = scalar(run(lambda: model.loss(case.tokens, case.targets)))
    if claims(model, "trace"):
        seen["elsewhere.trace.logits"] = run(lambda: model.trace(case.tokens))["logits"]
    if claims(model, "padded"):
        seen["elsewhere.padded.logits"] = run(lambda: model.forward_padded(case.tokens, np.full(case.batch, case.time)))
    if claims(model, "gradients"):
        seen |= {
            f"elsewhere.gradients.{k}": s
            for k, s in run(lambda: model.gradients(case.tokens, case.targets))[1]._asdict().items()
        }
    if claims(model, "train"):
        fresh = run(lambda: sibling(model, case, lambda params: params, case.config.n_layer))
        optimizer = run(lambda: fresh.optimizer(settings(case)))
        for step in range(2):
            loss = run(lambda: fresh.train_step(optimizer, *batch(case, step)))  # noqa: B023  called at once
            seen[f"elsewhere.{step}.loss"] = scalar(loss)
        seen |= trained_at_once(model, case, spread)
    return seen | at_once(model, case, spread)


def trained_at_once(model: Model, case: Case, spread: bool) -> Observed:
    """The losses of models of their own, each trained on a thread of its own at the same time."""
    start = Barrier(TRAINED if spread else 1)

    def train(_: int) -> list[float]:
        fresh = sibling(model, case, lambda params: params, case.config.n_layer)
        optimizer = fresh.optimizer(settings(case))
        start.wait()
        return [fresh.train_step(optimizer, *batch(case, step)) for step in range(3)]

    if not spread:
        losses = [train(0)] * TRAINED
    else:
        with hasty_threads(), ThreadPoolExecutor(TRAINED) as pool:
            losses = list(pool.map(train, range(TRAINED)))
    return {f"trained_at_once.{i}.{step}.loss": scalar(loss) for i, row in enumerate(losses) for step, loss in enumerate(row)}


def decoded(model: Model, case: Case, run: Run) -> Observed:
    """A text whose every token is read on a thread of its own."""
    state, logits = run(lambda: model.init_state(case.batch)), []
    for t in range(case.time):
        part, state = run(lambda: model.advance(state, case.tokens[:, t : t + 1]))  # noqa: B023  called at once
        logits.append(part)
    seen = {"elsewhere.decode.logits": np.concatenate(logits, axis=1)}
    if claims(model, "state"):
        back = run(lambda: model.import_state(run(lambda: model.export_state(state))))
        seen["elsewhere.state.logits"] = run(lambda: model.advance(back, case.tokens)[0])
    return seen


def at_once(model: Model, case: Case, spread: bool) -> Observed:
    """Texts read by several threads at the same time: of all their answers the one that is furthest from that given alone."""
    texts = [np.tile((case.tokens + i) % case.config.vocab_size, (1, LONGER)) for i in range(AT_ONCE)]
    calls: dict[str, Callable[[Array], Array]] = {"logits": model.forward}
    if claims(model, "advance"):
        # In pieces, for the states before the first one are all alike.
        calls["decode.logits"] = lambda tokens: read(model, tokens, in_reads_of(-(-tokens.shape[1] // 3), tokens.shape[1]))
    if claims(model, "loss"):
        calls["loss"] = lambda tokens: scalar(model.loss(tokens, tokens))
    if claims(model, "gradients"):
        calls["gradients.lm_head"] = lambda tokens: model.gradients(tokens, tokens)[1].lm_head
    if claims(model, "trace"):
        calls["trace.logits"] = lambda tokens: model.trace(tokens)["logits"]
    if claims(model, "padded"):
        calls["padded.logits"] = lambda tokens: model.forward_padded(tokens, np.full(len(tokens), tokens.shape[1]))
    seen: Observed = {}
    for name, call in calls.items():
        alone = [call(tokens) for tokens in texts]
        answers = together(call, texts, alone) if spread else alone
        seen |= {f"at_once.{i}.{name}": answer for i, answer in enumerate(answers)}
    return seen


def together(call: Callable[[Array], Array], texts: list[Array], alone: list[Array]) -> list[Array]:
    """The worst answer for each text, when each thread asks for its own again and again."""
    start = Barrier(len(texts))

    def ask(tokens: Array, right: Array) -> Array:
        start.wait()
        answers = [np.array(call(tokens)) for _ in range(ROUNDS)]
        return max(answers, key=lambda answer: far(answer, right))

    with hasty_threads(), ThreadPoolExecutor(len(texts)) as pool:
        return list(pool.map(ask, texts, alone))


def far(answer: Array, right: Array) -> float:
    """The largest difference; NaN and other shapes are the furthest."""
    away = float(np.abs(answer - right).max(initial=0)) if answer.shape == right.shape else np.inf
    return away if away == away else np.inf


def here(call: Callable[[], Any]) -> Any:
    """The result of a call."""
    return call()


def elsewhere(call: Callable[[], Any]) -> Any:
    """The result of a call made on a thread that ends with it."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


@contextmanager
def hasty_threads() -> Iterator[None]:
    """Python passes from thread to thread much more often than it is used to."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)
