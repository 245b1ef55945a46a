"""A port of BDH that knows one thing, the parallel form, and the adapter that lets the suite judge it.

bdh-conform examples.minimal_port:MyBackend
"""

import numpy as np


# Somebody's port. It could be written in anything that takes and gives arrays.
def normalised(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def my_forward(weights, tokens, n_layer):
    embed, encoder, encoder_v, decoder, lm_head = weights
    heads, _, neurons = encoder.shape
    pair = np.arange(neurons, dtype=np.float32) // 2 * 2
    turns = 1.0 / np.float32(2.0**16) ** (pair / np.float32(neurons)) / np.float32(2 * np.pi)
    phase = 2 * np.pi * np.mod(np.arange(tokens.shape[1])[:, None] * turns.astype(np.float64), 1)
    rotation = np.exp(1j * phase[:, ::2])
    earlier = np.tri(tokens.shape[1], k=-1)
    x = normalised(embed[tokens])
    for _ in range(n_layer):
        sparse = np.maximum(np.einsum("btd,hdn->bhtn", x, encoder), 0)
        turned = (sparse[..., ::2] + 1j * sparse[..., 1::2]) * rotation
        scores = np.einsum("bhtn,bhsn->bhts", turned, turned.conj()).real * earlier
        seen = normalised(np.einsum("bhts,bsd->bhtd", scores, x))
        gated = sparse * np.maximum(np.einsum("bhtd,hdn->bhtn", seen, encoder_v), 0)
        merged = np.einsum("bhtn,hnd->btd", gated, decoder.reshape(heads, neurons, -1))
        x = normalised(x + normalised(merged))
    return x @ lm_head


# The adapter.
from bdh_conformance.adapter import PartialModel  # noqa: E402  it begins here, to be read on its own
from bdh_spec import Backend, Capabilities  # noqa: E402


class MyModel(PartialModel):
    def _forward(self, tokens):
        weights = [weight.astype(self.dtype) for weight in self.given]
        return my_forward(weights, tokens, self.config.n_layer).astype(self.dtype)


class MyBackend(Backend):
    name = "mine"
    capabilities = Capabilities(dtypes=("float32",), phases=("exact",), verbs=("forward",))

    def version(self):
        return "mine 0.1"

    def devices(self):
        return ("cpu",)

    def _load(self, params, config, *, device, dtype, phase):
        return MyModel(params, config, device=device, dtype=dtype, phase=phase)
