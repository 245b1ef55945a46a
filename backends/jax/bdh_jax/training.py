"""R15 and the optimiser: slopes of the loss in the five weights, and one step of AdamW."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from bdh_jax.forms import Kernel
from bdh_jax.layer import wide
from bdh_jax.model import loss, readout, run
from bdh_jax.rope import Array
from bdh_spec.config import BDHConfig
from bdh_spec.optimizer import AdamW
from bdh_spec.params import Params
from bdh_spec.rope import Phase

Scalar: TypeAlias = Array | float


class Moments(NamedTuple):
    """Running means of the slopes and of their squares, never narrower than float32, and the weights before rounding."""

    first: Params
    second: Params
    masters: Params | None = None  # where the weights are narrower than float32


class Rates(NamedTuple):
    """What one step of AdamW depends on: plain values, so another learning rate is no other program."""

    learning_rate: Scalar
    weight_decay: Scalar
    renewal: tuple[Scalar, Scalar]  # 1 - beta, formed in float64: in float32 the difference would lose half its digits
    unbias: tuple[Scalar, Scalar]  # 1 - beta^step
    eps: Scalar
    clip: Scalar  # inf where nothing is clipped


def rates_at(step: int, settings: AdamW, rate: float) -> Rates:
    """The rates of a step, counted from 1."""
    b1, b2 = settings.betas
    clip = float("inf") if settings.clip is None else settings.clip
    return Rates(rate, settings.weight_decay, (1 - b1, 1 - b2), (1 - b1**step, 1 - b2**step), settings.eps, clip)


def objective(
    tokens: Array,
    targets: Array,
    params: Params,
    config: BDHConfig,
    *,
    phase: Phase = "exact",
    key: Array | None = None,
    kernel: Kernel | None = None,
) -> Array:
    """The loss, for ``jax.grad(objective, argnums=2)``; ``key`` switches dropout on."""
    return loss(readout(run(tokens, params, config, phase=phase, key=key, kernel=kernel), params), targets)


def gradients(
    tokens: Array,
    targets: Array,
    params: Params,
    config: BDHConfig,
    *,
    phase: Phase = "exact",
    key: Array | None = None,
    kernel: Kernel | None = None,
) -> tuple[Array, Params]:
    """The loss and its slope in each weight."""
    return jax.value_and_grad(objective, argnums=2)(tokens, targets, params, config, phase=phase, key=key, kernel=kernel)


def init_moments(params: Params) -> Moments:
    """The moments before the first step: zeros."""
    first, second = (jax.tree.map(lambda w: jnp.zeros_like(w, wide(w.dtype)), params) for _ in range(2))
    return Moments(first, second, widened(params) if is_narrow(params) else None)


def is_narrow(params: Params) -> bool:
    """Whether the weights are narrower than what is moved."""
    return bool(params.encoder.dtype != wide(params.encoder.dtype))


def widened(params: Params) -> Params:
    """The same values in at least float32."""
    return jax.tree.map(lambda w: w.astype(wide(w.dtype)), params)


def unrounded(params: Params, moments: Moments) -> Params:
    """The weights before rounding, but for those that have been moved since by somebody else."""
    if moments.masters is None:
        return params
    return jax.tree.map(lambda w, p: jnp.where(w.astype(p.dtype) == p, w, p.astype(w.dtype)), moments.masters, params)


def update(
    params: Params, slopes: Params, moments: Moments, rates: Rates, frozen: tuple[str, ...] = ()
) -> tuple[Params, Moments]:
    """The weights and moments after one step, in which the ``frozen`` ones stay where they are."""
    moving = [slope for name, slope in slopes._asdict().items() if name not in frozen]
    scale, (new, new_square) = clip_scale(moving, rates.clip), rates.renewal

    def move(name: str, w: Array, g: Array, m: Array, v: Array) -> tuple[Array, Array, Array]:
        if name in frozen:
            return w, m, v
        g = g.astype(m.dtype) * scale
        m, v = m + new * (g - m), v + new_square * (g * g - v)
        direction = m / rates.unbias[0] / (jnp.sqrt(v / rates.unbias[1]) + rates.eps)
        return w - rates.learning_rate * (direction + rates.weight_decay * w), m, v

    held = unrounded(params, moments)
    moved = [move(*each) for each in zip(Params._fields, held, slopes, moments.first, moments.second, strict=True)]
    weights, first, second = (Params(*five) for five in zip(*moved, strict=True))
    rounded = jax.tree.map(lambda w, p: w.astype(p.dtype), weights, params)
    return rounded, Moments(first, second, None if moments.masters is None else weights)


def clip_scale(slopes: Iterable[Array], clip: Scalar) -> Array:
    """What to multiply all slopes by so that their common 2-norm is at most ``clip``."""
    norm = jnp.sqrt(sum((jnp.sum(jnp.square(slope.astype(wide(slope.dtype)))) for slope in slopes), jnp.float32(0)))
    return jnp.where(norm <= clip, 1.0, clip / norm)


@partial(jax.jit, static_argnames=("config", "phase", "frozen"), donate_argnums=(2, 3))
def train_step(
    tokens: Array,
    targets: Array,
    params: Params,
    moments: Moments,
    seed: Array,
    rates: Rates,
    config: BDHConfig,
    *,
    frozen: tuple[str, ...] = (),
    phase: Phase = "exact",
) -> tuple[Array, Params, Moments]:
    """The loss with dropout, and the weights and moments after one step on it. Weights and moments given are donated.

    ``seed`` holds the two words of what this step drops.
    """
    value, slopes = dropped_gradients(tokens, targets, params, seed, config, phase=phase)
    return value, *update(params, slopes, moments, rates, frozen)


@partial(jax.jit, static_argnames=("config", "phase", "kernel"), donate_argnums=3)
def add_gradients(
    tokens: Array,
    targets: Array,
    params: Params,
    total: Params | None,
    seed: Array,
    share: Scalar,
    config: BDHConfig,
    *,
    phase: Phase = "exact",
    kernel: Kernel | None = None,
) -> tuple[Array, Params]:
    """The share in the loss of one of a step's batches, and its slopes, added to those of others if there are some.

    The total given is donated; the one returned is never narrower than float32.
    """
    value, slopes = dropped_gradients(tokens, targets, params, seed, config, phase=phase, kernel=kernel)
    shares = jax.tree.map(lambda g: share * g.astype(wide(g.dtype)), slopes)
    return share * value, shares if total is None else jax.tree.map(jnp.add, total, shares)


def dropped_gradients(
    tokens: Array,
    targets: Array,
    params: Params,
    seed: Array,
    config: BDHConfig,
    *,
    phase: Phase,
    kernel: Kernel | None = None,
) -> tuple[Array, Params]:
    """The loss and its slopes with the dropout of a seed."""
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    return gradients(tokens, targets, params, config, phase=phase, key=key, kernel=kernel)


apply = jax.jit(update, static_argnames="frozen", donate_argnums=(0, 2))
