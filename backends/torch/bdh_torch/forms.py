"""Which of several forms that compute the same reads a text: all thresholds in one place, each from a measurement.

``kernel``: plain, the default, is the form to read beside the specification, streamed the one that never holds all neurons.
``attention``: parallel reads a text by its scores, chunked in pieces that see earlier ones through the state, recurrent
token by token. None chooses by the length of the text.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import torch

from bdh_spec import ConfigError

Kernel: TypeAlias = Literal["plain", "streamed"]
Attention: TypeAlias = Literal["parallel", "chunked", "recurrent"]

CHUNK = 256  # tokens read at once on top of a state
# The longest text that is read at once, without a state, by the plain kernel: its scores (T, T) cost less than states up to
# about here, measured on a CPU at the default size. With gradients every chunk's state is kept, which moves the crossing.
WHOLE, WHOLE_WITH_GRADIENTS = 512, 1024
# The same by the streamed kernel, which leaves out what is above the diagonal.
WHOLE_STREAMED, WHOLE_STREAMED_NARROW = 1024, 2048


def known(name: str | None, names: Any) -> Any:
    """A form by its name, or None."""
    if name is not None and name not in get_args(names):
        raise ConfigError(f"no form is named {name!r}: there are {', '.join(get_args(names))}, or None")
    return name


def is_read_whole(T: int) -> bool:
    """Whether the plain kernel reads a text of this length by its scores alone."""
    return (WHOLE_WITH_GRADIENTS if torch.is_grad_enabled() else WHOLE) >= T


def chunk(T: int, attention: Attention | None, dtype: torch.dtype) -> int:
    """How many tokens of a text the streamed kernel reads by their scores."""
    whole = WHOLE_STREAMED_NARROW if dtype.itemsize < 4 else WHOLE_STREAMED
    return T if attention == "parallel" or (attention is None and whole >= T) else CHUNK


def streams(kernel: Kernel | None) -> bool:
    """Whether the streamed kernel reads: where it is asked for by name, and no compiler is at work, which cannot read it."""
    return kernel == "streamed" and not torch.compiler.is_compiling()
