"""Checkpoints as pytrees, and functions that jax.export writes down."""

from __future__ import annotations

import doctest
import inspect

import jax
import jax.numpy as jnp
import numpy as np

import bdh_jax
import bdh_jax.files
from bdh_jax import Params, RecurrentState, training
from bdh_spec.checkpoint import EMBEDDED


def test_a_checkpoint_is_a_pytree_in_one_line():
    assert doctest.testmod(bdh_jax.files).failed == 0
    params, config = bdh_jax.load(EMBEDDED, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert config.n_embd == 64


def test_an_exported_function_takes_params_and_states_after_it_was_written_down(params, config, tokens):
    weights = jax.tree.map(jnp.asarray, params)
    state = bdh_jax.init_state(len(tokens), config)
    ids = jnp.asarray(tokens, jnp.int32)
    advance = jax.jit(lambda state, tokens, params: bdh_jax.advance(state, tokens, params, config))
    written = bytes(jax.export.export(advance)(state, ids, weights).serialize())
    logits, after = jax.export.deserialize(written).call(state, ids, weights)
    wanted, _ = advance(state, ids, weights)
    assert isinstance(after, RecurrentState)
    np.testing.assert_array_equal(logits, wanted)
    assert type(weights) is Params


def test_arguments_stand_in_one_order_in_all_functions():
    order = ["state", "idx", "tokens", "targets", "params", "moments", "total", "config"]
    functions = [bdh_jax.forward, bdh_jax.trace, bdh_jax.advance, bdh_jax.gradients, bdh_jax.objective, bdh_jax.generate]
    for function in [*functions, bdh_jax.prefill, training.train_step, training.add_gradients]:
        names = [name for name in inspect.signature(function).parameters if name in order]
        assert names == sorted(names, key=order.index), function.__name__
