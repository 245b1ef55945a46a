"""The frequency table that a port uses, measured: every port's power function is off in other entries, and so no known mistake
computes what it computes.

A trace tells a pair of neurons before and after its rotation, and so its phase; far along a text a phase tells its frequency.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bdh_conformance.adversaries.mistakes import MISTAKES, Mistake
from bdh_spec.params import Array
from bdh_spec.rope import Phase, frequencies

UNIT = 2.0**-23  # the relative distance of two float32 numbers, at most
UNITS = 8.6  # how far a formula worked out in float32 may be off: see bdh_spec.rope
STEPS = 600  # tokens of the text that is traced
PHASE_ERROR: dict[Phase, float] = {"exact": 2e-6, "float32": 5e-5}  # of a token's phase; of a hundred turns in float32
CERTAIN = 4.0  # times what float32 resolves


def of_trace(trace: Mapping[str, Array], phase_error: float = PHASE_ERROR["exact"]) -> list[Mistake]:
    """What is wrong with the table behind the first layer of a trace, if something is."""
    off, resolved = measured(trace["layers.0.x_sparse"], trace["layers.0.rotated"], phase_error)
    wrong = np.abs(off) > CERTAIN * resolved
    if not wrong.any():
        return []
    worst = float(np.max(np.abs(off[wrong])))
    return [MISTAKES["table_by_float32_power" if worst <= UNITS * UNIT else "table_trained"]]


def measured(before: Array, after: Array, phase_error: float = PHASE_ERROR["exact"]) -> tuple[Array, Array]:
    """How far each pair's frequency (N/2,) is off, relatively, and how finely that could be seen.

    The phase of each token is compared with the table's, token by token, so that no whole turn is lost between them.
    """
    table = frequencies(before.shape[-1])[::2].astype(np.float64)
    a, b = (x[..., 0::2].astype(np.float64) + 1j * x[..., 1::2] for x in (before, after))
    T = a.shape[2]
    t = np.arange(T)[:, None]
    turned = (b * np.conj(a)).sum(axis=(0, 1)) * np.exp(-2j * np.pi * np.mod(t * table, 1))  # T N/2
    seen = np.abs(turned) > 1e-9 * np.abs(turned).max()
    away = np.where(seen, np.unwrap(np.where(seen, np.angle(turned), 0.0), axis=0), 0.0) / (2 * np.pi)
    weight = np.where(seen, t, 0).astype(np.float64)
    slope = (weight * away).sum(axis=0) / np.maximum((weight * t).sum(axis=0), 1)  # turns per token
    finest = phase_error / (2 * np.pi) / np.maximum(np.sqrt((weight * t).sum(axis=0)), 1)
    return slope / table, finest / table
