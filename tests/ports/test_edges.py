"""Where numbers end: not finite, denormal, very small and very large weights, no activation at all, and the smallest sizes."""

import warnings
from collections.abc import Callable
from importlib import util
from pathlib import Path

import numpy as np
import pytest

import bdh_spec
from bdh_conformance import assert_agrees, expect
from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_spec import BDHConfig, Model, Params, SamplingError, model
from bdh_spec.gradients import gradients

spec = util.spec_from_file_location("face", Path(__file__).parents[1] / "bdh_transformers" / "port.py")
face = util.module_from_spec(spec)
spec.loader.exec_module(face)

PORTS = ("numpy", "torch", "jax", "mlx", "transformers")
CASE = Case(CONFIGS["plain"], time=6, seed=3, scale=20)
TINY = np.finfo(np.float32).tiny


@pytest.fixture(params=PORTS)
def load(request: pytest.FixtureRequest) -> Callable[..., Model]:
    """Load weights on one port after another, the face for transformers among them."""
    port = face.RecurrentBackend() if request.param == "transformers" else bdh_spec.get_backend(request.param)

    def on_this_port(params: Params, config: BDHConfig, dtype: str = "float32") -> Model:
        if dtype not in port.capabilities.dtypes:
            pytest.skip(f"not claimed: {request.param} has no {dtype}")
        return port.load(params, config, device="cpu", dtype=dtype, phase="exact")

    return on_this_port


def scaled(params: Params, factors: dict[str, float]) -> Params:
    """Weights, some of them far from 1."""
    return Params(*(w * np.float32(factors.get(name, factors.get("all", 1))) for name, w in params._asdict().items()))


def spoiled(params: Params, name: str, value: float, row: int = 0) -> Params:
    """Weights with one that is not finite."""
    weights = {key: weight.copy() for key, weight in params._asdict().items()}
    weights[name].reshape(len(weights[name]), -1)[row, 1] = value
    return Params(**weights)


def in_pieces(model: Model, tokens: np.ndarray) -> np.ndarray:
    """The logits of a text that is read token by token."""
    state, logits = model.init_state(len(tokens)), []
    for t in range(tokens.shape[1]):
        step, state = model.advance(state, tokens[:, t : t + 1])
        logits.append(step)
    return np.concatenate(logits, axis=1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["encoder", "encoder_v", "decoder", "lm_head"])
