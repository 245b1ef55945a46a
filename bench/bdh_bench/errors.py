"""How right every port is: its errors in small cases, and what share of the allowed ones they are.

The tolerances are the conformance suite's, so this module alone knows it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
from rich.table import Table

import bdh_spec
from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_conformance.yardstick.tolerances import Expectation, error, expect
from bdh_spec import Model
from bdh_spec import model as spec
from bdh_spec.gradients import gradients
from bdh_spec.params import Array

WHAT = ("logits", "traces", "decoding", "gradients")
SCALES = (1.0, 20.0)  # of weights
TIME = 8
PIECES = (3, 4, 5)  # where a decoding is cut
Named = dict[str, Array]


def errors(ports: Sequence[str], seeds: int) -> Table:
    """Per port and dtype, over small cases: the median worst row, and the largest share of what is allowed."""
    cases = [Case(c, time=TIME, seed=seed, scale=s) for c in CONFIGS.values() for seed in range(seeds) for s in SCALES]
    table = Table("port", "dtype", *(cell for what in WHAT for cell in (what, "of allowed")))
    for port in ports:
        backend = bdh_spec.get_backend(port)
        for dtype in backend.capabilities.dtypes:
            found = [worst(backend.load(case.params, case.config, device="cpu", dtype=dtype), case, dtype) for case in cases]
            cells = [f([row[i] for row in found]) for i in range(len(WHAT)) for f in (typical, largest_share)]
            table.add_row(port, dtype, *cells)
    table.caption = (
        f"{len(cases)} cases: {', '.join(CONFIGS)}; fresh weights and twenty times that; T = {TIME}, decode split 3 1 1 3"
    )
    return table


def worst(model: Model, case: Case, dtype: str) -> list[tuple[float, float]]:
    """Error and share of the allowed error, for logits, traces, decoding and gradients."""
    traced = expect(lambda p: spec.trace(case.tokens, p, case.config), case.params, dtype)
    decoded = expect(lambda p: {"logits": spec.forward(case.tokens, p, case.config)}, case.params, dtype)
    slopes = expect(lambda p: gradients(case.tokens, case.targets, p, case.config)[1]._asdict(), case.params, dtype)
    return [
        shares({"logits": model.forward(case.tokens)}, {"logits": traced["logits"]}),
        shares(model.trace(case.tokens), traced),
        shares({"logits": in_pieces(model, case)}, decoded),
        shares(model.gradients(case.tokens, case.targets)[1]._asdict(), slopes),
    ]


def shares(actual: Named, expected: dict[str, Expectation]) -> tuple[float, float]:
    """The largest error, and the largest share of what is allowed."""
    found = {name: error(actual[name], e.reference) for name, e in expected.items()}
    return max(found.values()), max(float(np.max(found[name] / e.allowed)) for name, e in expected.items())


def in_pieces(model: Model, case: Case) -> Array:
    """Logits by chunks and single steps."""
    state, logits = model.init_state(case.batch), []
    for chunk in np.split(case.tokens, PIECES, axis=1):
        part, state = model.advance(state, chunk, donate=True)
        logits.append(part)
    return np.concatenate(logits, axis=1)


def typical(pairs: list[tuple[float, float]]) -> str:
    return f"{statistics.median(pair[0] for pair in pairs):.1e}"


def largest_share(pairs: list[tuple[float, float]]) -> str:
    return f"{max(pair[1] for pair in pairs):.2f}"
