"""bdh_mlx beside the plain form in MLX, which is compiled on a GPU only: on a CPU a C++ compiler would build each kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any, ClassVar

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.nn.utils import value_and_grad

from bdh_bench import machine
from bdh_bench import plain_mlx as plain
from bdh_bench.sides import AGAIN, COMPILED, OURS, RATE, AbsentError, Framework, Named, Runner, Task, find_port
from bdh_mlx import BDH
from bdh_mlx.backend import MLXBackend
from bdh_spec import RecurrentState
from bdh_spec.params import Array, Params

clip_grad_norm: Any = optim.clip_grad_norm  # MLX leaves it untyped
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}


class MLX(Framework):
    """MLX on one device, products of float32 in float32."""

    name: ClassVar[str] = "mlx"

    def __init__(self, device: str) -> None:
        super().__init__(device)
        MLXBackend()  # asks for whole float32 products
        kind, _, index = device.partition(":")
        mx.set_default_device(mx.Device(getattr(mx, kind), int(index or 0)))

    def facts(self) -> dict[str, str]:
        chip = mx.device_info().get("device_name", "") if self.on_gpu else ""
        return {"framework": f"mlx {metadata.version('mlx')}", "device": ", ".join(filter(None, (self.device, str(chip))))}

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("gpu")

    def runner(self, task: Task, params: Params) -> Runner:
        if task.side == OURS:
            return self.ours(task, params)
        if task.side == COMPILED and not self.on_gpu:
            raise AbsentError("mx.compile is measured on a GPU only: on a CPU it has a C++ compiler build each kernel")
        held = Params(*(mx.array(weight).astype(DTYPES[task.dtype]) for weight in params))
        mx.eval(held)
        return plain_runner(task, held)

    def product(self, n: int, dtype: str) -> Callable[[], object]:
        a = mx.ones((n, n), DTYPES[dtype])
        mx.eval(a)
        return lambda: mx.eval(a @ a)

    def copy(self, size: int) -> Callable[[], object]:
        source, one = mx.ones(size // 4, mx.float32), mx.array(1.0)
        mx.eval(source, one)
        return lambda: mx.eval(source * one)

    def in_use(self) -> int:
        machine.settle()
        mx.clear_cache()
        return mx.get_active_memory()

    def forget_peak(self) -> None:
        mx.reset_peak_memory()

    def peak(self) -> int:
        return mx.get_peak_memory()

    def ours(self, task: Task, params: Params) -> Runner:
        """The port's module; it is decoded by the protocol, which holds the state so that it is written in place."""
        config, tokens, targets = task.config, mx.array(task.tokens()), mx.array(task.targets())
        if task.row.kind in ("prefill", "decode"):
            return self.reading(task, params)
        model: Any = BDH(config)
        model.embed.weight, *rest = (mx.array(weight).astype(DTYPES[task.dtype]) for weight in params)
        model.encoder, model.encoder_v, model.decoder, model.lm_head = rest
        model.eval()
        mx.eval(model.parameters())
        if task.row.kind == "forward":
            return answering(lambda: model(tokens)[0])
        adam = optimizer()

        def loss(model: Any) -> Any:
            return model(tokens, targets)[1]

        def step() -> None:
            model.train()
            value, slopes = value_and_grad(model, loss)(model)
            slopes, _ = clip_grad_norm(slopes, 1.0)
            adam.update(model, slopes)
            mx.eval(value, model.parameters(), adam.state)

        def slopes() -> Named:
            model.eval()
            _, found = value_and_grad(model, loss)(model)
            return {name: numpy(found[name]["weight"] if name == "embed" else found[name]) for name in Params._fields}

        return Runner(step, slopes)

    def reading(self, task: Task, params: Params) -> Runner:
        """The port behind the protocol, from state to state."""
        model = find_port(task.port).load(params, task.config, device=self.device, dtype=task.dtype)
        tokens, following = task.tokens(), task.next()

        def read() -> tuple[Array, Any]:
            return model.advance(model.init_state(len(tokens)), tokens, donate=True)

        if task.row.kind == "prefill":
            return Runner(read, lambda: {"logits": read()[0]})
        _, state = read()
        if task.row.length > state.position:
            state = model.import_state(RecurrentState(task.row.length, model.export_state(state).layers))

        def step() -> None:
            nonlocal state
            _, state = model.advance(state, following, donate=True)

        return Runner(step, lambda: {"logits": model.advance(state, following)[0]})


def plain_runner(task: Task, params: Params) -> Runner:
    """The plain form, as it is or compiled."""
    config, tokens, targets, following = task.config, mx.array(task.tokens()), mx.array(task.targets()), mx.array(task.next())

    def made(function: Callable[..., Any]) -> Callable[..., Any]:
        return mx.compile(function) if task.side == COMPILED else function

    if task.side == AGAIN:
        text = mx.array(task.text())
        return answering(lambda: plain.forward(text, params, config)[:, -1:])
    match task.row.kind:
        case "forward":
            forward = made(partial(plain.forward, config=config))
            return answering(lambda: forward(tokens, params))
        case "prefill":
            prefill = made(partial(plain.prefill, config=config))
            return answering(lambda: prefill(tokens, params))
        case "train":
            return plain_training(task, params, tokens, targets, made)
        case _:
            _, memories = plain.prefill(tokens, params, config)
            mx.eval(memories)
            step, position = made(partial(plain.step, config=config)), mx.array(task.row.length)
            return answering(lambda: step(following, memories, position, params))


def plain_training(task: Task, params: Params, tokens: mx.array, targets: mx.array, made: Callable[..., Any]) -> Runner:
    """Steps of MLX's AdamW on the plain form, and its slopes without dropout."""
    config, adam, held = task.config, optimizer(), params._asdict()

    def loss(weights: dict[str, mx.array], dropout: float) -> mx.array:
        return plain.loss(Params(**weights), tokens, targets, config, dropout)

    value_and_slopes = made(partial(mx.value_and_grad(loss), dropout=config.dropout))

    def step() -> None:
        nonlocal held
        value, slopes = value_and_slopes(held)
        slopes, _ = clip_grad_norm(slopes, 1.0)
        held = adam.apply_gradients(slopes, held)
        mx.eval(value, held, adam.state)

    def slopes() -> Named:
        return {name: numpy(slope) for name, slope in mx.grad(partial(loss, dropout=0.0))(held).items()}

    return Runner(step, slopes)


def optimizer() -> Any:
    return optim.AdamW(RATE, betas=[0.9, 0.95], weight_decay=0.1, bias_correction=True)


def answering(run: Callable[[], Any]) -> Runner:
    """A run whose result, or the first of whose results, is logits."""

    def to_the_end() -> Any:
        result = run()
        mx.eval(result)
        return result

    def answer() -> Named:
        result = to_the_end()
        return {"logits": numpy(result if isinstance(result, mx.array) else result[0])}

    return Runner(to_the_end, answer)


def numpy(value: mx.array) -> Array:
    """A copy in NumPy."""
    return np.array(value.astype(mx.float32))


MEASURED = MLX
