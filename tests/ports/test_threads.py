"""Models that are loaded on one thread and used on others, by one at a time or by several at once."""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from threading import Barrier
from typing import Any, TypeVar

import numpy as np
import pytest

import bdh_spec
from bdh_conformance import Expectation, assert_agrees
from bdh_conformance.channels import CHANNELS
from bdh_conformance.channels.loading import ORIGINS, Origin
from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_spec import AdamW, Model

Item = TypeVar("Item")
Result = TypeVar("Result")

CASE = Case(CONFIGS["plain"], time=6, seed=1, scale=20)
THREADS = 4
ROUNDS = 5  # of what runs at once: a race is lost sooner or later
NEW = 8


def elsewhere(work: Callable[..., Result], *args: Any, **settings: Any) -> Result:
    """What work gives on a thread of its own, which has ended by then."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work, *args, **settings).result()


def at_once(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """What work gives for each item, on threads that begin together."""
    together = Barrier(len(items))

    def begin(item: Item) -> Result:
        together.wait()
        return work(item)

    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(begin, items))


class Wandering:
    """A model each of whose calls runs on another thread."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._model, name)
        return partial(elsewhere, value) if callable(value) else value


@cache
def prepared(channel: str) -> Case:
    case = CHANNELS[channel].prepare(CASE)
    assert case is not None
    return case


@cache
def expected(channel: str) -> dict[str, Expectation]:
    return CHANNELS[channel].expected(prepared(channel), "float32")


def load(port: str, case: Case, dtype: str = "float32") -> Model:
    return bdh_spec.get_backend(port).load(case.params, case.config, device="cpu", dtype=dtype)


def texts(model: Model, seed: int) -> list[list[int]]:
    return model.generate(CASE.tokens, NEW, seed=seed).tolist()


@pytest.mark.parametrize("channel", ["logits", "traces", "loss", "gradients", "states", "decode", "training"])
def test_a_model_is_loaded_on_one_thread_and_each_call_may_come_from_another(port: str, channel: str) -> None:
    """States and optimisers among them, which the threads that made them leave behind."""
    case = prepared(channel)
    wandering: Any = Wandering(elsewhere(load, port, case))
    ORIGINS[wandering] = Origin(bdh_spec.get_backend(port), "cpu", "float32", "exact")  # whose verbs it has
    observed = CHANNELS[channel].observe(wandering, case)
    wanted = {name: e for name, e in expected(channel).items() if name in observed or not CHANNELS[channel].partial}
    assert_agrees(port, observed, wanted, str(case))


@pytest.mark.parametrize("channel", ["logits", "traces", "loss", "gradients", "states", "decode"])
def test_several_threads_may_ask_one_model_at_once(port: str, channel: str) -> None:
    case = prepared(channel)
    model = load(port, case)
    for _ in range(ROUNDS):
        for observed in at_once(lambda _: CHANNELS[channel].observe(model, case), range(THREADS)):
            assert_agrees(port, observed, expected(channel), str(case))


def test_r14_texts_written_at_once_are_those_written_alone(port: str) -> None:
    model = load(port, CASE)
    alone = [texts(model, seed) for seed in range(THREADS)]
    assert len(set(map(str, alone))) == THREADS
    for _ in range(ROUNDS):
        assert at_once(partial(texts, model), range(THREADS)) == alone


def test_r14_each_token_of_a_text_may_be_drawn_on_another_thread(port: str) -> None:
    model = load(port, CASE)
    stream = model.stream(CASE.tokens, NEW, seed=3)
    written = np.stack([elsewhere(next, stream)[0] for _ in range(NEW)], axis=1)
    assert written.tolist() == model.generate(CASE.tokens, NEW, seed=3)[:, CASE.time :].tolist()


def test_several_threads_may_go_on_from_one_state(port: str) -> None:
    model = load(port, CASE)
    _, state = elsewhere(model.advance, elsewhere(model.init_state, CASE.batch), CASE.tokens[:, :-1])
    last = {"prefill.logits": expected("decode")["again.logits"]}
    for logits, _ in at_once(lambda _: model.advance(state, CASE.tokens[:, -1:]), range(THREADS)):
        assert_agrees(port, {"prefill.logits": logits}, last)


def test_models_of_different_dtypes_work_at_once(port: str) -> None:
    dtypes = bdh_spec.get_backend(port).capabilities.dtypes
    channel = CHANNELS["states"]

    def observe(dtype: str) -> dict[str, np.ndarray]:
        return channel.observe(elsewhere(load, port, CASE, dtype), CASE)

    for _ in range(ROUNDS):
        for dtype, observed in zip(dtypes, at_once(observe, dtypes), strict=True):
            assert_agrees(port, observed, channel.expected(CASE, dtype), dtype)


def test_r8_models_trained_at_once_drop_what_they_drop_alone(port: str) -> None:
    case = dataclasses.replace(CASE, config=dataclasses.replace(CASE.config, dropout=0.5))

    def losses(seed: int) -> list[float]:
        model = load(port, case)
        optimizer = model.optimizer(AdamW(learning_rate=0.0, weight_decay=0.0, seed=seed))
        return [elsewhere(model.train_step, optimizer, case.tokens, case.targets) for _ in range(2 * ROUNDS)]

    alone = [losses(seed) for seed in range(THREADS)]
    assert len(set(map(str, alone))) == THREADS
    assert np.allclose(at_once(losses, range(THREADS)), alone, rtol=1e-4)
