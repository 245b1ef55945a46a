"""JAX compiles per shape: how many programs a user meets, and how large they are."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdh_jax import generation, model, training
from bdh_jax.backend import JAXBackend
from bdh_spec import AdamW
from bdh_spec.params import shapes

PROMPT = [[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]]


@pytest.mark.parametrize("verb", ["forward", "gradients", "advance", "trace"])
def test_one_compiled_body_serves_all_layers(config, verb):
    assert program_size(verb, config, 20) == pytest.approx(program_size(verb, config, 2), rel=SLACK[verb])


SLACK = {"forward": 0.01, "gradients": 0.02, "advance": 0.01, "trace": 6.0}  # a trace names every layer's stages


def program_size(verb, config, n_layer):
    """Lines of the lowered program: the source of its compile time, without a clock."""
    config = dataclasses.replace(config, n_layer=n_layer)
    weights = model.Params(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes(config)))
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    state = jax.eval_shape(lambda: model.init_state(2, config))
    calls = {
        "forward": (model.forward, (tokens, weights)),
        "trace": (model.trace, (tokens, weights)),
        "gradients": (training.gradients, (tokens, tokens, weights)),
        "advance": (model.advance, (state, tokens, weights)),
    }
    function, arguments = calls[verb]
    return len(jax.jit(function, static_argnames="config").lower(*arguments, config=config).as_text().splitlines())


def test_forty_lengths_of_prompt_share_five_programs(params, config, compilations, monkeypatch):
    port = JAXBackend().load(params, dataclasses.replace(config, n_layer=1))  # a model that no other test has compiled
    text = np.zeros((1, 64), int)
    state = port.init_state()
    compilations.clear()
    monkeypatch.setattr(generation, "CHUNK", 16)
    for length in range(1, 41):
        _, state = port.advance(state, text[:, :length], donate=True)
    assert len(compilations) <= 5


def test_eight_lengths_of_text_share_four_programs_in_forward(params, config, compilations):
    port = JAXBackend().load(params, dataclasses.replace(config, n_layer=1))
    for length in range(1, 9):
        port.forward(np.zeros((1, length), int))
    assert len(compilations) <= 4


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_second_token_and_a_second_model_compile_nothing(params, config, compilations, dtype):
    def two_tokens():
        port = JAXBackend().load(params, config, dtype=dtype)
        state = port.init_state(2)
        for _ in range(2):
            _, state = port.advance(state, [[1], [2]], donate=True)

    two_tokens()
    compilations.clear()
    two_tokens()
    assert not compilations


def test_generate_compiles_no_more_for_another_length_temperature_top_k_or_seed(params, config, compilations):
    weights = jax.tree.map(jnp.asarray, params)
    generation.generate(PROMPT, weights, config, 8)
    compilations.clear()
    generation.generate(PROMPT[::-1], weights, config, 5, temperature=0.5, top_k=4, seed=9)
    generation.generate(PROMPT[::-1], weights, config, 6, temperature=0.0)
    assert not compilations


def test_another_learning_rate_or_seed_compiles_nothing(params, config, compilations, tokens):
    port = JAXBackend().load(params, config)
    port.train_step(port.optimizer(AdamW()), tokens, tokens)
    compilations.clear()
    port.train_step(port.optimizer(AdamW(learning_rate=0.1, betas=(0.5, 0.9), clip=None, seed=3)), tokens, tokens)
    assert not compilations


def test_pieces_are_chunks_that_join_to_the_whole():
    for length in (1, 7, 256, 511, 1000):
        parts = list(generation.pieces(length))
        assert sum(size for _, size in parts) == length
        assert [start for start, _ in parts] == [sum(size for _, size in parts[:i]) for i in range(len(parts))]
        assert {size for _, size in parts} <= {1, 2, 4, 8, 16, 32, 64, 128, 256}


def test_r13_a_step_updates_a_donated_state_in_place(config):
    config = dataclasses.replace(config, n_embd=64, n_head=1, mlp_internal_dim_multiplier=64)
    weights = model.Params(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes(config)))
    state = jax.eval_shape(lambda: model.init_state(1, config))
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    memory = generation.advance_donated.lower(state, token, weights, config).compile().memory_analysis()
    whole = np.prod(state.layers.shape) * 4
    assert memory.alias_size_in_bytes >= whole
    assert memory.temp_size_in_bytes < whole
