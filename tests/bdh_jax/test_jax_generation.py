"""R14 on the device: one seed, one text."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdh_jax import BDH, generation, sampling
from bdh_spec import SamplingError, TokensError
from bdh_spec.numpy_backend import NumpyBackend
from bdh_spec.sampling import Sampling, sample

PROMPT = np.array([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])


@pytest.fixture(scope="module")
def weights(params):
    return jax.tree.map(jnp.asarray, params)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.7, 4), (1.3, 99), (0.0, None), (1.0, 0)])
def test_r14_the_loop_on_the_device_writes_the_text_of_the_specification(params, weights, config, temperature, top_k):
    reference = NumpyBackend().load(params, config)
    for seed in (0, 7, 2**64 - 1):
        actual = generation.generate(PROMPT, weights, config, 8, temperature, top_k, seed=seed)
        np.testing.assert_array_equal(actual, reference.generate(PROMPT, 8, temperature, top_k, seed))


def test_r14_protocol_and_loop_write_the_same_text(pair, weights, config):
    port, _ = pair("float32")
    np.testing.assert_array_equal(port.generate(PROMPT, 8, seed=3), generation.generate(PROMPT, weights, config, 8, seed=3))


def test_r14_without_a_seed_every_text_is_a_new_one(weights, config):
    model = BDH(config, weights)
    functions = lambda: generation.generate(PROMPT, weights, config, 20, 3.0)  # noqa: E731
    for write in (functions, lambda: model.generate(PROMPT, 20, 3.0)):
        assert len({write().tobytes() for _ in range(3)}) == 3


def test_r14_the_device_draws_what_the_specification_draws():
    rng = np.random.default_rng(0)
    logits, draws = rng.normal(0, 3, (2000, 32)).astype(np.float32), rng.random(2000)
    logits[::2] = np.round(logits[::2])  # ties at the k-th value and at the best
    draws[:10] = 0, 1 - 2.0**-53, *np.arange(8) / 8
    with jax.enable_x64(True):
        for temperature, top_k in [(1.0, 32), (0.3, 5), (1.0, 1), (0.0, 32)]:
            drawn = jax.jit(sampling.sample)(logits, draws, temperature, top_k)
            wanted = [sample(row, draw, Sampling(temperature, top_k)) for row, draw in zip(logits, draws, strict=True)]
            np.testing.assert_array_equal(drawn, wanted)


def test_no_new_tokens_are_the_prompt(weights, config):
    np.testing.assert_array_equal(generation.generate(PROMPT, weights, config, 0), PROMPT)


def test_a_model_that_has_diverged_is_refused(weights, config):
    broken = weights._replace(lm_head=weights.lm_head.at[0, 0].set(jnp.nan))
    with pytest.raises(SamplingError, match="diverged"):
        generation.generate(PROMPT, broken, config, 4)


def test_the_object_generates_and_refuses_bad_calls(weights, config):
    model = BDH(config, weights)
    np.testing.assert_array_equal(
        model.generate(PROMPT, 8, 0.7, 4, seed=5), generation.generate(PROMPT, weights, config, 8, 0.7, 4, seed=5)
    )
    with pytest.raises(TokensError, match="token 11 at"):
        model.generate([[1, 11]], 4)
    with pytest.raises(SamplingError, match="temperature"):
        model.generate([[1, 2]], 4, temperature=-1.0)


def test_float64_weights_generate_in_a_process_with_x64(params, config):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda weight: jnp.asarray(weight, jnp.float64), params)
        actual = generation.generate(PROMPT, wide, config, 8, seed=7)
    np.testing.assert_array_equal(actual, NumpyBackend().load(params, config, dtype="float64").generate(PROMPT, 8, seed=7))
