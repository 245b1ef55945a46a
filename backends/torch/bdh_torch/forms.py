"""Which of several forms that compute the same reads a text: thresholds in one place, measured but where it says otherwise.

``kernel``: plain is the form to read beside the specification, streamed the one that never holds all neurons. None chooses by
the size of what the plain one would hold; where the streamed one cannot read, the plain one does whatever was chosen.
``attention``: parallel reads a text by its scores, chunked in pieces that see earlier ones through the state, recurrent
token by token. None chooses by the length of the text.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from bdh_spec.errors import ConfigError
from bdh_torch.attention import are_transforms_active
from bdh_torch.layer import Weights

Kernel: TypeAlias = Literal["plain", "streamed"]
Attention: TypeAlias = Literal["parallel", "chunked", "recurrent"]

CHUNK = 256  # tokens read at once on top of a state
# The longest text that is read at once, without a state, by the plain kernel, in widths D, and never less than a chunk: a token
# costs N products for each earlier one by its score, and 4 N D by a state. Measured on a CPU in D 64 and 256. With gradients
# every chunk's state is kept, which moves the crossing.
WHOLE, WHOLE_WITH_GRADIENTS = 2, 4
# The same by the streamed kernel, which leaves out what is above the diagonal, and what it reads at once of a longer text in a
# narrow type, measured in bfloat16 in D 64 and 256.
WHOLE_STREAMED, WHOLE_STREAMED_NARROW, CHUNK_NARROW = 4, 6, 512
# The longest text whose rotations are worked out once, for all layers.
ONE_TABLE = 1024
# Bytes of all neurons of the tokens at hand, (h, B*T, N), from which on streaming them is the faster on a CPU, in turns with
# the plain kernel in D 64, 128 and 256. Gradients compute what they have not kept again, which moves the crossing.
STREAMED, STREAMED_WITH_GRADIENTS = 2**22, 2**26
# On a GPU: launches take longer than the work on fewer neurons than STREAMED_ON_GPU, which is counted and not measured.
# Texts are read whole up to 2,048 tokens, and else in chunks of as many (default size, bfloat16, an H100: 4,096 tokens whole in
# 14.1 ms, in chunks of 1,024 in 12.8; 32,768 in chunks of 2,048 in 101 ms, of 1,024 in 102, of 512 in 127). In float32 the
# library's products are the faster (2,048 tokens in 45 ms against 81), and what is done between them takes too little time to
# be worth fusing.
STREAMED_ON_GPU, CHUNK_ON_GPU, WHOLE_ON_GPU = 2**24, 2048, 2048
FUSED: frozenset[torch.dtype] = frozenset({torch.bfloat16, torch.float16})
WIDEST = 1024  # the largest D of which a program holds whole rows while a token is read
# Decoding, all measured on one thread of a CPU, by its seconds, of models that have D 64 to 256. Bytes of a weight from which
# on it pays to count which neurons are active: at 2 MB it costs as much as it saves, at 8 MB it saves two fifths of a token
# at a density of 10%.
COUNTED = 2**22
# The largest share of rows that are active, or of pairs of rows, at which it pays to copy them or to write to them one by one:
# at a third it takes as long as all of them do. And at which it pays to sum them, which copies nothing.
COPIED, SUMMED = 0.35, 0.8
# Bytes of a layer's state from which on texts are remembered by their rows at first, and for how long: a share of D tokens.
# Rows took two thirds of the state's time there, and still do after half of D tokens; of active neurons alone a state is read
# about as fast by then.
KEPT, KEPT_SHARE = 2**19, 0.5
# Numbers of an encoder in int8 from which on a CPU decodes by them as they are: in D 128 and 256 a token takes as long as by
# weights of float32, in a quarter of their memory, and below it takes longer.
KEPT_IN_INT8 = 2**20
BLOCK_OF_STATE = 2**20  # bytes of a state that are read and then written at once: half of what a core keeps near it


def known(name: str | None, names: Any) -> Any:
    """A form by its name, or None."""
    if name is not None and name not in get_args(names):
        raise ConfigError(f"no form is named {name!r}: there are {', '.join(get_args(names))}, or None")
    return name


def is_read_whole(T: int, D: int) -> bool:
    """Whether the plain kernel reads a text of this length, in a model of this width, by its scores alone."""
    return max((WHOLE_WITH_GRADIENTS if torch.is_grad_enabled() else WHOLE) * D, CHUNK) >= T


def plain_chunk(T: int, *, is_whole: bool) -> int:
    """How many tokens of a text the plain kernel reads by their scores."""
    return T if is_whole else CHUNK


def is_one_table(T: int) -> bool:
    """Whether rotations of as many positions are worked out once, for all layers."""
    return T <= ONE_TABLE


def chunk(T: int, attention: Attention | None, weight: Tensor) -> int:
    """How many tokens of a text the streamed kernel reads by their scores, of the encoder (h, D, N)."""
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    many, part = (WHOLE_STREAMED_NARROW, CHUNK_NARROW) if dtype.itemsize < 4 else (WHOLE_STREAMED, CHUNK)
    whole = max(many * weight.shape[1], part)
    if device == "cuda":
        whole, part = WHOLE_ON_GPU, CHUNK_ON_GPU
    return T if attention == "parallel" or (attention is None and whole >= T) else part


def streams(kernel: Kernel | None, x: Tensor, weights: Weights, drop: nn.Module) -> bool:
    """Whether the streamed kernel reads x, (B, T, D) or tokens (B, T), with these weights and this dropout."""
    if kernel == "plain" or not can_stream(weights, drop):
        return False
    (B, T), (nh, _, N), kind = x.shape[:2], weights.encoder.shape, weights.encoder.dtype
    many = STREAMED_WITH_GRADIENTS if torch.is_grad_enabled() else STREAMED
    device = weights.encoder.device.type
    if device == "cuda":
        many = STREAMED_ON_GPU
    is_faster = T > 1 and nh * B * T * N * kind.itemsize >= many and device in ("cpu", "cuda")
    return kernel == "streamed" or is_faster


def fuses(x: Tensor) -> bool:
    """Whether the streamed kernel reads x by the kernels of ``fused``, which Triton compiles for a GPU."""
    return has_triton() and (x.dtype in FUSED if x.is_cuda else interprets() and x.dtype != torch.float64)


@cache
def has_triton() -> bool:
    """Whether Triton is installed, and this module is part of its package: code that is saved beside weights has no kernels."""
    return __name__ == "bdh_torch.forms" and find_spec("triton") is not None


def interprets() -> bool:
    """Whether Triton runs kernels as Python, on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def decodes(kernel: Kernel | None, attention: Attention | None, idx: Tensor, weights: Weights, drop: nn.Module) -> bool:
    """Whether tokens (B, T) are one of each text, and read by what is made for that: in place, without gradients, on a CPU."""
    return _is_step(kernel, attention, idx, weights, drop) and weights.encoder.device.type == "cpu"


