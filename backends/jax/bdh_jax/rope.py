"""R4: rotary positions on the neuron axis, interleaved pairs (2i, 2i+1), phases counted in turns.

JAX has no 64-bit integers unless asked for them, so a position is a pair of uint32 words, high word first, and the products
of the specification's fixed point are formed from 16-bit halves. They are exact to 2^63 with and without x64.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from bdh_spec.rope import Phase, fixed_point

Array = jax.Array


def words(position: int) -> Array:
    """A position as the words that a state carries, uint32 (2,)."""
    return jnp.asarray(np.array([position >> 32, position & 0xFFFFFFFF], np.uint32))


def later(start: Array, length: Array | int) -> Array:
    """The position ``length`` tokens after ``start``, uint32 (2,)."""
    low = start[1] + jnp.asarray(length).astype(jnp.uint32)
    return jnp.stack([start[0] + (low < start[1]), low])


def positions(start: Array, length: int) -> tuple[Array, Array]:
    """High and low words of ``length`` positions from ``start`` on, each uint32 (T,)."""
    low = start[1] + jnp.arange(length, dtype=jnp.uint32)
    return start[0] + (low < start[1]), low


def turns(start: Array, length: int, table: NDArray[Any], dtype: Any, phase: Phase) -> Array:
    """How far each neuron has turned at each position: from -1/2 to 1/2 of a turn, where floats are denser, (T, N)."""
    high, low = (word[:, None] for word in positions(start, length))
    if phase == "float32":  # what the published models saw; rem, because x - floor(x) could be fused and lose the rounding
        fraction = lax.rem(to_float32(high, low) * table, jnp.float32(1))
        return (fraction - jnp.round(fraction)).astype(dtype)
    fixed = fixed_point(table)  # units of 2^-64 turns
    f_high, f_low = (fixed >> np.uint64(32)).astype(np.uint32), fixed.astype(np.uint32)
    carried, rest = full_product(low, f_low)
    leading = carried + low * f_high + high * f_low  # wraps, which drops whole turns
    return lax.bitcast_convert_type(leading, jnp.int32).astype(dtype) * 2.0**-32 + rest.astype(dtype) * 2.0**-64


def full_product(a: Array, b: Array | NDArray[np.uint32]) -> tuple[Array, Array]:
    """High and low words of a product of uint32."""
    a_high, a_low, b_high, b_low = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
    middle = a_high * b_low + (a_low * b_low >> 16)
    other_middle = a_low * b_high + (middle & 0xFFFF)
    return a_high * b_high + (middle >> 16) + (other_middle >> 16), a * b


def to_float32(high: Array, low: Array) -> Array:
    """The 64-bit number in two words, rounded once to float32."""
    shift = lax.clz(high)  # 32 where high is 0: a shift by all 32 bits gives 0
    leading = lax.shift_left(high, shift) | lax.shift_right_logical(low, 32 - shift)
    beyond = lax.shift_left(low, shift) != 0  # far below the rounding position, where any bit set has the same effect
    return jnp.ldexp((leading | beyond).astype(jnp.float32), (32 - shift).astype(jnp.int32))


def rotation(start: Array, length: int, table: NDArray[Any], dtype: Any, phase: Phase) -> tuple[Array, Array]:
    """Cosine and sine of the phases of ``length`` positions from ``start`` on, each (T, N), by a table of turns per token."""
    angle = 2 * np.pi * turns(start, length, table, dtype, phase)
    return jnp.cos(angle), jnp.sin(angle)


def turned_on(turn: tuple[Array, Array], by: tuple[Array, Array]) -> tuple[Array, Array]:
    """Cosine and sine of the sums of two phases, of each neuron by itself: no matter whether its pair turns alike."""
    (cos, sin), (more_cos, more_sin) = turn, by
    return cos * more_cos - sin * more_sin, sin * more_cos + cos * more_sin


def rope(v: Array, cos: Array, sin: Array) -> Array:
    """Turn each pair of neurons by its phase."""
    return v * cos + swap(v) * sin  # B h T N


def swap(v: Array) -> Array:
    """A quarter turn: (a, b) becomes (-b, a) in every pair."""
    pairs = v.reshape(*v.shape[:-1], -1, 2)
    return jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(v.shape)
