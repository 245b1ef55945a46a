"""R15 and the optimiser: slopes of the loss in the five weights, and one step of AdamW."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from bdh_jax.model import loss, readout, run, wide
from bdh_jax.rope import Array
from bdh_spec.config import BDHConfig
from bdh_spec.optimizer import AdamW
from bdh_spec.params import Params
from bdh_spec.rope import Phase

Scalar: TypeAlias = Array | float


class Moments(NamedTuple):
    """Running means of the slopes and of their squares, never narrower than float32."""

    first: Params
    second: Params


class Rates(NamedTuple):
    """What one step of AdamW depends on: plain values, so another learning rate is no other program."""

    learning_rate: Scalar
    weight_decay: Scalar
    renewal: tuple[Scalar, Scalar]  # 1 - beta, formed in float64: in float32 the difference would lose half its digits
    unbias: tuple[Scalar, Scalar]  # 1 - beta^step
    eps: Scalar
    clip: Scalar  # inf where nothing is clipped


def rates_at(step: int, settings: AdamW) -> Rates:
    """The rates of a step, counted from 1."""
    b1, b2 = settings.betas
    clip = float("inf") if settings.clip is None else settings.clip
    return Rates(
        settings.learning_rate, settings.weight_decay, (1 - b1, 1 - b2), (1 - b1**step, 1 - b2**step), settings.eps, clip
    )


def objective(
    params: Params, tokens: Array, targets: Array, config: BDHConfig, *, phase: Phase = "exact", key: Array | None = None
) -> Array:
    """The loss as a function of the weights; ``key`` switches dropout on."""
    return loss(readout(run(tokens, params, config, phase=phase, key=key), params), targets)


def gradients(
    tokens: Array, targets: Array, params: Params, config: BDHConfig, *, phase: Phase = "exact", key: Array | None = None
) -> tuple[Array, Params]:
    """The loss and its slope in each weight."""
    return jax.value_and_grad(objective)(params, tokens, targets, config, phase=phase, key=key)


def init_moments(params: Params) -> Moments:
    """The moments before the first step: zeros."""
    return Moments(*(jax.tree.map(lambda w: jnp.zeros_like(w, wide(w.dtype)), params) for _ in range(2)))


def update(params: Params, slopes: Params, moments: Moments, rates: Rates) -> tuple[Params, Moments]:
    """The weights and moments after one step."""
    scale, (new, new_square) = clip_scale(slopes, rates.clip), rates.renewal
    slopes = jax.tree.map(lambda g: g.astype(wide(g.dtype)) * scale, slopes)
    first = jax.tree.map(lambda m, g: m + new * (g - m), moments.first, slopes)
    second = jax.tree.map(lambda v, g: v + new_square * (g * g - v), moments.second, slopes)

    def move(w: Array, m: Array, v: Array) -> Array:
        direction = m / rates.unbias[0] / (jnp.sqrt(v / rates.unbias[1]) + rates.eps)
        held = w.astype(m.dtype)
        return (held - rates.learning_rate * (direction + rates.weight_decay * held)).astype(w.dtype)

    return jax.tree.map(move, params, first, second), Moments(first, second)


def clip_scale(slopes: Params, clip: Scalar) -> Array:
    """What to multiply all slopes by so that their common 2-norm is at most ``clip``."""
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(slope.astype(wide(slope.dtype)))) for slope in slopes))
    return jnp.where(norm <= clip, 1.0, clip / norm)


@partial(jax.jit, static_argnames=("config", "phase"), donate_argnums=(0, 1))
def train_step(
    params: Params,
    moments: Moments,
    tokens: Array,
    targets: Array,
    seed: Array,
    step: Array,
    rates: Rates,
    config: BDHConfig,
    *,
    phase: Phase = "exact",
) -> tuple[Array, Params, Moments]:
    """The loss with dropout, and the weights and moments after one step on it. Weights and moments given are donated.

    ``seed`` holds the two words of the dropout's seed, ``step`` counts from 1.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), step)
    value, slopes = gradients(tokens, targets, params, config, phase=phase, key=key)
    return value, *update(params, slopes, moments, rates)
