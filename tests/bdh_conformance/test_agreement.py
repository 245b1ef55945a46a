"""The comparison finds what it should and says where."""

import numpy as np
import pytest

import bdh_spec
from bdh_conformance import Expectation, assert_agrees, expect
from bdh_conformance.adversaries.legal import LEGAL
from bdh_conformance.channels import CHANNELS
from bdh_conformance.channels.loading import load
from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_conformance.yardstick.noise import Noisy
from bdh_conformance.yardstick.tolerances import FACTOR, PRECISION, draws, error, noisy
from bdh_spec import Params, get_backend, model
from bdh_spec.dtypes import numpy_dtype
from bdh_spec.params import cast

KINKED = PRECISION["float32"]._replace(unit=PRECISION["float32"].unit * FACTOR["float32"])
CASE = Case(CONFIGS["three_heads"], time=8, seed=1)
REFERENCE = np.arange(24.0).reshape(2, 3, 4) + 1
EXPECTED = {"a": Expectation(REFERENCE, 1e-6, 1e-6), "b": Expectation(REFERENCE, 1e-6, 1e-6)}


def spoiled(value: float) -> np.ndarray:
    array = REFERENCE.copy()
    array[1, 2, 3] = value
    return array


@pytest.mark.parametrize(
    ("array", "complaint"),
    [
        (None, "it is missing"),
        (REFERENCE.astype(np.float16), "dtype float16"),
        (REFERENCE[:1], r"shape \(1, 3, 4\), wanted \(2, 3, 4\)"),
        (spoiled(np.nan), r"1 of 24 values are not finite; first at \[1, 2, 3\]"),
        (spoiled(np.inf), "1 of 24 values are not finite"),
        (spoiled(25), r"worst row off by .*allowed 1.0e-06; worst value at \[1, 2, 3\]: 25 against 24"),
        (np.zeros_like(REFERENCE), "worst row off by 1.0e"),
    ],
    ids=["missing", "dtype", "shape", "nan", "inf", "value", "zeros"],
)
def test_a_difference_is_named_with_its_place(array: np.ndarray | None, complaint: str) -> None:
    with pytest.raises(
        AssertionError, match=rf"(?s)port differs from the specification at b \(agrees through a\).*{complaint}"
    ):
        assert_agrees("port", {"a": REFERENCE, "b": array}, EXPECTED)


def test_equal_arrays_agree() -> None:
    assert_agrees("port", {"a": REFERENCE, "b": REFERENCE.astype(np.float32)}, EXPECTED)


def test_a_wrong_scale_is_seen_below_the_rows_rounding() -> None:
    expected = {"a": Expectation(REFERENCE, 1e-5, 1e-6)}
    with pytest.raises(AssertionError, match=r"all of it is scaled by 1 \+5.0e-06, allowed 1.0e-06"):
        assert_agrees("port", {"a": REFERENCE * (1 + 5e-6)}, expected)


def test_one_wrong_row_among_many_is_seen() -> None:
    reference = np.ones((1, 1000, 8))
    actual = reference.copy()
    actual[0, 777, 3] += 1e-3
    assert error(actual, reference) == pytest.approx(1e-3 / np.sqrt(8))


def test_where_the_reference_is_zero_only_zero_agrees() -> None:
    zeros = np.zeros((1, 2, 3))
    assert error(zeros, zeros) == 0
    assert error(zeros + 1e-30, zeros) == np.inf


