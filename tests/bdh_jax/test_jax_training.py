"""Gradients, dropout and the optimiser in JAX."""

from __future__ import annotations

import dataclasses
import doctest
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bdh_jax
import bdh_jax.bdh
from bdh_conformance.yardstick.tolerances import error
from bdh_jax import BDH, gradients, init, loss, model, training
from bdh_jax.backend import JAXBackend
from bdh_jax.rope import words
from bdh_spec import AdamW
from bdh_spec import gradients as spec_gradients
from bdh_spec.numpy_backend import NumpyBackend
from bdh_spec.params import cast

compiled_gradients = jax.jit(gradients, static_argnames="config")


@pytest.fixture(scope="module")
def weights(params):
    return jax.tree.map(jnp.asarray, params)


def test_r8_dropout_masks_the_gradient_as_in_the_specification(params, config, tokens, targets):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda weight: jnp.asarray(weight, jnp.float64), params)
        key = jax.random.key(5)
        value, actual = jax.jit(gradients, static_argnames="config")(tokens, targets, wide, config, key=key)
        keys = jax.random.split(key, config.n_layer)
        keep = np.asarray(jax.jit(jax.vmap(lambda k: model.dropout(config, tokens.shape, jnp.float64, k)))(keys))
    reference, expected = spec_gradients.gradients(tokens, targets, cast(params, np.float64), config, keep=keep)
    assert set(np.unique(keep)) == {0, 1 / (1 - config.dropout)}
    assert float(value) == pytest.approx(reference, rel=1e-10)
    for slope, wanted in zip(actual, expected, strict=True):
        assert error(np.asarray(slope), wanted) <= 1e-10


def test_r8_nothing_drops_outside_training(pair, tokens, targets):
    port, _ = pair("float32")
    np.testing.assert_array_equal(port.forward(tokens), port.forward(tokens))
    assert port.loss(tokens, targets) == port.loss(tokens, targets)


def test_r8_the_seed_of_the_optimizer_decides_the_masks(params, config, tokens, targets):
    def first_loss(seed):
        port = JAXBackend().load(params, config)
        return port.train_step(port.optimizer(AdamW(seed=seed)), tokens, targets)

    evaluated = JAXBackend().load(params, config).loss(tokens, targets)
    losses = [first_loss(seed) for seed in (0, 0, 1, 2**40)]
    assert losses[0] == losses[1]
    assert len({*losses, evaluated}) == 4


@pytest.mark.parametrize(("clip", "betas"), [(0.01, (0.9, 0.99)), (1e6, (0.5, 0.9)), (None, (0.0, 0.95))])
def test_adamw_takes_the_steps_of_the_specification(params, config, tokens, targets, clip, betas):
    config = dataclasses.replace(config, dropout=0.0)
    port, spec = (backend.load(params, config, dtype="float64") for backend in (JAXBackend(), NumpyBackend()))
    settings = AdamW(learning_rate=1e-2, clip=clip, betas=betas)
    memories = [m.optimizer(settings) for m in (port, spec)]
    for _ in range(3):
        losses = [m.train_step(memory, tokens, targets) for m, memory in zip((port, spec), memories, strict=True)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    for actual, expected in zip(port.params(), spec.params(), strict=True):
        assert error(actual, expected) <= 1e-10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_lowers_the_loss_of_what_it_sees(params, config, tokens, targets, dtype):
    config = config if dtype == "float32" else dataclasses.replace(config, dropout=0.0)
    port = JAXBackend().load(params, config, dtype=dtype)
    optimizer = port.optimizer(AdamW(learning_rate=1e-2))
    before = port.loss(tokens, targets)
    for _ in range(20):
        port.train_step(optimizer, tokens, targets)
    assert port.loss(tokens, targets) < before


def test_optax_takes_the_parameters_as_they_are(weights, config, tokens, targets):
    optimizer = optax.adamw(1e-2)

    @jax.jit
    def step(weights, slopes):
        updates, _ = optimizer.update(slopes, optimizer.init(weights), weights)
        return optax.apply_updates(weights, updates)

    before, slopes = compiled_gradients(tokens, targets, weights, config)
    moved = step(weights, slopes)
    assert type(moved) is type(weights)
    assert compiled_gradients(tokens, targets, moved, config)[0] < before


def test_jit_vmap_and_grad_compose_and_advance_has_the_gradient_of_the_parallel_form(weights, config, tokens, targets):
    def read_on(w, state, text, target):
        return loss(model.advance(state, text, w, config)[0], target)

    states = jax.vmap(lambda _: model.init_state(1, config))(tokens[:, 0])
    stacked = jax.jit(jax.vmap(jax.grad(read_on), in_axes=(None, 0, 0, 0)))(weights, states, tokens[:, None], tokens[:, None])
    _, together = compiled_gradients(tokens, tokens, weights, config)
    for each, slope in zip(stacked, together, strict=True):
        np.testing.assert_allclose(each.mean(0), slope, rtol=0, atol=4e-6 * float(np.abs(slope).max()))


def test_the_object_is_a_pytree_of_its_weights(weights, config, tokens, targets):
    bdh = BDH(config, weights)
    logits, value = bdh(tokens, targets)
    assert jax.tree.leaves(bdh) == list(weights)
    np.testing.assert_allclose(jax.jit(lambda model: model(tokens)[0])(bdh), logits, atol=1e-5)
    assert float(value) == pytest.approx(float(compiled_gradients(tokens, targets, weights, config)[0]), rel=1e-5)
    assert bdh(tokens)[1] is None


def test_fresh_weights_are_normal_with_standard_deviation_one_fiftieth(config):
    fresh = jax.jit(init, static_argnums=0)(dataclasses.replace(config, n_embd=64), jax.random.key(0))
    assert {weight.dtype for weight in fresh} == {jnp.dtype(jnp.float32)}
    assert float(fresh.decoder.std()) == pytest.approx(0.02, rel=0.05)


def test_importing_and_running_leave_x64_as_it_was(pair, tokens):
    assert not jax.config.jax_enable_x64
    assert pair("float64")[0].forward(tokens).dtype == np.float64
    assert not jax.config.jax_enable_x64
    assert jnp.ones(1).dtype == jnp.float32


def test_a_float32_model_stays_float32_in_a_process_with_x64(pair, weights, config, tokens, targets):
    port, _ = pair("float32")
    with jax.enable_x64(True):
        state = model.init_state(2, config)
        after = jax.eval_shape(partial(model.advance, config=config), state, tokens, weights)
        rates = training.rates_at(1, AdamW(), 1e-3)
        arguments = (tokens, targets, weights, training.init_moments(weights), words(0), rates)
        trained = jax.eval_shape(partial(training.train_step, config=config), *arguments)
        inside = port.forward(tokens)
    assert error(inside, port.forward(tokens)) <= 1e-6
    assert {leaf.dtype for leaf in jax.tree.leaves((after, trained))} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.uint32)}


def test_clipping_is_by_the_norm_of_all_slopes_together(weights):
    ones = jax.tree.map(jnp.ones_like, weights)
    total = np.sqrt(sum(weight.size for weight in weights))
    assert float(training.clip_scale(ones, 1.0)) == pytest.approx(1 / total, rel=1e-6)
    assert float(training.clip_scale(ones, 1e9)) == 1.0


@pytest.mark.parametrize("module", [bdh_jax, bdh_jax.bdh, model], ids=lambda module: module.__name__)
def test_the_examples_of_the_documentation_are_true(module):
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed
