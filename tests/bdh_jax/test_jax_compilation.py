"""JAX compiles per shape: how many programs a user meets, and how large they are."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdh_jax import forms, generation, model, training
from bdh_jax.backend import JAXBackend
from bdh_spec import AdamW, BDHConfig, init
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
    monkeypatch.setattr(forms, "CHUNK", 16)
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


def test_what_is_put_on_a_device_shares_no_memory_with_numpy_nor_with_one_another(params, config):
    """JAX shares memory that happens to lie at a multiple of 64 bytes, and what is donated would be overwritten."""
    port = JAXBackend().load(params, config)
    held = np.zeros(4096 + 64, np.uint8)
    aligned = held[-held.ctypes.data % 64 :][:4096].view(np.float32)
    first, second = port._put((aligned, aligned))
    assert len({first.unsafe_buffer_pointer(), second.unsafe_buffer_pointer(), aligned.ctypes.data}) == 3
    assert port._put(first).unsafe_buffer_pointer() != first.unsafe_buffer_pointer()


def test_pieces_are_chunks_that_join_to_the_whole_and_have_few_shapes(config):
    shapes = set()
    for length in (1, 7, 256, 511, 1000):
        text = np.arange(2 * length).reshape(2, length)
        pieces = list(generation.pieces(text, config))
        np.testing.assert_array_equal(np.concatenate([chunk[:, :count] for chunk, count in pieces], axis=1), text)
        shapes |= {chunk.shape for chunk, _ in pieces}
    assert shapes == {(2, 1), (2, 8), (2, 256)}


WIDE = BDHConfig(n_layer=1, n_embd=64, n_head=4, mlp_internal_dim_multiplier=1024)  # 2^16 neurons per token


@pytest.mark.parametrize("length", [17, 100, 129, 300, 513, 1000, 1025, 1100, 2049, 5000])
def test_what_takes_longer_to_run_than_to_compile_is_padded_by_an_eighth_at_most(length):
    padded = forms.length((1, length), WIDE)
    assert length <= padded <= 9 * length / 8
    lengths = {forms.length((1, n), WIDE) for n in range(length, 2 * length)}
    assert len(lengths) <= 2 * forms.FINE


def test_a_long_text_is_padded_by_less_than_one_token_for_each_chunk():
    for length in (1025, 1500, 2049, 32768, 32769):
        chunks = -(-length // forms.chunk(length))
        assert forms.chunk(length) <= forms.CHUNK
        assert 0 <= chunks * forms.chunk(length) - length < chunks


def test_a_step_on_another_batch_of_a_shape_its_gradient_and_accumulation_share_programs(config, compilations):
    config = dataclasses.replace(config, n_layer=1, dropout=0.0, vocab_size=13)  # sizes that no other test has compiled for
    port = JAXBackend().load(init(config, np.random.default_rng(0)), config)
    text = np.zeros((2, 8), int)
    port.gradients(text, text)
    optimizer = port.optimizer(AdamW())
    compilations.clear()
    port.train_step(optimizer, text, text)
    assert len(compilations) == 1  # the update
    port.train_on(optimizer, [(text, text), (text, text)])
    assert len(compilations) == 2  # the sum of two batches
    port.loss(text, text)
    port.forward(text)
    assert len(compilations) == 3


def test_loading_states_and_optimizers_compile_nothing(params, config, compilations):
    port = JAXBackend().load(params, dataclasses.replace(config, n_layer=2))
    optimizer = port.optimizer(AdamW())
    port.import_optimizer(port.export_optimizer(optimizer))
    port.import_state(port.export_state(port.init_state(3)))
    port.params()
    assert not compilations


def test_r13_a_step_updates_a_donated_state_in_place(config):
    config = dataclasses.replace(config, n_embd=64, n_head=1, mlp_internal_dim_multiplier=64)
    weights = model.Params(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes(config)))
    state = jax.eval_shape(lambda: model.init_state(1, config))
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    memory = generation.advance_donated.lower(state, token, weights, config).compile().memory_analysis()
    whole = np.prod(state.layers.shape) * 4
    assert memory.alias_size_in_bytes >= whole
    assert memory.temp_size_in_bytes < whole
