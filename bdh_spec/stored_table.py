"""Whether frequencies that a file stores are the normative table of R4, for everybody who reads such files."""

from __future__ import annotations

import numpy as np

from bdh_spec.arrays import Array
from bdh_spec.rope import frequencies

# How far a stored table may be from the normative one, relatively, and still be it. The formula worked out in float32 is up
# to 8.6 * 2^-24 away, in torch and MLX alike, over every even N to 2000 and powers of two to 131072: an exponent rounded by
# 2^-25 costs ln(theta) = 11 times that. Four times as much leaves room for the power functions of accelerators; one AdamW
# step at a learning rate of 5e-5 moves the least affected frequency by 3e-4.
TABLE_ROUNDING = 2.0**-19


def is_the_table(stored: Array, eps: float = 0.0, tiny: float = 0.0) -> bool:
    """Whether frequencies (N,) from a file are the normative table, as its writer's arithmetic and storage rounded it.

    ``eps`` and ``tiny`` are the spacing at 1 and the smallest positive number of the dtype they were stored in.
    """
    return is_stored(frequencies(stored.size), stored, TABLE_ROUNDING + eps, tiny)


def is_stored(table: Array, stored: Array, eps: float, tiny: float) -> bool:
    """Whether frequencies from a file are those of a table, but for a relative rounding of ``eps``, or ``tiny`` at least."""
    wanted, values = table.astype(np.float64), stored.astype(np.float64)
    return bool((np.abs(values - wanted) <= eps * np.abs(wanted) + tiny).all())
