"""The streamed kernel: the same function as the plain one, whatever the chunks it is cut into, and a fraction of its memory."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bdh_spec
from bdh_conformance.outcomes import BAD
from bdh_conformance.plan import TIERS, plan
from bdh_conformance.runner import Run
from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.tolerances import FLOAT64, error
from bdh_jax import forms, forward, training
from bdh_jax.backend import StreamedJAXBackend
from bdh_jax.layer import wide
from bdh_jax.rope import rotation, words
from bdh_jax.streamed import gated
from bdh_spec import BDHConfig, ConfigError, Frequencies, Params
from bdh_spec.model import frequencies_of
from bdh_spec.params import shapes

SMALL = BDHConfig(2, 6, 0.0, 2, 8, 11)
OWN = Frequencies(np.random.default_rng(0).normal(size=SMALL.n_neurons).astype(np.float32))  # pairs that differ
LONG = Case(SMALL, 2, 37, seed=3, scale=10)
CASES = {
    "a chunk": (Case(SMALL, 2, 8, seed=2, scale=10), "exact"),
    "ragged chunks": (LONG, "exact"),
    "phases of float32": (LONG, "float32"),
    "pairs that differ": (dataclasses.replace(LONG, config=dataclasses.replace(SMALL, freqs=OWN)), "exact"),
}


@pytest.fixture
def small_chunks(monkeypatch):
    """Sizes at which the smallest models are cut everywhere; no other test has compiled for these shapes."""
    monkeypatch.setattr(forms, "PARALLEL", 8)
    monkeypatch.setattr(forms, "CHUNK", 8)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("case", "phase"), CASES.values(), ids=CASES)
def test_logits_loss_and_every_gradient_are_the_specifications(case, phase):
    port, reference = (
        backend.load(case.params, case.config, device="cpu", dtype="float64", phase=phase)
        for backend in (StreamedJAXBackend(), bdh_spec.get_backend("numpy"))
    )
    assert error(port.forward(case.tokens), reference.forward(case.tokens)) <= FLOAT64
    (value, slopes), (expected, wanted) = (m.gradients(case.tokens, case.targets) for m in (port, reference))
    assert value == pytest.approx(expected, rel=FLOAT64)
    for slope, other in zip(slopes, wanted, strict=True):
        assert error(slope, other) <= FLOAT64


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("T", [8, 20])
def test_r8_what_is_dropped_is_the_same_in_the_gradient(T):
    """The slope along a random direction against a central difference, with the same key and so the same mask."""
    rng, config = np.random.default_rng(5), dataclasses.replace(SMALL, dropout=0.4)
    with jax.enable_x64(True):
        held = (jnp.asarray(rng.normal(size=(2, T, 6))), *(jnp.asarray(w, jnp.float64) for w in LONG.params))
        away = [jnp.asarray(rng.normal(size=w.shape)) for w in held]
        local = rotation(words(0), forms.chunk(T), frequencies_of(config), wide(jnp.float64), "exact")

        @jax.jit
        def value(x, *weights):
            return (gated(x, Params(*weights), config, "exact", local, jax.random.key(3)) * away[0]).sum()

        slopes = jax.grad(value, argnums=tuple(range(6)))(*held)
        slope = sum((s * a).sum() for s, a in zip(slopes, away, strict=True))
        ahead, behind = (value(*(w + step * a for w, a in zip(held, away, strict=True))) for step in (1e-7, -1e-7))
        assert float(slope) == pytest.approx(float(ahead - behind) / 2e-7, rel=1e-4, abs=1e-4)


@pytest.mark.usefixtures("small_chunks")
def test_jit_grad_and_vmap_compose():
    params = jax.tree.map(jnp.asarray, LONG.params)
    texts, targets = jnp.asarray(LONG.tokens)[:, None], jnp.asarray(LONG.targets)[:, None]

    def loss(params, tokens, targets):
        return training.objective(tokens, targets, params, SMALL, kernel="streamed")

    each = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0, 0)))(params, texts, targets)
    one = jax.jit(jax.grad(loss))(params, texts[0], targets[0])
    for slopes, alone in zip(each, one, strict=True):
        np.testing.assert_allclose(slopes[0], alone, rtol=0, atol=1e-5 * float(np.abs(alone).max()))


def test_a_kernel_that_nobody_knows_is_refused():
    with pytest.raises(ConfigError, match="no kernel is named 'flash': there are plain, streamed, or None"):
        forward(jnp.zeros((1, 3), int), jax.tree.map(jnp.asarray, LONG.params), SMALL, kernel="flash")


WIDE = BDHConfig(2, 64, 0.0, 4, 128, 11)


def working_memory(function, T, **how):
    """Bytes that a compiled program wants beside what goes in and comes out; nothing is run."""
    weights = Params(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes(WIDE)))
    tokens = jax.ShapeDtypeStruct((1, T), jnp.int32)
    arguments = (tokens,) if function is forward else (tokens, tokens)
    program = jax.jit(function, static_argnames=("config", "kernel")).lower(*arguments, weights, config=WIDE, **how)
    return program.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("function", [forward, training.gradients], ids=["logits", "gradient"])
def test_memory_is_linear_in_a_long_text_and_a_sixth_of_the_plain_kernel_s(function):
    streamed = working_memory(function, 2048)
    assert working_memory(function, 4096) < 2.2 * streamed
    assert streamed < working_memory(function, 2048, kernel="plain") / 6


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_suite_finds_nothing(dtype):
    """The structured cases of the standard tier, which float64 above does not replace: rounding, states, training, orders."""
    run = Run(StreamedJAXBackend(), explains=False)
    standard = TIERS["standard"]
    results = [run.run(check) for check in plan(standard, run.backend.capabilities, dtypes=(dtype,)) if not check.reason]
    assert len(results) > 8
    assert [result.worst.message for result in results if result.status in BAD and result.worst] == []
