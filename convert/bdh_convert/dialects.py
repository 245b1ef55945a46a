"""Where each dialect keeps the five weights: read it like a table.

Names are written in the order of the specification: embed, encoder, encoder_v, decoder, lm_head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bdh_convert.frequencies import table
from bdh_convert.tensors import F32, Tensor
from bdh_spec.checkpoint import FREQS
from bdh_spec.config import BDHConfig
from bdh_spec.errors import ParamsError
from bdh_spec.params import Params
from bdh_spec.rope import Frequencies


@dataclass(frozen=True)
class Dialect:
    """One way to lay a model out in a file."""

    name: str
    names: Params  # the dialect's name of each of our weights
    transposed: frozenset[str] = frozenset()  # our weights that it stores with their two axes swapped
    freqs: str | None = None  # its name of the frequency table, when it stores one: that of every model,
    own_freqs: str | None = None  # or only that of a model which brings its own
    gate: str | None = None  # an unused tensor that its loader insists on
    is_int8: bool = False  # whether its weights are in int8, each with a tensor of scales (R17)
    containers: tuple[str, ...] = ("safetensors",)  # that we write it in, the default first


GATE = "lm_gate"  # (D, 1), in early files of torch and in those of MLX: no equation uses it

UPSTREAM = Params("embed.weight", "encoder", "encoder_v", "decoder", "lm_head")
HUGGING_FACE = Params("backbone.embed.weight", "backbone.encoder", "backbone.encoder_v", "backbone.decoder", "lm_head.weight")
LISTING = Params("wte.weight", "decoder_x", "decoder_y", "encoder", "readout")  # its encoder is our decoder
CANONICAL = Params(*Params._fields)

DIALECTS = {
    dialect.name: dialect
    for dialect in (
        Dialect("numpy", CANONICAL, own_freqs=FREQS),
        Dialect("jax", CANONICAL, own_freqs=FREQS),
        Dialect("torch", UPSTREAM, freqs="attn.freqs", containers=("safetensors", "pt")),
        Dialect("mlx", UPSTREAM, freqs="attn.freqs", gate=GATE, containers=("safetensors", "npz")),
        Dialect("hf", HUGGING_FACE, transposed=frozenset({"lm_head"}), containers=("hf",)),
        Dialect("int8", CANONICAL, own_freqs=FREQS, is_int8=True),
        Dialect("paper", LISTING, containers=()),
        Dialect("burn", CANONICAL, containers=()),
    )
}
TARGETS = tuple(name for name, dialect in DIALECTS.items() if dialect.containers)


def from_dialect(dialect: Dialect, tensors: Mapping[str, Tensor]) -> Params:
    """Our five weights, out of a dialect's tensors."""
    missing = [name for name in dialect.names if name not in tensors]
    if missing:
        raise ParamsError(f"no tensor is named {', '.join(missing)}: a {dialect.name} file holds {', '.join(dialect.names)}")
    weights = zip(Params._fields, dialect.names, strict=True)
    return Params(*(_turned(dialect, ours, tensors[theirs].named(ours)) for ours, theirs in weights))


def to_dialect(dialect: Dialect, weights: Params, config: BDHConfig, freqs: Frequencies | None) -> list[Tensor]:
    """The tensors of a dialect's file, out of our five weights and the model's own frequencies if it brings any."""
    named = zip(Params._fields, dialect.names, weights, strict=True)
    if dialect.is_int8:
        tensors = [part for weight in weights for part in weight.parts()]
    else:
        tensors = [_turned(dialect, ours, weight).named(theirs) for ours, theirs, weight in named]
    if dialect.freqs:
        tensors.append(table(config, freqs).row().named(dialect.freqs))
    elif dialect.own_freqs and freqs:
        tensors.append(table(config, freqs).named(dialect.own_freqs))
    if dialect.gate:
        tensors.append(Tensor.of(dialect.gate, np.zeros((config.n_embd, 1), F32)))
    return tensors


def _turned(dialect: Dialect, ours: str, tensor: Tensor) -> Tensor:
    """The tensor in the other layout; the same function leads there and back."""
    return tensor.transposed() if ours in dialect.transposed else tensor


def speaker(layout: Params, container: str, said: str | None) -> Dialect:
    """The dialect of a layout; where several share it, ``said`` is what the file or the user calls it."""
    sharing = [dialect for dialect in DIALECTS.values() if dialect.names == layout]
    preferred = said or {"burn": "burn", "npz": "mlx"}.get(container)
    return next((dialect for dialect in sharing if dialect.name == preferred), sharing[0])
