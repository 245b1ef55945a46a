"""The MLX module as its users meet it: the calls they know, laziness, compilation, and the specification in float64."""

import gc
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

import bdh_spec
from bdh_conformance.yardstick.cases import CONFIGS, FREQS, Case
from bdh_conformance.yardstick.tolerances import FLOAT64, error
from bdh_mlx import BDH, BDHConfig
from bdh_mlx.model import CHUNK, Stages, advance, dropout, read_on, reader, trace
from bdh_mlx.rope import rotation, table_of
from bdh_spec import Params, TokensError, model, rope
from bdh_spec.errors import CapabilityError, SamplingError
from bdh_spec.gradients import gradients

TINY = BDHConfig(n_layer=2, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=256, dropout=0.5)
POSITIONS = (0, 10**4, 10**6, 2**24 + 1, 2**40)
NAMES = ["embed.weight", "encoder", "encoder_v", "decoder", "lm_head"]
compiles = pytest.mark.skipif(
    mx.default_device() == mx.cpu and shutil.which("g++") is None, reason="MLX compiles for a CPU with g++, and there is none"
)


def tiny(config: BDHConfig = TINY, seed: int = 0) -> BDH:
    mx.random.seed(seed)
    return BDH(config).eval()


def holding(case: Case, phase: rope.Phase = "exact") -> BDH:
    """A module that holds a case's weights in float64."""
    module = BDH(case.config, phase=phase).eval()
    weights = zip(NAMES, (mx.array(w, dtype=mx.float64) for w in case.params), strict=True)
    return module.load_weights(list(weights))


def text(*rows: bytes) -> mx.array:
    return mx.array([list(row) for row in rows])


@pytest.fixture
def on_cpu() -> Any:
    """Run in a CPU stream: float64 is nowhere else."""
    with mx.stream(mx.cpu):
        yield


def test_the_prompt_of_the_readme_is_continued() -> None:
    prompt = "The meaning of life"
    output = tiny().generate(mx.array([list(bytearray(prompt, "utf-8"))]), max_new_tokens=20, temperature=0.8, top_k=50)
    assert output.shape == (1, len(prompt) + 20)
    assert bytes(output[0].tolist()).startswith(prompt.encode())


def test_the_training_loop_of_the_readme_learns() -> None:
    module, optimizer = tiny().train(), optim.AdamW(learning_rate=1e-2, weight_decay=0.1)

    def loss_fn(model: BDH, x: mx.array, y: mx.array) -> mx.array:
        _, loss = model(x, y)
        return loss

    loss_and_grad_fn, losses = nn.value_and_grad(module, loss_fn), []
    data = mx.array(list(b"abcabcabc"), dtype=mx.uint8)[None]
    for _ in range(15):
        loss, grads = loss_and_grad_fn(module, data[:, :-1], data[:, 1:])
        grads, _ = optim.clip_grad_norm(grads, max_norm=1.0)
        optimizer.update(module, grads)
        mx.eval(module.parameters())
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_r15_the_five_weights_are_all_there_is_to_train() -> None:
    module, x = tiny().train(), text(b"abcd")
    before = {name: np.array(w) for name, w in tree_flatten(module.parameters())}
    assert sorted(before) == sorted(NAMES)
    assert dict(tree_flatten(module.trainable_parameters())).keys() == before.keys()
    table = np.array(table_of(TINY).turns)
    optim.AdamW(1e-2).update(module, nn.value_and_grad(module, lambda m: m(x, x)[1])(module)[1])
    after = dict(tree_flatten(module.parameters()))
    assert all(not np.array_equal(before[name], np.array(after[name])) for name in NAMES)
    assert np.array_equal(table, np.array(table_of(TINY).turns))
    assert not [key for key, value in module.items() if isinstance(value, mx.array) and value.size == table.size]


@pytest.mark.parametrize("change", [lambda m: m.set_dtype(mx.bfloat16), lambda m: m.apply(lambda w: w.astype(mx.float16))])
def test_r4_narrow_weights_leave_phases_exact(change: Callable[[BDH], Any]) -> None:
    module = tiny()
    wide = trace(text(b"abcdef"), module.params(), TINY)
    change(module)
    narrow = trace(text(b"abcdef"), module.params(), TINY)
    assert narrow["logits"].dtype == module.encoder.dtype != mx.float32
    x, turned = (np.array(narrow[f"layers.0.{name}"].astype(mx.float32)) for name in ("x_sparse", "rotated"))
    cos, sin = rope.rotation(0, 6, rope.frequencies(TINY.n_neurons), np.float32, "exact")
    assert error(turned, rope.rope(x, cos, sin)) < 2.0**-8  # one rounding of the result, none of the phases
    assert error(np.array(narrow["logits"].astype(mx.float32)), np.array(wide["logits"])) < 0.1


