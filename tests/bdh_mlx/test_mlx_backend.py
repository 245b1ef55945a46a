"""The MLX port behind the protocol: what is its own there. That it agrees with the specification is tested for all ports."""

import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

import bdh_spec
from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_conformance.yardstick.tolerances import FLOAT64, error
from bdh_mlx.backend import MLXBackend, MLXModel, _numpy
from bdh_mlx.optimizer import clip_scale, moments, update
from bdh_spec import AdamW, BDHConfig, CapabilityError, Model, Params, optimizer

CASE = Case(CONFIGS["plain"], time=6, seed=3, scale=20)


def load(case: Case = CASE, dtype: str = "float32") -> Model:
    return MLXBackend().load(case.params, case.config, device="cpu", dtype=dtype)


def test_the_registry_finds_the_port() -> None:
    report = next(report for report in bdh_spec.backends() if report.name == "mlx")
    assert report.available
    assert report.version.startswith("mlx ")
    assert set(report.dtypes) == {"float32", "bfloat16", "float16", "float64"}
    assert report.devices == (("gpu", "cpu") if mx.is_available(mx.gpu) else ("cpu",))


def test_whole_float32_products_are_asked_for_by_the_adapter_and_not_by_an_import() -> None:
    program = "import os, bdh_mlx{}; print(os.environ.get('MLX_ENABLE_TF32'))"
    clean = {name: value for name, value in os.environ.items() if name != "MLX_ENABLE_TF32"}

    def says(more: str, **extra: str) -> str:
        run = [sys.executable, "-c", program.format(more)]
        return subprocess.run(run, env=clean | extra, capture_output=True, text=True, check=True).stdout.strip()

    assert says("") == says(".backend") == "None"
    assert says(".backend; bdh_mlx.backend.MLXBackend()") == "0"
    assert says(".backend; bdh_mlx.backend.MLXBackend()", MLX_ENABLE_TF32="1") == "1"


def test_float64_runs_on_the_cpu_alone() -> None:
    assert MLXBackend().load(CASE.params, CASE.config, dtype="float64").device == "cpu"
    with pytest.raises(CapabilityError, match="no float64 on 'gpu'"):
        MLXBackend()._load(CASE.params, CASE.config, device="gpu", dtype="float64", phase="exact")


def test_a_donated_state_is_let_go_and_an_undonated_one_is_not() -> None:
    model = load()
    state = model.init_state(2)
    _, later = model.advance(state, CASE.tokens)
    assert state.native[0] is not later.native[0]
    before = model.export_state(state)
    _, last = model.advance(later, CASE.tokens, donate=True)
    assert later.native is last.native  # the old arrays are out of reach, so MLX may write over them
    assert all(np.array_equal(a, b) for a, b in zip(before.layers, model.export_state(state).layers, strict=True))


def test_donated_decoding_holds_one_state_and_not_two() -> None:
    config = BDHConfig(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=64, vocab_size=8)
    model = MLXBackend().load(bdh_spec.init(config, np.random.default_rng(0)), config, device="cpu")
    state, token = model.init_state(1), np.zeros((1, 1), int)
    _, state = model.advance(state, token, donate=True)
    active = mx.get_active_memory()
    size = sum(memory.nbytes for memory in state.native[0].layers)
    kept = [state]
    _, state = model.advance(state, token)
    assert mx.get_active_memory() >= active + size
    kept.clear()
    for _ in range(30):
        _, state = model.advance(state, token, donate=True)
    assert mx.get_active_memory() <= active + size // 10


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_r13_a_state_is_never_narrower_than_float32(dtype: str) -> None:
    model = load(dtype=dtype)
    _, state = model.advance(model.init_state(2), CASE.tokens)
    _, state = model.advance(state, CASE.tokens[:, :1])
    assert {memory.dtype for memory in state.native[0].layers} == {mx.float32}
    exported = model.export_state(state)
    assert all(memory.dtype == np.float32 for memory in exported.layers)
    again = model.export_state(model.import_state(exported))
    assert all(np.array_equal(a, b) for a, b in zip(exported.layers, again.layers, strict=True))


def test_arrays_of_any_layout_are_read_and_none_is_shared() -> None:
    params = Params(*(np.asfortranarray(weight[::-1]) for weight in CASE.params))
    straight = Params(*(np.ascontiguousarray(weight) for weight in params))
    model, other = (MLXBackend().load(p, CASE.config, dtype="float64") for p in (params, straight))
    tokens = CASE.tokens[:, ::-1]
    assert np.array_equal(model.forward(tokens), other.forward(tokens.copy()))
    before = model.forward(tokens)
    for weight in params:
        weight[:] = 0
    assert np.array_equal(model.forward(tokens), before)
    assert _numpy(mx.zeros((2, 3)).T).flags.c_contiguous


@pytest.mark.parametrize("clip", [None, 0.01, 100.0])
def test_the_optimizer_takes_the_specification_s_steps_in_float64(clip: float | None) -> None:
    settings = AdamW(learning_rate=1e-2, clip=clip)
    rng = np.random.default_rng(0)
    expected = Params(*(weight.copy() for weight in CASE.params))
    memory = optimizer.begin(expected, settings)
    with mx.stream(mx.cpu):
        weights = Params(*(mx.array(weight, dtype=mx.float64) for weight in expected))
        ported = moments(weights, settings)
        for _ in range(5):
            slopes = Params(*(rng.normal(size=weight.shape) for weight in expected))
            given = Params(*(mx.array(slope, dtype=mx.float64) for slope in slopes))
            assert abs(float(np.array(clip_scale(given, clip))) / optimizer.clip_scale(slopes, clip) - 1) < 1e-12
            optimizer.update(expected, slopes, memory, 1e-2)
            weights = update(weights, given, ported, 1e-2)
        assert all(error(np.array(a), b) <= FLOAT64 for a, b in zip(weights, expected, strict=True))


def test_r8_one_optimizer_seed_drops_the_same_neurons_and_another_drops_others() -> None:
    losses = []
    for seed in (1, 1, 2):
        model = load()
        trained = model.optimizer(AdamW(seed=seed))
        losses.append([model.train_step(trained, CASE.tokens, CASE.targets) for _ in range(3)])
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[2][0]


def test_steps_too_small_for_bfloat16_add_up() -> None:
    model = load(dtype="bfloat16")
    assert isinstance(model, MLXModel)
    trained = model.optimizer(AdamW(learning_rate=1e-5, weight_decay=0.0))
    before = model.params().decoder
    model.train_step(trained, CASE.tokens, CASE.targets)
    once = model.params().decoder
    for _ in range(60):
        model.train_step(trained, CASE.tokens, CASE.targets)
    assert model._params.decoder.dtype == mx.bfloat16
    assert (once != before).mean() < 0.1 < (model.params().decoder != before).mean()
