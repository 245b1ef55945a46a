"""What a row needs: products in FLOP, traffic and memory in bytes. One multiplication and one addition are two FLOP.

Needed is what the cheapest known exact form has to do: the products with the weights; attention by scores of strictly earlier
tokens, or through a state, whichever is less; and backward twice as much as forward. Nothing that is computed again, masked
away or moved about counts. Executed is what the plain form does, which multiplies whole (T, T) squares.
"""

from __future__ import annotations

from bdh_bench.rows import Row
from bdh_spec import BDHConfig
from bdh_spec.params import count

FLOAT32 = 4
BACKWARD = 3  # forward and, for each of its products, two in backward
# In units of B*nh*T*N: what the plain form has at once, and what it keeps of each layer for its gradient.
WIDE_AT_ONCE, WIDE_KEPT, TABLES = 6, 8, 4
SQUARES = 2  # scores before and after the mask
MOMENTS = 2
OPTIMISER_PASSES = 8  # over weights, slopes and two moments: each read and written


def needed_flop(row: Row, config: BDHConfig) -> int:
    """The FLOP of the products that one run of a row cannot do without."""
    if row.kind == "decode":
        return row.batch * (token_flop(config) + config.n_layer * min(row.length * pair_flop(config), state_flop(config)))
    pairs, T = row.length * (row.length - 1) // 2, row.length
    by_scores = pairs * pair_flop(config) + (T * state_flop(config) // 2 if row.kind == "prefill" else 0)
    attention = config.n_layer * min(by_scores, T * state_flop(config))
    return (BACKWARD if row.kind == "train" else 1) * row.batch * (T * token_flop(config) + attention)


def executed_flop(row: Row, config: BDHConfig, *, again: bool = False) -> int:
    """The FLOP of the products in the plain form; ``again`` in the one that reads the whole text for each token."""
    if row.kind == "decode" and not again:
        return row.batch * (token_flop(config) + config.n_layer * state_flop(config))
    T = row.length + (row.kind == "decode")
    attention = T * T * pair_flop(config) + (T * state_flop(config) // 2 if row.kind == "prefill" else 0)
    return (BACKWARD if row.kind == "train" else 1) * row.batch * (T * token_flop(config) + config.n_layer * attention)


def token_flop(config: BDHConfig) -> int:
    """The products of one token with the weights: encoder, encoder_v and decoder in each layer, and the logits."""
    D, V = config.n_embd, config.vocab_size
    return config.n_layer * 3 * 2 * D * _width(config) + 2 * D * V


def pair_flop(config: BDHConfig) -> int:
    """A token and an earlier one in one layer: their similarity over N, and the value over D, in every head."""
    return 2 * config.n_head * (config.n_neurons + config.n_embd)


def state_flop(config: BDHConfig) -> int:
    """A token that reads the state of one layer and is written to it."""
    return 2 * 2 * _width(config) * config.n_embd


def needed_bytes(row: Row, config: BDHConfig, itemsize: int) -> int:
    """The bytes that one run must move: weights read once, a state read and written once, logits written once.

    A short text is cheaper to keep as rows of neurons than as a state. Training moves weights, slopes and moments.
    """
    weights = count(config) * itemsize
    if row.kind == "train":
        return OPTIMISER_PASSES * count(config) * FLOAT32
    logits = row.tokens * config.vocab_size * FLOAT32
    if row.kind == "decode":
        rows = row.batch * config.n_layer * row.length * (_width(config) + config.n_embd) * FLOAT32
        return weights + logits + min(2 * state_bytes(row.batch, config), rows)
    return weights + logits + (state_bytes(row.batch, config) if row.kind == "prefill" else 0)


def state_bytes(batch: int, config: BDHConfig) -> int:
    """A recurrent state in float32."""
    return batch * config.n_layer * _width(config) * config.n_embd * FLOAT32


def plain_memory(row: Row, config: BDHConfig, itemsize: int, *, again: bool = False) -> int:
    """About what the plain form takes above its weights, which decides whether it is run at all."""
    B, T, L = row.batch, row.length + (row.kind == "decode"), config.n_layer
    if row.kind == "decode" and not again:
        return 2 * state_bytes(B, config)
    wide = B * T * _width(config) * itemsize
    squares = SQUARES * B * config.n_head * T * T * itemsize
    tables = TABLES * T * config.n_neurons * FLOAT32
    if row.kind == "train":
        return L * (WIDE_KEPT * wide + squares + tables) + (1 + MOMENTS) * count(config) * FLOAT32
    return WIDE_AT_ONCE * wide + squares + tables + (state_bytes(B, config) if row.kind == "prefill" else 0)


def least_memory(row: Row, config: BDHConfig) -> int:
    """What any form takes above its weights: a port is not kept from running by what it may be clever enough to avoid."""
    B, T, D, L = row.batch, row.length, config.n_embd, config.n_layer
    x = B * T * D * FLOAT32
    match row.kind:
        case "decode":
            return min(state_bytes(B, config), B * L * T * (_width(config) + D) * FLOAT32)
        case "prefill":
            return x + state_bytes(B, config)
        case "train":
            return L * x + (1 + MOMENTS) * count(config) * FLOAT32
        case _:
            return 2 * x + B * T * config.vocab_size * FLOAT32


def reference_memory(row: Row, config: BDHConfig, chunk: int) -> int:
    """What the specification takes in float64: gradients keep every stage of every layer."""
    if row.kind == "train":
        wide = row.batch * row.length * _width(config)
        squares = row.batch * config.n_head * row.length**2
        return 8 * (config.n_layer * (5 * wide + squares) + 4 * wide + 2 * count(config))
    return 8 * (10 * row.batch * chunk * _width(config) + count(config)) + 4 * state_bytes(row.batch, config)


def _width(config: BDHConfig) -> int:
    return config.n_head * config.n_neurons
