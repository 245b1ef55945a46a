"""R1 to R12 by hand, and properties that need no reference."""

import math
import re
from decimal import Decimal, getcontext
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bdh_spec
from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_conformance.yardstick.strategies import cases
from bdh_conformance.yardstick.tolerances import error
from bdh_spec import BDHConfig, Params, model
from bdh_spec.params import cast
from bdh_spec.rope import frequencies, rope, rotation, swap


def rounding(case: Case) -> float:
    """How far two float64 runs of one function may be apart in this case: a hundred times what rounding does to it.

    Most cases stay under 1e-13. Where x + y nearly cancels (R10), which D = 2 does often, all rounding is magnified, and the
    float32 run shows by how much.
    """
    single = model.forward(case.tokens, cast(case.params, np.float32), case.config)
    return max(1e-12, 100 * 2.0**-29 * error(single, model.forward(case.tokens, case.params, case.config)))


PENCIL = Params(
    np.array([[0.003, -0.003], [1, 1], [0, 0.004]]),
    np.array([[[2.0, 1], [1, 3]]]),
    np.array([[[1.0, -1], [2, 1]]]),
    np.array([[0.001, 0], [0.001, 0.004]]),
    np.array([[1.0, 0, 2], [0, 1, 1]]),
)
PENCIL_CONFIG = BDHConfig(n_layer=1, n_embd=2, n_head=1, mlp_internal_dim_multiplier=1, vocab_size=3)


def pencil_table() -> dict[str, list[list[float]]]:
    """The stages of the worked case as SPEC.md prints them: per token its numbers."""
    page = (Path(bdh_spec.__file__).parent / "SPEC.md").read_text()
    rows = re.findall(r"^\| `([\w.]+)` \| ([-\d., ]+) \| ([-\d., ]+) \|", page.split("## A case for pencil")[1], re.M)
    return {name: [[float(number) for number in cell.split(",")] for cell in cells] for name, *cells in rows}


def test_the_pencil_case_is_what_the_page_says() -> None:
    stages = model.trace(np.array([[0, 2]]), PENCIL, PENCIL_CONFIG)
    table = pencil_table()
    assert list(table) == list(stages)
    for name, rows in table.items():
        assert stages[name].reshape(2, -1) == pytest.approx(np.array(rows), abs=6e-7), name
    assert model.loss(stages["logits"], np.array([[2, 0]])) == pytest.approx(1.499082, abs=6e-7)


def test_the_pencil_case_worked_out_in_decimal() -> None:
    """The same arithmetic without NumPy and without the specification, to 30 digits."""
    getcontext().prec = 30
    eps = Decimal("0.00001")

    def norm(a: Decimal, b: Decimal) -> Decimal:
        half = (a - b) / 2
        return half / (half * half + eps).sqrt()

    x0, x1 = norm(Decimal("0.003"), Decimal("-0.003")), norm(Decimal(0), Decimal("0.004"))
    sparse = -2 * x1  # encoder: (2a + b, a + 3b) of (s, -s) is (s, -2s); the first is cut
    turned = -sparse * Decimal(math.sin(1))
    score = turned * x0  # the second neuron of the first token is zero
    yKV = norm(score * x0, -score * x0)
    gated = sparse * -2 * yKV  # encoder_v gives (-s, -2s) of (s, -s), and s is negative
    decoded = gated * Decimal("0.001"), gated * Decimal("0.004")
    out0, out1 = norm(x0, -x0), norm(x1 + norm(*decoded), -x1 - norm(*decoded))
    stages = model.trace(np.array([[0, 2]]), PENCIL, PENCIL_CONFIG)
    assert stages["layers.0.attention"][0, 0, 1, 0] == pytest.approx(float(score * x0), abs=1e-7)  # f is a float32
    assert stages["logits"][0, :, 0] == pytest.approx([float(out0), float(out1)], abs=1e-9)


def test_r2_norm_of_zeros_is_zeros_and_eps_is_inside_the_root() -> None:
    assert not model.layer_norm(np.zeros((1, 4))).any()
    assert model.layer_norm(np.array([[0.003, -0.003]]))[0, 0] == pytest.approx(0.003 / math.sqrt(9e-6 + 1e-5))


def test_r4_turns_pairs_and_keeps_their_length() -> None:
    v = np.random.default_rng(0).normal(size=(1, 1, 5, 8))
    cos, sin = rotation(3, 5, frequencies(8), np.float64, "exact")
    turned = rope(v, cos, sin)
    np.testing.assert_allclose(np.hypot(turned[..., 0::2], turned[..., 1::2]), np.hypot(v[..., 0::2], v[..., 1::2]), rtol=1e-14)
    assert swap(np.array([[1.0, 2, 3, 4]])).tolist() == [[-2, 1, -4, 3]]


def test_r5_the_first_token_sees_nothing() -> None:
    case = Case(CONFIGS["three_heads"], scale=20)
    stages = model.trace(case.tokens, case.params, case.config)
    for name in ("scores", "attention", "yKV", "y_sparse", "xy_sparse"):
        assert not stages[f"layers.0.{name}"][:, :, 0].any(), name
        assert stages[f"layers.0.{name}"][:, :, 1:].any(), name


