"""bdh_jax beside the plain form in JAX, op by op and jitted, without a NumPy round trip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

import bdh_jax
from bdh_bench import plain_jax as plain
from bdh_bench.sides import COMPILED, OURS, RATE, Framework, Named, Runner, Task
from bdh_jax import training
from bdh_jax.generation import advance_donated, prefill
from bdh_jax.parallel import find_device
from bdh_jax.rope import words
from bdh_spec import AdamW, BDHConfig
from bdh_spec.params import Array, Params

wait: Any = jax.block_until_ready  # JAX leaves it untyped
forward = jax.jit(bdh_jax.forward, static_argnames="config")
gradients = jax.jit(bdh_jax.gradients, static_argnames="config")
plain_gradients = jax.jit(jax.grad(plain.loss), static_argnames="config")


class JAX(Framework):
    """JAX on one device, products of float32 in float32."""

    name: ClassVar[str] = "jax"

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.chip = find_device(device)
        jax.config.update("jax_default_device", self.chip)  # type: ignore[no-untyped-call]  # JAX leaves it untyped
        jax.config.update("jax_default_matmul_precision", "highest")  # type: ignore[no-untyped-call]  # likewise

    def facts(self) -> dict[str, str]:
        return {"framework": f"jax {jax.__version__}", "device": f"{self.device}, {self.chip.device_kind}"}

    def runner(self, task: Task, params: Params) -> Runner:
        held = Params(*(jax.device_put(jnp.asarray(weight, task.dtype), self.chip) for weight in params))
        side = ours if task.side == OURS else plain_runner
        return side(task, held)

    def product(self, n: int, dtype: str) -> Callable[[], object]:
        a, product = jnp.ones((n, n), dtype), jax.jit(jnp.matmul)
        return lambda: product(a, a).block_until_ready()

    def copy(self, size: int) -> Callable[[], object]:
        source, copy = jnp.ones(size, jnp.uint8), jax.jit(jnp.copy)
        return lambda: copy(source).block_until_ready()

    def available(self) -> int:
        stats = self.chip.memory_stats()
        return stats["bytes_limit"] - stats["bytes_in_use"] if stats else super().available()

    def in_use(self) -> int:
        stats = self.chip.memory_stats()
        return int(stats["bytes_in_use"]) if stats else super().in_use()

    def peak(self) -> int:
        """JAX counts the peak of a device from the start of the process on."""
        stats = self.chip.memory_stats()
        return int(stats["peak_bytes_in_use"]) if stats else super().peak()


def ours(task: Task, params: Params) -> Runner:
    """The port's functions."""
    config = task.config
    tokens, targets, following = (jnp.asarray(ids, jnp.int32) for ids in (task.tokens(), task.targets(), task.next()))
    match task.row.kind:
        case "forward":
            return answering(lambda: forward(tokens, params, config))
        case "prefill":
            return answering(lambda: read(task, params)[0][:, None])
        case "train":
            return Runner(
                stepping(task, params),
                lambda: slopes(gradients(tokens, targets, params, config)[1]),
            )
        case _:
            _, state = read(task, params)
            state = state._replace(position=words(task.row.length))  # a state costs the same wherever it stands

            def step() -> None:
                nonlocal state
                logits, state = advance_donated(state, following, params, config)
                wait((logits, state))

            return Runner(
                step, lambda: {"logits": numpy(advance_donated(jax.tree.map(jnp.copy, state), following, params, config)[0])}
            )


def read(task: Task, params: Params) -> tuple[jax.Array, bdh_jax.RecurrentState]:
    """The last logits of a text that is read into a new state, and that state."""
    tokens = task.tokens()
    start = bdh_jax.init_state(len(tokens), task.config, params.encoder.dtype)
    return wait(prefill(start, tokens, params, task.config))


def stepping(task: Task, params: Params) -> Callable[[], None]:
    """Steps of the port's AdamW, which takes over the weights it is given."""
    settings, count = AdamW(learning_rate=RATE), 0
    held = jax.tree.map(jnp.copy, params)
    moments = training.init_moments(held)
    tokens, targets = (ids.astype(np.int32) for ids in (task.tokens(), task.targets()))

    def step() -> None:
        nonlocal held, moments, count
        count += 1
        rates = training.rates_at(count, settings, RATE)
        value, held, moments = training.train_step(tokens, targets, held, moments, words(count), rates, task.config)
        wait((value, held))

    return step


def plain_runner(task: Task, params: Params) -> Runner:
    """The plain form, as it is or jitted."""
    config, compiled = task.config, task.side == COMPILED
    tokens, targets, following = (jnp.asarray(ids, jnp.int32) for ids in (task.tokens(), task.targets(), task.next()))
    match task.row.kind:
        case "forward":
            run = plain.forward_compiled if compiled else plain.forward
            return answering(lambda: run(tokens, params, config))
        case "prefill":
            fill = plain.prefill_compiled if compiled else plain.prefill
            return answering(lambda: wait(fill(tokens, params, config))[0])
        case "train":
            return Runner(
                plain_stepping(params, tokens, targets, config, compiled),
                lambda: slopes((plain_gradients if compiled else jax.grad(plain.loss))(params, tokens, targets, config)),
            )
        case _:
            step = plain.step_compiled if compiled else plain.step
            _, memories = wait(plain.prefill_compiled(tokens, params, config))
            position = jnp.uint32(task.row.length)
            return answering(lambda: wait(step(following, memories, position, params, config))[0])


def plain_stepping(
    params: Params, tokens: jax.Array, targets: jax.Array, config: BDHConfig, compiled: bool
) -> Callable[[], object]:
    """Steps of optax's AdamW."""
    held, moments = params, plain.optimizer(RATE).init(params)
    train_step: Any = plain.train_step_compiled if compiled else plain.train_step
    key = jax.random.key(0)

    def step() -> object:
        nonlocal held, moments
        value, held, moments = train_step(held, moments, tokens, targets, key, config, RATE)
        return wait((value, held))

    return step


def answering(run: Callable[[], jax.Array]) -> Runner:
    """A run whose result is logits."""
    return Runner(lambda: run().block_until_ready(), lambda: {"logits": numpy(run())})


def slopes(found: Params) -> Named:
    return {name: numpy(slope) for name, slope in found._asdict().items()}


def numpy(value: jax.Array) -> Array:
    """A copy in NumPy that no donation touches."""
    return np.array(value, np.float32)


MEASURED = JAX
