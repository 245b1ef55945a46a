"""The streamed kernel: the same function as the plain one, whatever the chunks, groups and rows it is cut into."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from bdh_conformance import assert_agrees
from bdh_conformance.channels import CHANNELS
from bdh_conformance.outcomes import BAD
from bdh_conformance.plan import TIERS, plan
from bdh_conformance.runner import Run
from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.tolerances import FLOAT64, Expectation
from bdh_mlx import BDH, forms
from bdh_mlx.backend import StreamedMLXBackend
from bdh_mlx.forms import Kernel
from bdh_mlx.model import forward, loss
from bdh_mlx.streamed import gated
from bdh_spec import BDHConfig, ConfigError, Frequencies, Params, get_backend, init
from bdh_spec.rope import PHASES, Phase

SMALL = BDHConfig(2, 6, 0.0, 2, 8, 11)
OWN = Frequencies(np.random.default_rng(0).normal(size=SMALL.n_neurons).astype(np.float32))  # pairs that differ

# Texts on both sides of what is worked on at once below: chunks of 8 tokens, 16 rows of texts together, scores of 3 rows.
SHAPES = {
    "within_a_chunk": Case(SMALL, 3, 5, seed=1, scale=10),
    "a_chunk": Case(SMALL, 2, 8, seed=2, scale=10),
    "ragged_chunks": Case(SMALL, 3, 37, seed=3, scale=10),
    "whole_chunks": Case(replace(SMALL, n_head=3), 1, 32, seed=4, scale=10),
    "pairs_that_differ": Case(replace(SMALL, freqs=OWN), 2, 37, seed=3, scale=10),
    "many_texts": Case(BDHConfig(3, 4, 0.0, 1, 33, 7), 23, 3, seed=6, scale=10),
    "one_token": Case(SMALL, 2, 1, seed=7, scale=10),
}
each_shape = pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which the smallest models are cut everywhere."""
    for name, size in {"CHUNK": 8, "STEP": 3, "TOGETHER": 16, "whole": lambda config: 8}.items():
        monkeypatch.setattr(forms, name, size)


def both(case: Case, phase: Phase = "exact") -> tuple[Any, Any]:
    """The streamed kernel and the specification in float64."""
    given = {"device": "cpu", "dtype": "float64", "phase": phase}
    return (
        StreamedMLXBackend().load(case.params, case.config, **given),
        get_backend("numpy").load(case.params, case.config, **given),
    )


def agree(actual: dict[str, np.ndarray], reference: dict[str, np.ndarray], case: Case) -> None:
    assert_agrees("mlx", actual, {name: Expectation(value, FLOAT64, FLOAT64) for name, value in reference.items()}, str(case))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("phase", PHASES)
@each_shape
def test_logits_are_the_specifications(case: Case, phase: Phase) -> None:
    port, reference = both(case, phase)
    agree({"logits": port.forward(case.tokens)}, {"logits": reference.forward(case.tokens)}, case)


@pytest.mark.usefixtures("small_chunks")
@each_shape
def test_r15_every_gradient(case: Case) -> None:
    port, reference = both(case)
    (value, slopes), (expected, reference_slopes) = (m.gradients(case.tokens, case.targets) for m in (port, reference))
    assert value == pytest.approx(expected, rel=FLOAT64)
    agree(slopes._asdict(), reference_slopes._asdict(), case)