def test_r8_dropout_keeps_the_mean_and_the_right_share() -> None:
    config = BDHConfig(n_layer=2, n_embd=32, n_head=2, mlp_internal_dim_multiplier=32, dropout=0.25)
    masks = model.dropout(config, (3, 40), np.dtype(np.float64), np.random.default_rng(0))
    assert len(masks) == 2
    assert masks[0].shape == (3, 2, 40, 512)
    assert set(np.unique(masks[0])) == {0.0, 1 / 0.75}
    assert masks[0].mean() == pytest.approx(1, abs=0.01)
    assert not np.array_equal(masks[0], masks[1])


def test_r9_heads_merge_head_major() -> None:
    xy = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    merged = model.merge_heads(xy)
    assert merged.shape == (2, 4, 15)
    assert merged[1, 2, 1 * 5 + 3] == xy[1, 1, 2, 3]


def test_r12_is_the_mean_over_targets_that_count() -> None:
    logits = np.log(np.array([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]))
    assert model.loss(logits, np.array([[0, 2]])) == pytest.approx(-(math.log(0.5) + math.log(0.8)) / 2)
    assert model.loss(logits, np.array([[-100, 2]])) == pytest.approx(-math.log(0.8))


@given(cases(min_time=2))
def test_r5_a_later_token_changes_no_earlier_logit(case: Case) -> None:
    changed = case.tokens.copy()
    changed[:, -1] = (changed[:, -1] + 1) % case.config.vocab_size
    before, after = (model.forward(t, case.params, case.config) for t in (case.tokens, changed))
    assert error(after[:, :-1], before[:, :-1]) <= rounding(case)


@given(cases())
def test_texts_of_a_batch_do_not_see_one_another(case: Case) -> None:
    together = model.forward(case.tokens, case.params, case.config)
    alone = [model.forward(row[None], case.params, case.config) for row in case.tokens]
    assert error(np.concatenate(alone), together) <= rounding(case)


@given(cases())
def test_the_order_of_heads_means_nothing(case: Case) -> None:
    order = np.random.default_rng(case.seed).permutation(case.config.n_head)
    N, D = case.config.n_neurons, case.config.n_embd
    p = case.params
    shuffled = p._replace(
        encoder=p.encoder[order], encoder_v=p.encoder_v[order], decoder=p.decoder.reshape(-1, N, D)[order].reshape(-1, D)
    )
    assert error(model.forward(case.tokens, shuffled, case.config), model.forward(case.tokens, p, case.config)) <= rounding(
        case
    )


@given(cases())
def test_the_order_of_features_means_nothing(case: Case) -> None:
    order = np.random.default_rng(case.seed).permutation(case.config.n_embd)
    p = case.params
    shuffled = Params(p.embed[:, order], p.encoder[:, order], p.encoder_v[:, order], p.decoder[:, order], p.lm_head[order])
    assert error(model.forward(case.tokens, shuffled, case.config), model.forward(case.tokens, p, case.config)) <= rounding(
        case
    )


@given(cases())
def test_the_names_of_tokens_mean_nothing(case: Case) -> None:
    order = np.random.default_rng(case.seed).permutation(case.config.vocab_size)
    p = case.params
    renamed = p._replace(embed=p.embed[order], lm_head=p.lm_head[:, order])
    logits = model.forward(np.argsort(order)[case.tokens], renamed, case.config)
    assert error(logits, model.forward(case.tokens, p, case.config)[..., order]) <= rounding(case)


@given(cases(), st.sampled_from([1, 10**4, 2**24 + 1, 2**40, 2**62]))
def test_r4_an_offset_common_to_all_tokens_means_nothing(case: Case, offset: int) -> None:
    state = model.init_state(case.batch, case.config, np.float64)
    moved, _ = model.advance(bdh_spec.RecurrentState(offset, state.layers), case.tokens, case.params, case.config)
    assert error(moved, model.forward(case.tokens, case.params, case.config)) <= rounding(case)


@given(cases(min_time=2), st.data())
def test_r13_any_split_computes_the_parallel_form(case: Case, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, case.time - 1))))
    state, logits = model.init_state(case.batch, case.config, np.float64), []
    for chunk in np.split(case.tokens, cuts, axis=1):
        part, state = model.advance(state, chunk, case.params, case.config)
        logits.append(part)
    assert state.position == case.time
    assert error(np.concatenate(logits, axis=1), model.forward(case.tokens, case.params, case.config)) <= rounding(case)


@given(cases(min_time=2))
def test_r13_states_add_up(case: Case) -> None:
    """What two halves of a text write into an empty first-layer memory is what the whole writes."""
    empty = model.init_state(case.batch, case.config, np.float64)
    _, whole = model.advance(empty, case.tokens, case.params, case.config)
    half = case.time // 2
    _, first = model.advance(empty, case.tokens[:, :half], case.params, case.config)
    _, second = model.advance(bdh_spec.RecurrentState(half, empty.layers), case.tokens[:, half:], case.params, case.config)
    total = first.layers[0] + second.layers[0]
    np.testing.assert_allclose(total, whole.layers[0], rtol=0, atol=rounding(case) * np.abs(total).max())


@given(cases())
def test_a_float32_run_is_float32_throughout(case: Case) -> None:
    stages = model.trace(case.tokens, cast(case.params, np.float32), case.config)
    assert {stage.dtype for stage in stages.values()} == {np.dtype(np.float32)}