def steps(kernel: Kernel | None, attention: Attention | None, idx: Tensor, weights: Weights, drop: nn.Module) -> bool:
    """The same on a GPU, by the kernels of ``fused_decode``, which read weights as they lie in the order of their axes."""
    if weights.encoder.shape[1] > WIDEST or not all(weight.is_contiguous() for weight in weights):
        return False
    return fuses(weights.encoder) and _is_step(kernel, attention, idx, weights, drop)


def _is_step(kernel: Kernel | None, attention: Attention | None, idx: Tensor, weights: Weights, drop: nn.Module) -> bool:
    if idx.shape[1] > 1 or kernel is not None or attention == "recurrent" or torch.is_grad_enabled():
        return False
    return not torch.is_autocast_enabled(weights.encoder.device.type) and not drop.training and can_stream(weights, drop)


def is_counted(weight: Tensor) -> bool:
    """Whether it pays to count which neurons are active, by a weight (h, D, N)."""
    return weight.numel() * weight.itemsize >= COUNTED


def is_kept_in_int8(size: int, device: str) -> bool:
    """Whether weights in int8 stay so, by the numbers of an encoder."""
    return size >= KEPT_IN_INT8 and device == "cpu"


def is_copied(active: int, rows: int) -> bool:
    """Whether of so many rows the active ones are copied, or written to, and the others left out."""
    return active <= COPIED * rows


def is_summed(active: int, rows: int) -> bool:
    """Whether of so many rows the active ones are summed, and the others left out."""
    return active <= SUMMED * rows


def rows_kept(size: int, D: int, device: str) -> int:
    """How many tokens are remembered by rows before they become a state of so many bytes; 0 if none are."""
    return int(KEPT_SHARE * D) if size >= KEPT and device == "cpu" else 0


def rows_of_a_block(size: int) -> int:
    """How many rows of so many bytes are worked on at once."""
    return max(BLOCK_OF_STATE // size, 1)


def can_stream(weights: Weights, drop: nn.Module) -> bool:
    """Whether the streamed kernel can read at all.

    It writes to memory of its own where a compiler, a tracer, a transform of functions or a tensor that is more than its
    values would have to follow; and it draws the masks of dropout itself, so that nobody can look on.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing() or are_transforms_active():
        return False
    is_watched = type(drop) is not nn.Dropout or drop._forward_hooks or drop._forward_pre_hooks
    return not is_watched and all(type(weight) in (Tensor, nn.Parameter) for weight in weights)
