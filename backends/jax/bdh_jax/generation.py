"""Text from a prompt: a prefill in few shapes, then one compiled loop on the device."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bdh_jax import forms
from bdh_jax.model import RecurrentState, advance, init_state
from bdh_jax.rope import Array
from bdh_jax.sampling import sample, uniforms
from bdh_spec.checks import check_tokens
from bdh_spec.config import BDHConfig
from bdh_spec.errors import SamplingError
from bdh_spec.params import Array as NumpyArray
from bdh_spec.params import Params
from bdh_spec.rope import Phase
from bdh_spec.sampling import Sampling, check_length, fresh_seed

advance_donated = jax.jit(advance, static_argnames=("config", "phase"), donate_argnums=0)


def generate(
    tokens: Any,
    params: Params,
    config: BDHConfig,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    *,
    seed: int | None = None,
    phase: Phase = "exact",
) -> NumpyArray:
    """Tokens (B, T) and their continuation, (B, T + max_new_tokens).

    One seed gives one text (R14), the same as from every other port. Without a seed the text is a new one each time.
    """
    check_length(max_new_tokens)
    how = Sampling(temperature, top_k, fresh_seed() if seed is None else seed)
    prompt = check_tokens(tokens, config)
    if max_new_tokens == 0:
        return prompt
    B, T = prompt.shape
    logits, state = prefill(init_state(B, config, params.encoder.dtype), prompt, params, config, phase=phase)
    draws = np.zeros((forms.power_of_two(max_new_tokens), B))  # loops of different length share a program
    draws[:max_new_tokens] = uniforms(how.seed, T, max_new_tokens, B)
    kept = min(how.top_k or config.vocab_size, config.vocab_size)
    with jax.enable_x64(True):  # the draw in float64, as the specification draws; the model keeps the dtype of its weights
        loop = partial(continue_text, params=params, config=config, phase=phase)
        new, _ = loop(state, logits, draws, max_new_tokens, how.temperature, kept)
    return np.concatenate([prompt, demand_finite(np.asarray(new)[:, :max_new_tokens])], axis=1)


def prefill(
    state: RecurrentState, tokens: NumpyArray, params: Params, config: BDHConfig, *, phase: Phase = "exact"
) -> tuple[Array, RecurrentState]:
    """Read a prompt (B, T) on: the logits after it (B, V) and the state after it. The state given is donated."""
    for chunk, count in pieces(tokens, config):
        logits, state = advance_donated(state, chunk, params, config, phase=phase, count=count)
    return jnp.asarray(np.asarray(logits)[:, count - 1]), state


def pieces(tokens: NumpyArray, config: BDHConfig) -> Iterator[tuple[NumpyArray, int]]:
    """The chunks that a text (B, T) is read in, as int32, and how many tokens of each there are.

    Full chunks, and a last one filled up to a length that others have too: one pass over the state, and few programs.
    """
    for start in range(0, tokens.shape[1], forms.CHUNK):
        chunk = tokens[:, start : start + forms.CHUNK]
        yield filled(chunk, forms.length(chunk.shape, config)), chunk.shape[1]


def filled(tokens: NumpyArray, length: int, fill: int | None = None) -> NumpyArray:
    """Tokens (B, T) as int32, with more of them up to a length.

    What comes later in a text changes nothing before it, and targets of -100 count for nothing. The last token is repeated: a
    weight that is not finite and belongs to another is then never met, where zero times it would not be zero.
    """
    extra = length - tokens.shape[1]
    longer = np.repeat(tokens[:, -1:], extra, axis=1) if fill is None else np.full((len(tokens), extra), fill)
    return np.concatenate([tokens, longer], axis=1).astype(np.int32)


@partial(jax.jit, static_argnames=("config", "phase"), donate_argnums=0)
def continue_text(
    state: RecurrentState,
    logits: Array,
    draws: Array,
    count: Array,
    temperature: Array,
    top_k: Array,
    params: Params,
    config: BDHConfig,
    *,
    phase: Phase = "exact",
) -> tuple[Array, RecurrentState]:
    """``count`` tokens after the logits (B, V) of a text, in a buffer (B, len(draws)), by one loop on the device.

    ``draws`` holds one number from 0 up to but not including 1 per token and row. The state is donated; the one returned
    has read all tokens but the last.
    """

    def step(carry: tuple[Array, RecurrentState, Array]) -> tuple[Array, RecurrentState, Array]:
        i, state, written = carry
        logits, state = advance(state, lax.dynamic_slice_in_dim(written, i - 1, 1, axis=1), params, config, phase=phase)
        return i + 1, state, put(written, i, logits[:, 0])

    def put(written: Array, i: Array, logits: Array) -> Array:
        chosen = sample(logits, lax.dynamic_index_in_dim(draws, i, keepdims=False), temperature, top_k)
        return lax.dynamic_update_index_in_dim(written, chosen, i, 1)

    written = put(jnp.zeros(draws.shape[::-1], jnp.int32), jnp.int32(0), logits)
    _, state, written = lax.while_loop(lambda carry: carry[0] < count, step, (jnp.int32(1), state, written))
    return written, state


def demand_finite(new: NumpyArray) -> NumpyArray:
    """The tokens, if every one was drawn from finite logits."""
    if (new < 0).any():
        b, t = np.argwhere(new < 0)[0]
        raise SamplingError(
            f"logits of new token {t} in text {b} hold nan or inf: the model has diverged, nothing can be drawn"
        )
    return new
