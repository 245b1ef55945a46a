"""Which of several forms that compute the same reads a text: thresholds in one place, counted and not yet measured on Metal.

``kernel``: plain is the form to read beside the specification, streamed the one that never holds all neurons. None, the
default, chooses by size.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import mlx.core as mx

from bdh_spec.config import BDHConfig
from bdh_spec.errors import ConfigError

Kernel: TypeAlias = Literal["plain", "streamed"]

CHUNK = 256  # tokens read at once on top of a state
STEP = 64  # rows whose scores are computed at once, up to their own diagonal
TOGETHER = 2048  # rows of short texts that are read at once
# Neurons of all tokens and heads up to which the plain kernel is faster: below, what counts is the number of operations.
SMALL = 2**19


def known(name: Kernel | None) -> Kernel | None:
    """A kernel by its name, or None."""
    if name is not None and name not in get_args(Kernel):
        raise ConfigError(f"no kernel is named {name!r}: there are {', '.join(get_args(Kernel))}, or None")
    return name


def streams(kernel: Kernel | None, tokens: mx.array, config: BDHConfig) -> bool:
    """Whether the streamed kernel reads tokens (B, T): where it is asked for, or where their neurons fill memory."""
    if kernel is None:
        return tokens.size * config.n_head * config.n_neurons > SMALL or tokens.shape[1] > whole(config)
    return kernel == "streamed"


def whole(config: BDHConfig) -> int:
    """The longest text that is read by its scores alone.

    A token costs N multiplications for each earlier one by its score. A state costs it 2 N D to read and as many to write, and
    the scores within its chunk; with gradients both cost some three times that.
    """
    return CHUNK + 4 * config.n_embd


def chunk(T: int, config: BDHConfig) -> int:
    """How many tokens of a text the streamed kernel reads by their scores."""
    return T if whole(config) >= T else CHUNK