def test_tiny_rows_do_not_underflow() -> None:
    tiny = np.full((1, 2, 3), 1e-200)
    assert error(tiny * 1.01, tiny) == pytest.approx(0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_noise_is_of_the_size_of_one_rounding(dtype: str, scale: float) -> None:
    wide = np.random.default_rng(0).normal(size=100_000) * scale
    rounded = wide.astype(numpy_dtype(dtype)).astype(np.float64)
    imitated = np.asarray(Noisy.wrap(wide, PRECISION[dtype], np.random.default_rng(1)) + 0)
    sizes = [np.sqrt(np.mean((r - wide) ** 2)) for r in (rounded, imitated)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)
    if scale == 1:
        assert np.abs(imitated / wide - 1).max() <= PRECISION[dtype].unit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_noise_reaches_every_stage_of_the_specification(dtype: str) -> None:
    expected = expect(lambda p: model.trace(CASE.tokens, p, CASE.config), CASE.params, dtype)
    unit = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    assert all(unit < e.allowed < 300 * unit for e in expected.values())


@pytest.mark.parametrize("eps", [1e-6, 1e-5 * 1.1])
def test_a_wrong_eps_is_outside_what_float32_allows(eps: float, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = expect(lambda p: model.trace(CASE.tokens, p, CASE.config), CASE.params, "float32")
    monkeypatch.setattr(model, "EPS", eps)
    wrong = model.trace(CASE.tokens, CASE.params, CASE.config)
    with pytest.raises(AssertionError, match=r"at embed \(agrees through nothing before it\)"):
        assert_agrees("port", wrong, expected)


def test_a_second_final_norm_is_seen_by_the_slope() -> None:
    """It moves logits by less than the worst row may be off by rounding, but all of them alike."""
    case = Case(CONFIGS["three_heads"], time=64, seed=1, scale=20)
    params = cast(cast(case.params, np.float32), np.float64)
    expected = expect(lambda p: {"logits": model.forward(case.tokens, p, case.config)}, params, "float32")
    last = model.trace(case.tokens, params, case.config)[f"layers.{case.config.n_layer - 1}.x"]
    with pytest.raises(AssertionError, match=r"at logits.*\n.*all of it is scaled by 1 -3"):
        assert_agrees("port", {"logits": model.readout(model.layer_norm(last), params)}, expected)


@pytest.mark.parametrize(("grown", "low", "high"), [(1.0, 1e-10, 1e-10), (1e7, 1e-9, 1e-7), (1e60, np.inf, np.inf)])
def test_float64_is_held_to_ten_digits_unless_float32_has_none(grown: float, low: float, high: float) -> None:
    params = Params(*[np.random.default_rng(0).normal(size=(4, 4))] * 5)

    def run(p: Params) -> dict[str, np.ndarray]:
        third = p.embed.dtype.type(1) / p.embed.dtype.type(3) * p.embed
        return {"x": p.embed + (third * p.embed.dtype.type(3) - p.embed) * p.embed.dtype.type(grown)}

    with np.errstate(all="ignore"):
        assert low <= expect(run, params, "float64")["x"].allowed <= high


# Drawn by a tier: a token's sums all but cancel, norms make it full size again, and six steps of training follow.
CANCELS = Case.parse("B8 T7 L5 h6 D5 N4 V997 m5 seed=48 scale=5.0 dropout=0.0 weights=mixed")


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.thorough), "float64"])
def test_training_that_multiplies_rounding_by_millions_accuses_nobody(dtype: str) -> None:
    training = CHANNELS["training"]
    assert training.expected(CANCELS, "float64")["turns.1.loss"].allowed > 1e-10
    observed = training.observe(load(get_backend("torch"), CANCELS, dtype, device="cpu"), CANCELS)
    assert not any(comparison.complaint for comparison in training.compare(observed, CANCELS, dtype))


@pytest.mark.parametrize("time", [64, 65, 103, 400])
def test_a_trained_model_is_allowed_no_more_in_a_long_text_than_rounding_makes(time: int) -> None:
    """Its first rows of attention are sums of zeros: noise on those, which a norm blows up, once allowed 1e-2."""
    params, config = bdh_spec.read()
    tokens = np.frombuffer((b"Objects are compared by the values that they hold. " * 8)[:time], np.uint8)[None]
    logits = expect(lambda p: {"logits": model.forward(tokens, p, config)}, params, "float32", runs=2)["logits"]
    assert np.max(logits.allowed) < 5e-5


def test_r15_a_relu_that_rounding_may_flip_flips_in_a_run_or_in_its_mirror() -> None:
    """Unless noise, either way, is smaller than its distance from the kink: of eight runs some flip it."""
    params = Params(*[np.array([[1.0, 1 + 2.0**-21 - 2.0**-23, 1 + 2.0**-21]])] * 5)  # rounded to nearest, it stays

    def flips(seed: int, *, mirrored: bool) -> bool:
        rows = [noisy(params, KINKED, rng).embed * 1.0 for rng in draws(seed, 8, mirrored=mirrored)]
        return any(bool(row[0, 2] < row[0, 1]) for row in rows)

    missed = {mirrored: sum(not flips(seed, mirrored=mirrored) for seed in range(1000)) for mirrored in (False, True)}
    assert missed[True] < 10 < missed[False]


# In one of its relus the einsum of a legal variant falls on the other side.
FLIPPED = Case.parse("B2 T1047 L2 h2 D6 N6 V11 m2 seed=48 scale=50.0")


@pytest.mark.thorough  # gradients of a thousand tokens under noise
def test_r15_a_port_in_which_a_relu_flips_is_accused_of_nothing() -> None:
    observed = CHANNELS["gradients"].observe(load(LEGAL["einsum"].backend(), FLIPPED, "float32"), FLIPPED)
    assert not any(comparison.complaint for comparison in CHANNELS["gradients"].compare(observed, FLIPPED, "float32"))
