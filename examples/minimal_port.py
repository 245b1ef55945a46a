"""A port of BDH that reads texts, at once and through a state, and the adapter that lets the suite judge it.

bdh-conform examples.minimal_port:MyBackend
"""

import numpy as np


# Somebody's port. It could be written in anything that takes and gives arrays.
def my_frequencies(neurons):
    pair = np.arange(neurons, dtype=np.float32) // 2 * 2 / np.float32(neurons)
    # The power in float64, then rounded: float32 powers are not correctly rounded, and differ from machine to machine.
    growth = (65536.0 ** pair.astype(np.float64)).astype(np.float32)
    return np.float32(1) / growth / np.float32(2 * np.pi)


def my_rotation(start, length, neurons):
    # Every frequency is a whole multiple of 2^-64, so turns of 64 bits are exact at every position and wrap by themselves.
    turns = (my_frequencies(neurons)[::2].astype(np.float64) * 2.0**64).astype(np.uint64)
    positions = np.uint64(start) + np.arange(length, dtype=np.uint64)
    return np.exp(2j * np.pi * (positions[:, None] * turns * 2.0**-64)).astype(np.complex64)  # T N/2


def rotated(sparse, rotation):
    turned = (sparse[..., ::2] + 1j * sparse[..., 1::2]) * rotation
    return np.stack([turned.real, turned.imag], axis=-1).reshape(sparse.shape)


def normalised(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + np.float32(1e-5))


def my_states(batch, weights, n_layer):
    heads, width, neurons = weights[1].shape
    return [np.zeros((batch, heads, neurons, width), np.float32) for _ in range(n_layer)]


def my_advance(weights, tokens, states, start):
    embed, encoder, encoder_v, decoder, lm_head = weights
    heads, _, neurons = encoder.shape
    rotation, later = my_rotation(start, tokens.shape[1], neurons), []
    x = normalised(embed[tokens])  # B T D
    for state in states:
        sparse = np.maximum(x[:, None] @ encoder, 0)  # B h T N
        q = rotated(sparse, rotation)
        scores = np.tril(q @ q.swapaxes(-1, -2), k=-1)
        seen = normalised(scores @ x[:, None] + q @ state)  # B h T D
        later.append(state + q.swapaxes(-1, -2) @ x[:, None])  # a new array: the caller may go on from the old one
        gated = sparse * np.maximum(seen @ encoder_v, 0)
        merged = gated.swapaxes(1, 2).reshape(*tokens.shape, heads * neurons)
        x = normalised(x + normalised(merged @ decoder))
    return x @ lm_head, later


# The adapter.
from bdh_spec import Backend, Capabilities, Model  # noqa: E402  it begins here, to be read on its own


class MyModel(Model):
    def __init__(self, params, config, **how):
        super().__init__(config, **how)
        self.weights = [np.array(weight, np.float32) for weight in params]  # copies: the caller may change his

    def _forward(self, tokens):
        return my_advance(self.weights, tokens, self._init_state(len(tokens)), 0)[0]

    def _init_state(self, batch):
        return my_states(batch, self.weights, self.config.n_layer)

    def _advance(self, native, position, tokens, donate):
        return my_advance(self.weights, tokens, native, position)

    def _export_state(self, native):
        return tuple(layer.copy() for layer in native)

    def _import_state(self, state):
        return [layer.astype(np.float32) for layer in state.layers]


class MyBackend(Backend):
    name = "mine"
    capabilities = Capabilities(dtypes=("float32",), phases=("exact",), verbs=("forward", "advance", "state"))

    def version(self):
        return "mine 0.2"

    def devices(self):
        return ("cpu",)

    def _load(self, params, config, **how):
        return MyModel(params, config, **how)