@pytest.mark.parametrize("freqs", FREQS)
@pytest.mark.parametrize("phase", ["exact", "float32"])
@pytest.mark.parametrize("start", [*POSITIONS, 2**63 - 9])
def test_r4_tables_are_the_specification_s(freqs: str, phase: rope.Phase, start: int, on_cpu: None) -> None:
    config = Case(replace(TINY, n_embd=16), freqs=freqs).config
    table = table_of(config)
    expected = rope.rotation(start, 8, model.frequencies_of(config), np.float64, phase)
    for actual, reference in zip(rotation(start, 8, table, mx.float64, phase), expected, strict=True):
        assert np.abs(np.array(actual) - reference).max() < 1e-14
    for actual, reference in zip(rotation(start, 8, table, mx.float32, phase), expected, strict=True):
        assert np.abs(np.array(actual) - reference).max() < 1e-6


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("name", CONFIGS)
def test_float64_agrees_with_the_specification_in_logits_stages_and_slopes(name: str) -> None:
    case = Case(CONFIGS[name], time=7, seed=1, scale=20)
    module, tokens = holding(case), mx.array(case.tokens)
    expected = model.trace(case.tokens, case.params, case.config)
    stages = trace(tokens, module.params(), case.config)
    assert list(stages) == list(expected)
    assert all(error(np.array(stages[stage]), expected[stage]) <= FLOAT64 for stage in expected)
    assert error(np.array(module(tokens)[0]), expected["logits"]) <= FLOAT64

    loss, slopes = nn.value_and_grad(module, lambda m: m(tokens, mx.array(case.targets))[1])(module)
    expected_loss, expected_slopes = gradients(case.tokens, case.targets, case.params, case.config)
    found = dict(tree_flatten(slopes))
    assert abs(float(np.array(loss)) - expected_loss) <= FLOAT64
    assert all(error(np.array(found[n]), s) <= FLOAT64 for n, s in zip(NAMES, expected_slopes, strict=True))


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("phase", ["exact", "float32"])
@pytest.mark.parametrize("split", [(1,) * 7, (2, 1, 4), (5, 1, 1)], ids=str)
def test_r13_float64_decodes_like_the_specification_from_any_position(phase: rope.Phase, split: tuple[int, ...]) -> None:
    case = Case(CONFIGS["three_heads"], time=7, seed=2, scale=20)
    module = holding(case, phase)
    for position in POSITIONS:
        expected = model.init_state(case.batch, case.config, np.float64)
        expected = bdh_spec.RecurrentState(position, expected.layers)
        state = module.init_state(case.batch)._replace(position=mx.array(position, dtype=mx.uint64))
        for chunk in np.split(case.tokens, np.cumsum(split)[:-1], axis=1):
            reference, expected = model.advance(expected, chunk, case.params, case.config, phase=phase)
            logits, state = module.advance(state, mx.array(chunk))
            assert error(np.array(logits), reference) <= FLOAT64
        assert state.position.item() == position + 7
        assert all(error(np.array(a), b) <= FLOAT64 for a, b in zip(state.layers, expected.layers, strict=True))


def test_stages_have_the_specification_s_names_in_its_order() -> None:
    assert Stages._fields == model.Stages._fields


def test_r8_dropout_acts_in_training_and_in_nothing_else() -> None:
    module, x = tiny(), text(b"abcdef")
    still = module(x)[0]
    assert mx.array_equal(module(x)[0], still)
    assert mx.array_equal(module.train()(x)[0], still).item() is False
    assert module.training
    assert mx.allclose(module.advance(module.init_state(1), x)[0], still, atol=1e-5)
    greedy = module.generate(x, 5, temperature=0)
    assert mx.array_equal(greedy, module.eval().generate(x, 5, temperature=0))


