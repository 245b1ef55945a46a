"""How far an honest implementation may be from the specification: computed for each case, from that case.

allowed = FACTOR[dtype] * max(E_spec, E_noise), at least FLOOR, for the error of the worst row, where

- E_spec is the error of the specification's own float32 run against its float64 run, and
- E_noise that of float64 runs that round to the port's precision after every operation: once to nearest, as a port does
  and so with the same relus falling on the other side, and several times at random.

The slope, how far the whole array is scaled, is held to the same factor of its own honest size, or of the row error over the
root of the number of rows if that is more: the rounding errors of different tokens average out, and a wrong scale does not.

A fixed constant is either too loose (1e-4 misses a wrong eps, a score scale, bfloat16 frequencies) or flaky.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bdh_conformance.yardstick.noise import FLOAT32, Draws, Mirrored, Noisy, Precision, plain
from bdh_spec.dtypes import numpy_dtype
from bdh_spec.params import Array, Params, cast

# Weights of a fresh model leave float16's normal numbers (above 2^-14) in the decoder's products.
PRECISION = {
    "float32": FLOAT32,
    "bfloat16": Precision(2.0**-8, -125),
    "float16": Precision(2.0**-11, -13),
    # Not float64's own, which its arithmetic cannot add: fine enough for errors to stay in proportion to it.
    "float64": Precision(2.0**-40, -1021),
}
FINER = 2.0**-13  # rounding of float64 against that

# The largest ratio of a port's error to max(E_spec, E_noise), over all stages of 144 cases in PyTorch and in MLX, was 3.4 in
# float32, 1.7 in bfloat16 and 1.5 in float16; over 16 legal float32 implementations (summation orders, fused forms) 3.2. The
# narrow types round what they store and accumulate wider, so their noise run nearly is an upper bound already.
FACTOR = {"float32": 8.0, "bfloat16": 3.0, "float16": 3.0, "float64": 8.0}

# Errors of rounding beyond which they are no more in proportion to it: a token whose sums all but cancel is what rounding makes
# of it, and the next layers norm it to full size.
CHAOS = {"float32": 0.1, "bfloat16": 0.3, "float16": 0.3, "float64": 1e-4}

# In an array of many rows each has a tolerance of its own, but none below what most of them need: one token of a thousand whose
# sums cancel must not excuse the others.
FEW_ROWS = 64
USUAL = 0.9

# How many times the flips of a run with noise of that factor an honest port may make: hardly any makes as many.
FLIPS = 2.0

# Four roundings of float32: cases of one or two tokens can have an E_spec of zero.
FLOOR = 4 * PRECISION["float32"].unit

# Legal float64 ports stay under 5e-15; the smallest known mistake (a second final norm) moves float64 logits by 1e-6. Where a
# case makes so much of rounding that float32 loses every digit, float64 loses as many: one training in thousands does.
FLOAT64 = 1e-10
TAME = FLOAT64 * 2.0**29 / 100  # errors in float32 at which float64 has room for a hundred times as much

NOISE_RUNS = 8

# A single number, such as a loss, has no other rows to make up for lucky draws, and tokens that are alike err alike: their mean
# no less than each. Over texts of 40 models with two features, of which the norm leaves two values, three honest ports came to
# 1.7 times what a row is allowed.
LONE = 4.0

Run = Callable[[Params], dict[str, Array]]


@dataclass(frozen=True)
class Expectation:
    """What the specification says in float64, and the largest errors that still agree with it."""

    reference: Array
    allowed: Any  # of the worst row, or of each where there are many
    allowed_slope: float  # of the whole


def expect(
    run: Run, params: Params, dtype: str, *, seed: int = 0, runs: int = NOISE_RUNS, kinked: bool = False
) -> dict[str, Expectation]:
    """What a port of this dtype must compute: ``run`` maps weights to named arrays by the specification.

    The weights are first rounded to the port's dtype: storing them is not the port's mistake. Noise is drawn ``runs`` times.
    A ``kinked`` result has relus so near to zero that rounding flips some: noise as large as what it may amount to, drawn and
    then negated, misses hardly any of them.

    >>> import numpy as np
    >>> expect(lambda p: {"sum": p.embed + p.embed}, Params(*[np.ones((1, 2))] * 5), "float64")["sum"].allowed
    1e-10
    """
    held = cast(cast(params, numpy_dtype(dtype)), np.float64)
    references = run(held)
    single = run(cast(held, np.float32))
    if dtype == "float64" and all(error(single[name], reference) < TAME for name, reference in references.items()):
        return {name: Expectation(reference, FLOAT64, FLOAT64) for name, reference in references.items()}
    precision, share = PRECISION[dtype], 1.0
    if kinked:
        precision, share = precision._replace(unit=precision.unit * FACTOR[dtype]), FLIPS / FACTOR[dtype]
    generators = [None, *draws(seed, runs, mirrored=kinked)]
    rounded = [run(noisy(held, precision, rng)) for rng in generators] + [single] * (dtype != "float64")
    return {
        name: honest(reference, [plain(other[name]) for other in rounded], dtype, share)
        for name, reference in references.items()
    }


def draws(seed: int, runs: int, *, mirrored: bool) -> list[Draws]:
    """Generators of as many runs, or of one more where each has its mirror."""
    if not mirrored:
        return [np.random.default_rng(seed + i) for i in range(runs)]
    seeds = range(seed, seed + (runs + 1) // 2)
    return [each for i in seeds for each in (np.random.default_rng(i), Mirrored(np.random.default_rng(i)))]


def honest(reference: Array, runs: list[Array], dtype: str, share: float = 1.0) -> Expectation:
    """What agrees with a reference, given runs that differ from it by rounding alone, of whose error a ``share`` counts."""
    errors = share * np.max([row_errors(other, reference) for other in runs], axis=0)
    scaled = share * max(abs(slope(other, reference)) for other in runs)
    usual = usual_error(errors, dtype)
    lone = LONE if reference.ndim == 0 else 1.0
    row = usual if errors.size <= FEW_ROWS and errors.max() <= usual else np.maximum(errors, usual)
    of_all = max(scaled, usual / np.sqrt(errors.size))
    return Expectation(reference, lone * allowed(row, dtype), lone * float(allowed(of_all, dtype)))


def usual_error(errors: Array, dtype: str) -> float:
    """What most rows need: of few rows the worst that is no chaos, for one row that is must not excuse the others."""
    if errors.size > FEW_ROWS:
        return float(np.quantile(errors, USUAL))
    tame = errors[errors <= CHAOS[dtype]]
    return float((tame if tame.size else errors).max())


def allowed(error: Any, dtype: str) -> Any:
    """The largest error that agrees, given the error that rounding to PRECISION makes; any, where that leaves nothing."""
    share, least = (FACTOR[dtype] * FINER, FLOAT64) if dtype == "float64" else (FACTOR[dtype], FLOOR)
    within = np.asarray(error) <= CHAOS[dtype]  # NaN is not: rounding may have made anything of such a number
    limit = np.where(within, np.maximum(share * np.asarray(error), least), np.inf)
    return limit if limit.ndim else float(limit)


def noisy(params: Params, precision: Precision, rng: Draws | None) -> Params:
    """Float64 weights that infect everything computed from them with rounding."""
    return Params(*(Noisy.wrap(weight, precision, rng) for weight in params))


def error(actual: Array, reference: Array) -> float:
    """The error of the worst row."""
    return float(row_errors(actual, reference).max())


def row_errors(actual: Array, reference: Array) -> Array:
    """Per row, the 2-norm of the difference over the 2-norm of the reference.

    A row is one token: the last axis of (B, T, X), all heads of (B, h, T, X). Any other shape is one row. Where the
    reference is exactly zero, so must be the answer.
    """
    difference, size = norms(actual - reference), norms(reference)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((difference == 0) & (size == 0), 0.0, difference / size)


def slope(actual: Array, reference: Array) -> float:
    """By which fraction the whole array is too large (or, negative, too small): <a - r, r> / <r, r>."""
    scale = np.max(np.abs(reference), initial=0) or 1.0
    r, difference = reference / scale, (actual - reference) / scale
    return float(np.sum(difference * r) / max(float(np.sum(r * r)), np.finfo(np.float64).tiny))


def norms(values: Array) -> Array:
    """The 2-norm of each row."""
    wide = np.asarray(values, np.float64)
    axes = {3: (2,), 4: (1, 3)}.get(wide.ndim)
    largest = np.max(np.abs(wide), axis=axes, keepdims=True, initial=0)
    scale = np.where(largest > 0, largest, 1)  # squares of tiny slopes would underflow
    return np.sqrt(np.sum((wide / scale) ** 2, axis=axes)) * np.squeeze(scale, axis=axes)
