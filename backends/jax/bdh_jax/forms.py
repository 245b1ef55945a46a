"""Which of several forms that compute the same reads a text: all thresholds in one place, counted and not yet measured.

``kernel``: plain is the form to read beside the specification, streamed the one that never holds all neurons. None, the
default, chooses by size.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from bdh_spec.config import BDHConfig
from bdh_spec.errors import ConfigError

Kernel: TypeAlias = Literal["plain", "streamed"]

PARALLEL = 1024  # tokens up to which scores (T, T) cost less than a state
CHUNK = 256  # tokens read at once beyond that
# Neurons of all tokens and heads up to which compiling takes longer than running does: the plain kernel has the smaller
# program, and lengths of text share programs by padding to powers of two.
SMALL = 2**20
FINE = 8  # beyond that, lengths are padded to eighths of a power of two


def streams(kernel: Kernel | None, shape: tuple[int, ...], config: BDHConfig) -> bool:
    """Whether the streamed kernel reads tokens of this shape (B, T)."""
    if kernel is not None and kernel not in get_args(Kernel):
        raise ConfigError(f"no kernel is named {kernel!r}: there are {', '.join(get_args(Kernel))}, or None")
    return kernel == "streamed" or (kernel is None and (shape[1] > PARALLEL or neurons(shape, config) > SMALL))


def chunk(T: int) -> int:
    """How many tokens of a text the streamed kernel reads by their scores: all, or chunks of nearly the same size."""
    return T if T <= PARALLEL else -(-T // -(-T // CHUNK))


def neurons(shape: tuple[int, ...], config: BDHConfig) -> int:
    """How many neurons of how many tokens (B, T) a layer has."""
    return shape[0] * shape[1] * config.n_head * config.n_neurons


def power_of_two(n: int) -> int:
    """The power of two that holds ``n`` tokens: texts of different length share a program."""
    return 1 << (n - 1).bit_length()


def length(shape: tuple[int, ...], config: BDHConfig) -> int:
    """The length to which texts (B, T) are padded, so that some lengths share a program."""
    most = power_of_two(shape[1])
    if neurons(shape, config) <= SMALL:
        return most
    step = max(most // 2 // FINE, 1)
    return -(-shape[1] // step) * step
