"""A port through the protocol, NumPy in and NumPy out, beside the plain form in NumPy: for every port without a module here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import numpy as np

from bdh_bench import plain_numpy as plain
from bdh_bench.sides import COMPILED, OURS, RATE, AbsentError, Framework, Named, Runner, Task, find_port
from bdh_spec import AdamW, Model
from bdh_spec.params import Array, Params


class Protocol(Framework):
    """Ports behind the protocol."""

    name: ClassVar[str] = "numpy"

    def facts(self) -> dict[str, str]:
        return {"framework": f"numpy {np.__version__}", "device": self.device}

    def runner(self, task: Task, params: Params) -> Runner:
        if task.side == OURS:
            return ours(task, find_port(task.port).load(params, task.config, device=task.device, dtype=task.dtype))
        if task.side == COMPILED or task.dtype != "float32":
            raise AbsentError(f"NumPy has no {task.side} form in {task.dtype}")
        return plain_runner(task, params)

    def product(self, n: int, dtype: str) -> Callable[[], object]:
        if dtype != "float32":
            raise AbsentError(f"NumPy has no products in {dtype}")
        a, b, out = np.ones((n, n), np.float32), np.ones((n, n), np.float32), np.empty((n, n), np.float32)
        return lambda: np.matmul(a, b, out=out)

    def copy(self, size: int) -> Callable[[], object]:
        source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
        return lambda: np.copyto(target, source)


def ours(task: Task, model: Model) -> Runner:
    """The port."""
    tokens, targets, following = task.tokens(), task.targets(), task.next()
    match task.row.kind:
        case "forward":
            return Runner(lambda: model.forward(tokens), lambda: {"logits": model.forward(tokens)})
        case "prefill":
            return Runner(lambda: read(model, tokens), lambda: {"logits": read(model, tokens)})
        case "train":
            optimizer = model.optimizer(AdamW(learning_rate=RATE))
            return Runner(
                lambda: model.train_step(optimizer, tokens, targets),
                lambda: model.gradients(tokens, targets)[1]._asdict(),
            )
        case "decode":
            return decoding(model, tokens, following, task.row.length)
        case kind:
            raise AbsentError(f"a port has no {kind} by the protocol")


def read(model: Model, tokens: Array) -> Array:
    """The logits of a text that is read into a new state."""
    return model.advance(model.init_state(len(tokens)), tokens, donate=True)[0]


def decoding(model: Model, tokens: Array, following: Array, position: int) -> Runner:
    """Step after step from a state at a position, which may be further than what was really read."""
    _, state = model.advance(model.init_state(len(tokens)), tokens, donate=True)
    if position > state.position:
        state = model.import_state(replace(model.export_state(state), position=position))

    def step() -> None:
        nonlocal state
        _, state = model.advance(state, following, donate=True)

    return Runner(step, lambda: {"logits": model.advance(state, following)[0]})


def plain_runner(task: Task, params: Params) -> Runner:
    """The plain form."""
    tokens, following, config = task.tokens(), task.next(), task.config

    def answering(run: Callable[[], tuple[Array, object]]) -> Runner:
        def answer() -> Named:
            return {"logits": run()[0]}

        return Runner(run, answer)

    match task.row.kind:
        case "forward":
            return answering(lambda: (plain.forward(tokens, params, config), None))
        case "prefill":
            return answering(lambda: plain.prefill(tokens, params, config))
        case "decode":
            _, memories = plain.prefill(tokens, params, config)
            return answering(lambda: plain.step(following, memories, task.row.length, params, config))
        case _:
            raise AbsentError("NumPy derives no gradients: the specification's, by hand, are its plain form")


MEASURED = Protocol