def test_r8_dropout_keeps_its_share_and_the_mean() -> None:
    masks = dropout(TINY, (4, 50), mx.float32, mx.random.key(0))
    values = np.array(mx.stack(masks))
    assert values.shape == (2, 4, 2, 50, 16)
    assert set(np.unique(values)) == {0.0, 2.0}
    assert abs(values.mean() - 1) < 0.02
    assert not np.array_equal(values[0], values[1])


def test_r12_a_byte_target_is_never_taken_for_ignored() -> None:
    module, x = tiny(), text(b"abcd")
    targets = [[1, 156, 2, 3]]  # -100 as a byte
    assert module(x, mx.array(targets, dtype=mx.uint8))[1].item() == module(x, mx.array(targets))[1].item()
    targets = [[1, -100, 2, 3]]
    expected = model.loss(np.array(module(x)[0], np.float64), np.array(targets))
    assert abs(module(x, mx.array(targets))[1].item() - expected) < 1e-5


@pytest.mark.parametrize(("temperature", "top_k", "seed"), [(0.8, 50, 7), (1.0, None, 2**64 - 1), (0.0, None, 0)])
def test_r14_generate_writes_the_text_of_the_numpy_port(temperature: float, top_k: int | None, seed: int) -> None:
    module = tiny()
    weights = Params(*(np.array(w) * 10 for w in module.params()))
    module.update({"embed": {"weight": mx.array(weights.embed)}} | {n: mx.array(weights._asdict()[n]) for n in NAMES[1:]})
    prompt = np.array([list(b"The dragon "), list(b"An egg or 2")])
    ported = bdh_spec.get_backend("numpy").load(weights, TINY)
    expected = ported.generate(prompt, 12, temperature, top_k, seed)
    assert np.array_equal(np.array(module.generate(mx.array(prompt), 12, temperature, top_k, seed=seed)), expected)


def test_r14_without_a_seed_the_draws_are_mlx_s() -> None:
    module, drawn = tiny(), []
    for seed in (1, 1, 2):
        mx.random.seed(seed)
        drawn.append(module.generate(text(b"a"), 20).tolist())
    assert drawn[0] == drawn[1] != drawn[2]
    assert module.generate(text(b"a"), 20).tolist() != drawn[2]  # a new one each time


def test_a_long_prompt_is_read_in_chunks() -> None:
    module = tiny()
    prompt = mx.array(np.random.default_rng(0).integers(0, 256, (1, CHUNK + 3)))
    held = [module.init_state(1)]
    logits = read_on(held, prompt, module.params(), TINY, phase="exact")
    assert held[0].position.item() == CHUNK + 3
    assert error(np.array(logits), np.array(module(prompt)[0])) < 1e-4
    assert module.generate(prompt, 0).tolist() == prompt.tolist()


def test_a_state_is_read_without_being_changed() -> None:
    module = tiny()
    _, state = module.advance(module.init_state(1), text(b"abc"))
    before = [np.array(memory) for memory in state.layers]
    read_on([state], text(b"de"), module.params(), TINY, phase="exact")
    assert all(np.array_equal(a, np.array(b)) for a, b in zip(before, state.layers, strict=True))


def test_decoding_takes_no_more_memory_at_token_80_than_at_token_10() -> None:
    module = tiny()
    held, active = [module.init_state(1)], []
    gc.collect()  # what other tests left behind may go at any time
    for _ in range(80):
        read_on(held, text(b"a"), module.params(), TINY, phase="exact")
        active.append(mx.get_active_memory())
    a_row = 4 * TINY.n_layer * TINY.n_embd  # bytes that a cache of rows would grow by at a token, at the least
    assert max(active[70:]) < min(active[:20]) + 50 * a_row


@compiles
def test_nothing_is_evaluated_on_the_way_to_logits_loss_slopes_and_states() -> None:
    """Tracing raises at any look at a value."""
    module, x = tiny(), text(b"abc")

    def everything(x: mx.array) -> Any:
        slopes = mx.grad(lambda w: module.update({"encoder": w})(x, x)[1])(module.encoder)
        return module(x), slopes, module.advance(module.init_state(1), x)[1]

    encoder = module.encoder
    compiled = mx.compile(everything)
    with pytest.raises(ValueError, match="eval"):
        mx.compile(lambda x: x + x.item())(mx.array(1))
    (logits, _), slopes, state = compiled(x)
    assert (logits.shape, slopes.shape, state.layers[0].shape) == ((1, 3, 256), encoder.shape, (1, 2, 16, 8))