@pytest.mark.usefixtures("small_chunks")
@each_shape
def test_r8_what_is_dropped_is_the_same_in_the_gradient(case: Case) -> None:
    """The slope along a random direction against a central difference, with the same key and so the same mask."""
    rng = np.random.default_rng(5)
    config = replace(case.config, dropout=0.4)
    with mx.stream(mx.cpu):
        held = {name: mx.array(w.astype(np.float64), dtype=mx.float64) for name, w in case.params._asdict().items()}
        held["x"] = mx.array(rng.normal(size=(*case.tokens.shape, config.n_embd)), dtype=mx.float64)
        away = {name: mx.array(rng.normal(size=w.shape), dtype=mx.float64) for name, w in held.items()}

        def value(held: dict[str, mx.array]) -> mx.array:
            params = Params(*(held[name] for name in Params._fields))
            return (gated(held["x"], params, config, "exact", mx.random.key(3)) * away["x"]).sum()

        slopes = mx.grad(value)(held)
        slope = sum(float(np.array((slopes[name] * away[name]).sum())) for name in held)
        ahead, behind = (
            float(np.array(value({name: w + step * away[name] for name, w in held.items()}))) for step in (1e-7, -1e-7)
        )
    assert slope == pytest.approx((ahead - behind) / 2e-7, rel=1e-4, abs=1e-4)


@pytest.mark.usefixtures("small_chunks")
def test_r8_no_two_heads_chunks_texts_or_layers_share_a_mask() -> None:
    """All neurons are 1 and all pass the gate, so that what the decoder returns counts who was kept."""
    config = BDHConfig(1, 4, 0.5, 2, 32, 11)
    ones = Params(*(mx.ones(w.shape) for w in init(config, np.random.default_rng(0))))
    x = mx.broadcast_to(mx.array([1.0, -1.0, 1.0, 1.0]), (20, 20, 4))
    drawn = [np.array(gated(x, ones, config, "exact", mx.random.key(seed)))[..., 0] for seed in (1, 1, 2)]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    kept = drawn[0][:, 1:]
    assert len(np.unique(kept, axis=0)) == 20


@pytest.mark.parametrize("kernel", ["plain", "streamed"])
def test_a_kernel_by_its_name_computes_the_same(kernel: Kernel) -> None:
    case = SHAPES["ragged_chunks"]
    module = BDH(case.config, kernel=kernel).eval()
    module.load_weights(list(zip(("embed.weight", *Params._fields[1:]), map(mx.array, case.params), strict=True)))
    logits = np.array(module(mx.array(case.tokens))[0])
    assert_agrees("mlx", {"logits": logits}, {"logits": CHANNELS["logits"].expected(case, "float32")["logits"]}, str(case))


def test_a_kernel_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match="no kernel is named 'flash': there are plain, streamed, or None"):
        BDH(BDHConfig(), kernel="flash")  # type: ignore[arg-type]  # it is no kernel


def peak(T: int, kernel: Kernel | None, gradient: bool) -> int:
    """Bytes that reading a text, or its gradient, takes beyond the weights."""
    config = BDHConfig(2, 8, 0.0, 2, 128, 11)
    params = Params(*map(mx.array, init(config, np.random.default_rng(0))))
    tokens = mx.array(np.random.default_rng(1).integers(0, 11, (1, T)))

    def value(weights: list[mx.array]) -> mx.array:
        return loss(forward(tokens, Params(*weights), config, kernel=kernel), tokens)

    work = partial(mx.grad(value), list(params)) if gradient else partial(forward, tokens, params, config, kernel=kernel)
    mx.eval(params, tokens)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(work())
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("gradient", [False, True], ids=["logits", "gradient"])
def test_memory_is_linear_in_a_long_text_and_a_fraction_of_the_plain_kernel_s(gradient: bool) -> None:
    """MLX prepares some hundred operations ahead, each with an array for its result: that much of a chunk is always there."""
    streamed = peak(1024, None, gradient)
    assert peak(2048, None, gradient) < 2.2 * streamed
    assert streamed < peak(1024, "plain", gradient) / (2 if gradient else 3)  # at 2048: a third and a sixth, in 20 seconds


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_suite_finds_nothing(dtype: str) -> None:
    """The structured cases of the standard tier, which float64 above does not replace: rounding, states, training, orders."""
    run = Run(StreamedMLXBackend(), explains=False)
    standard = TIERS["standard"]
    results = [run.run(check) for check in plan(standard, run.backend.capabilities, dtypes=(dtype,)) if not check.reason]
    assert len(results) > 8
    assert [result.worst.message for result in results if result.status in BAD and result.worst] == []