def test_a_weight_that_is_not_finite_shows_where_the_specification_shows_it(
    load: Callable[..., Model], name: str, value: float
) -> None:
    params = spoiled(CASE.params, name, value)
    with np.errstate(all="ignore"):
        exact = np.isfinite(model.forward(CASE.tokens, params, CASE.config))
        loaded = load(params, CASE.config)
        assert np.array_equal(np.isfinite(loaded.forward(CASE.tokens)), exact)
        assert np.array_equal(np.isfinite(in_pieces(loaded, CASE.tokens)), exact)
        assert not exact.all()
        with pytest.raises(SamplingError, match="nothing can be drawn"):
            loaded.generate(CASE.tokens, 1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("row", [0, CASE.config.vocab_size - 1])
def test_an_embedding_that_no_text_has_changes_nothing(load: Callable[..., Model], value: float, row: int) -> None:
    tokens = np.where(CASE.tokens == row, 1, CASE.tokens)
    sound, loaded = load(CASE.params, CASE.config), load(spoiled(CASE.params, "embed", value, row), CASE.config)
    assert np.array_equal(loaded.forward(tokens), sound.forward(tokens))
    assert np.array_equal(in_pieces(loaded, tokens), in_pieces(sound, tokens))


SCALES = [
    {"all": 1e-20},
    {"embed": 1e-20},
    {"encoder": 1e-20},
    {"decoder": 1e-20},
    {"lm_head": 1e-20},
    {"all": 1e4},
    {"embed": 1e15},
]


@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_weights_of_any_size_agree(load: Callable[..., Model], scale: dict[str, float], dtype: str) -> None:
    params = scaled(CASE.params, scale)
    expected = expect(lambda p: {"logits": model.forward(CASE.tokens, p, CASE.config)}, params, dtype)
    assert expected["logits"].allowed < 0.2  # so that zeros do not pass
    loaded = load(params, CASE.config, dtype)
    assert_agrees("port", {"logits": loaded.forward(CASE.tokens)}, expected, f"{dtype} {scale}")
    assert_agrees("port", {"logits": in_pieces(loaded, CASE.tokens)}, expected, f"{dtype} {scale}, decoded")


@pytest.mark.parametrize("scale", [{"all": 1e-40}, {"embed": 1e-40}, {"lm_head": 1e-40}], ids=str)
def test_denormal_weights_are_read_or_taken_for_zero(load: Callable[..., Model], scale: dict[str, float]) -> None:
    params = scaled(CASE.params, scale)
    exact = model.forward(CASE.tokens, Params(*(w.astype(np.float64) for w in params)), CASE.config)
    zeros = model.forward(CASE.tokens, Params(*(np.where(abs(w) < TINY, 0.0, w) for w in params)), CASE.config)
    loaded = load(params, CASE.config)
    for logits in (loaded.forward(CASE.tokens), in_pieces(loaded, CASE.tokens)):
        assert np.isfinite(logits).all()
        nearest = np.minimum(abs(logits - exact), abs(logits - zeros))
        assert (nearest <= 1e-4 * abs(exact) + 64 * TINY).all()


@pytest.mark.parametrize("name", ["all", "embed", "encoder", "encoder_v", "decoder"])
def test_no_activation_at_all_agrees(load: Callable[..., Model], name: str) -> None:
    params = scaled(CASE.params, {name: 0})
    expected = expect(lambda p: {"logits": model.forward(CASE.tokens, p, CASE.config)}, params, "float32")
    loaded = load(params, CASE.config)
    assert_agrees("port", {"logits": loaded.forward(CASE.tokens)}, expected)
    assert_agrees("port", {"logits": in_pieces(loaded, CASE.tokens)}, expected)


WIDE = BDHConfig(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=512, vocab_size=11)


@pytest.mark.parametrize("scale", [{"encoder": 1, "decoder": 0.01}, {"encoder": 10, "decoder": 0.01}, {"all": 1e4}], ids=str)
def test_scores_beyond_float16_are_right_or_named(load: Callable[..., Model], scale: dict[str, float]) -> None:
    case = Case(WIDE, time=6, seed=3, scale=20)
    params = scaled(case.params, scale)
    loaded = load(params, WIDE, "float16")
    for read in (loaded.forward, lambda tokens: in_pieces(loaded, tokens)):
        with warnings.catch_warnings(record=True) as said, np.errstate(all="ignore"):
            warnings.simplefilter("always")
            logits = read(case.tokens)
        if np.isfinite(logits).all():
            expected = expect(lambda p: {"logits": model.forward(case.tokens, p, WIDE)}, params, "float16")
            assert_agrees("port", {"logits": logits}, expected)
        else:
            assert any("float16 holds numbers up to 65,504" in str(each.message) for each in said)


SMALLEST = [
    BDHConfig(n_layer=1, n_embd=2, n_head=1, mlp_internal_dim_multiplier=1, vocab_size=1),
    BDHConfig(n_layer=3, n_embd=4, n_head=2, mlp_internal_dim_multiplier=1, vocab_size=1),
    BDHConfig(n_layer=2, n_embd=2, n_head=1, mlp_internal_dim_multiplier=1, vocab_size=5),
]


@pytest.mark.parametrize("config", SMALLEST, ids=lambda c: f"V{c.vocab_size} D{c.n_embd} N{c.n_neurons}")
@pytest.mark.parametrize(("batch", "time"), [(1, 1), (1, 5), (130, 1), (130, 3)])
def test_the_smallest_sizes_and_many_texts_agree(load: Callable[..., Model], config: BDHConfig, batch: int, time: int) -> None:
    case = Case(config, batch=batch, time=time, seed=5, scale=20)
    expected = expect(lambda p: {"logits": model.forward(case.tokens, p, config)}, case.params, "float32")
    loaded = load(case.params, config)
    assert_agrees("port", {"logits": loaded.forward(case.tokens)}, expected)
    assert_agrees("port", {"logits": in_pieces(loaded, case.tokens)}, expected)
    loss, slopes = loaded.gradients(case.tokens, case.tokens)
    exact, _ = gradients(case.tokens, case.tokens, Params(*(w.astype(np.float64) for w in case.params)), config)
    assert loss == pytest.approx(exact, rel=1e-5, abs=1e-6)
    assert all(np.isfinite(slope).all() for slope in slopes)
    assert loaded.generate(case.tokens, 2, seed=1).shape == (batch, time + 2)


def test_one_feature_leaves_nothing_after_a_norm(load: Callable[..., Model]) -> None:
    case = Case(BDHConfig(n_layer=2, n_embd=1, n_head=1, mlp_internal_dim_multiplier=2, vocab_size=3), batch=3, time=4, seed=5)
    loaded = load(case.params, case.config)
    assert not loaded.forward(case.tokens).any()
    assert not in_pieces(loaded, case.tokens).any()