@compiles
@pytest.mark.thorough  # the compiler takes twenty seconds
def test_a_compiled_training_step_takes_the_steps_of_a_plain_one() -> None:
    x, losses = text(b"abcabc"), []
    for wrap in (mx.compile, lambda step, **_: step):
        module = tiny(BDHConfig(n_layer=1, n_embd=8, n_head=1, mlp_internal_dim_multiplier=2, dropout=0.0)).train()
        optimizer = optim.AdamW(learning_rate=1e-2)
        optimizer.init(module.trainable_parameters())
        loss_and_grad = nn.value_and_grad(module, lambda m, x: m(x, x)[1])
        state = [module.state, optimizer.state]

        def step(x: mx.array, module: BDH = module, optimizer: Any = optimizer, loss_and_grad: Any = loss_and_grad) -> mx.array:
            loss, grads = loss_and_grad(module, x)
            optimizer.update(module, grads)
            return loss

        compiled = wrap(step, inputs=state, outputs=state)
        losses.append([compiled(x).item() for _ in range(3)])
    assert np.allclose(*losses, rtol=1e-5)
    assert losses[0][2] < losses[0][0]


@compiles
@pytest.mark.parametrize("phase", ["exact", pytest.param("float32", marks=pytest.mark.thorough)])
def test_a_compiled_decoding_step_is_traced_once_and_agrees_at_any_position(phase: rope.Phase) -> None:
    module, traced = tiny(), []

    def step(state: Any, tokens: mx.array, params: Params) -> Any:
        traced.append(tokens.shape)
        return advance(state, tokens, params, TINY, phase=phase)

    compiled, plain = mx.compile(step), partial(advance, config=TINY, phase=phase)
    for position in POSITIONS:
        state = module.init_state(1)._replace(position=mx.array(position, dtype=mx.uint64))
        other = state
        for byte in (b"a", b"b", b"c"):
            logits, state = compiled(state, text(byte), module.params())
            expected, other = plain(other, text(byte), module.params())
            assert error(np.array(logits), np.array(expected)) < 1e-5
    assert traced == [(1, 1)]


@compiles
def test_the_gpu_s_reader_is_compiled_and_reads_the_same() -> None:
    module = tiny()
    results = [
        reader(TINY, "exact", device)(module.init_state(1), text(b"a"), module.params())[0] for device in (mx.cpu, mx.gpu)
    ]
    assert mx.allclose(*results, atol=1e-6)
    assert reader(TINY, "exact", mx.gpu) is reader(TINY, "exact", mx.gpu)


@pytest.mark.parametrize(
    ("idx", "fact"),
    [
        (mx.zeros((1, 0), mx.int32), "at least one token"),
        (mx.zeros((3,), mx.int32), "two axes"),
        (mx.zeros((1, 3)), "whole numbers"),
    ],
)
def test_tokens_of_no_use_are_refused_before_any_work(idx: mx.array, fact: str) -> None:
    module = tiny()
    for call in (module, lambda i: module.advance(module.init_state(1), i), lambda i: module.generate(i, 1)):
        with pytest.raises(TokensError, match=fact):
            call(idx)


def test_other_misuse_is_refused_before_any_work() -> None:
    module, x = tiny(), text(b"ab")
    with pytest.raises(TokensError, match="one target per token"):
        module(x, text(b"abc"))
    with pytest.raises(TokensError, match="300 at \\[0, 1\\]"):
        module.generate(mx.array([[1, 300]]), 1)
    with pytest.raises(SamplingError, match="temperature"):
        module.generate(x, 1, temperature=-1.0)
    with pytest.raises(SamplingError, match="seed"):
        module.generate(x, 1, seed=-1)


def test_quantizing_a_model_is_refused_and_changes_nothing() -> None:
    module = BDH(BDHConfig(n_layer=1, n_embd=64, n_head=2, mlp_internal_dim_multiplier=4))
    before, x = mx.array(module.embed.weight), text(b"abcd")
    logits = module.eval()(x)[0]
    with pytest.raises(CapabilityError, match=r"nn\.quantize would pack the embedding of a BDH"):
        nn.quantize(module)
    assert mx.array_equal(module.embed.weight, before).item()
    assert mx.array_equal(module(x)[0], logits).item()
