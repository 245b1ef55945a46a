"""The suite as it judges: honest ports pass, mistakes fail where they should, and a failure explains itself."""

import dataclasses
from collections import Counter
from functools import cache

import numpy as np
import pytest

import bdh_spec
from bdh_conformance import Expectation, assert_agrees
from bdh_conformance.adversaries.diagnosis import diagnose
from bdh_conformance.adversaries.mistakes import MISTAKES
from bdh_conformance.channels import CHANNELS, dropout
from bdh_conformance.channels.channel import expect_of
from bdh_conformance.channels.loading import load
from bdh_conformance.channels.parallel import padded_lengths
from bdh_conformance.levels import levels
from bdh_conformance.outcomes import BAD, Result
from bdh_conformance.plan import TIERS, Tier, plan
from bdh_conformance.runner import Run
from bdh_conformance.yardstick import kinks
from bdh_conformance.yardstick.agreement import compare
from bdh_conformance.yardstick.cases import CONFIGS, COVERAGE, FREQS, POOL, Case
from bdh_conformance.yardstick.reference import Specification
from bdh_conformance.yardstick.tolerances import FLOAT64
from bdh_spec import Backend, Params
from bdh_spec.gradients import gradients
from bdh_spec.protocol import VERBS

SHORT = Tier("short", 4, 2, 0, 0, "a cut-down standard")


def results(backend: Backend, tier: Tier, *, explains: bool = False, **what: tuple[str, ...]) -> Run:
    run = Run(backend, explains=explains)
    for check in plan(tier, backend.capabilities, **what):
        run.run(check)
    return run


@cache
def specification(tier: str) -> Run:
    return results(bdh_spec.get_backend("numpy"), {"short": SHORT, **TIERS}[tier])


# `make conform` runs the whole standard tier, and the score every planted mistake.
TIERS_HERE = ["smoke", pytest.param("short", marks=pytest.mark.thorough)]


@pytest.mark.parametrize("tier", TIERS_HERE)
def test_the_specification_passes_its_own_suite(tier: str) -> None:
    run = specification(tier)
    assert [(r.id, r.worst and r.worst.message) for r in run.results if r.status in BAD] == []
    assert {r.status for r in run.results} == {"passed", "not claimed"}


@pytest.mark.parametrize("tier", TIERS_HERE)
def test_every_tier_meets_all_that_hides_bugs(tier: str) -> None:
    assert [item for item, count in specification(tier).coverage.items() if not count] == []


def test_the_pool_of_shapes_covers_the_list() -> None:
    met = Counter(item for shape in POOL for item, holds in COVERAGE.items() if holds(Case(*shape)))
    about_weights = {"weights of order one", "mixed scales"}
    assert set(COVERAGE) - set(met) == about_weights


def test_a_failure_names_the_stage_the_place_the_mistake_and_the_way_back() -> None:
    run = results(MISTAKES["variance_unbiased"].backend(), SHORT, explains=True, channels=("logits",), dtypes=("float32",))
    message = run.results[0].worst.message
    assert message.startswith("variance_unbiased differs from the specification at logits")
    assert "(text 0, token 0, feature" in message
    assert "in its trace, differs from the specification at embed" in message
    assert "(variance_unbiased)" in message
    assert "bdh-conform variance_unbiased --channel logits --dtype float32 --case 'B1 T1 L1 h1 D2 " in message


def test_a_failure_is_shrunk_and_its_line_fails_again() -> None:
    run = results(MISTAKES["chunk_blind"].backend(), SHORT, explains=True, channels=("decode",), dtypes=("float32",))
    case = Case.parse(run.results[0].worst.case)
    assert (case.time, case.batch, case.config.n_layer) == (2, 1, 1)
    check = plan(SHORT, run.backend.capabilities, channels=("decode",), dtypes=("float32",), case=case)[0]
    assert Run(run.backend).run(check).status == "failed"


def test_what_a_port_does_not_claim_is_not_passed() -> None:
    capabilities = bdh_spec.Capabilities(verbs=("forward",), phases=("exact",))
    checks = plan(TIERS["standard"], capabilities)
    claimed = {check.channel.name for check in checks if not check.reason}
    assert claimed == {"logits", "batch", "determinism", "mutation", "order", "inputs", "threads", "properties", "refusals"}
    assert all(check.dtype == "float32" and check.phase == "exact" for check in checks if not check.reason)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_threads_of_a_port_that_has_only_a_narrow_dtype_are_held_to_masters(dtype: str) -> None:
    """R16: moments in float32. In float16 rounding would leave a negative one, of which there is no root."""
    threads = CHANNELS["threads"]
    case = threads.prepare(Case(CONFIGS["three_heads"], 2, 5, seed=0))
    assert case is not None
    expected = threads.expected(case, dtype)
    assert all(np.isfinite(expectation.allowed).all() for expectation in expected.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["logits", "traces", "decode", "gradients"])
def test_the_first_tolerances_allow_no_more_than_the_whole_ones(name: str, dtype: str) -> None:
    channel, case = CHANNELS[name], Case(CONFIGS["three_heads"], 2, 5, seed=3)
    first, whole = (channel.expected(case, dtype, first=it) for it in (True, False))
    assert list(first) == list(whole)
    assert all(np.all(first[stage].allowed <= whole[stage].allowed) for stage in whole)
    assert all(first[stage].allowed_slope <= whole[stage].allowed_slope for stage in whole)


def test_what_only_the_whole_tolerance_allows_is_no_mistake() -> None:
    channel, case = CHANNELS["logits"], Case(CONFIGS["three_heads"], 2, 5, seed=3)
    first, whole = (channel.expected(case, "float32", first=it)["logits"] for it in (True, False))
    between = whole.reference * (1 + (first.allowed_slope + whole.allowed_slope) / 2)
    assert compare("logits", between.astype(np.float32), first).complaint
    observed = {"logits": between.astype(np.float32)}
    assert not any(comparison.complaint for comparison in channel.compare(observed, case, "float32"))


# Found by a deep run: read token by token, twenty times as much rounding as read at once, on every port.
CANCELS = Case.parse("B2 T4 L2 h2 D12 N18 V12 m3 seed=100 scale=20.0 weights=mixed")


@pytest.mark.parametrize("port", ["numpy", "torch"])
def test_nobody_is_accused_for_reading_token_by_token_where_that_rounds_more(port: str) -> None:
    decode = CHANNELS["decode"]
    observed = decode.observe(load(bdh_spec.get_backend(port), CANCELS, "float32", device="cpu"), CANCELS)
    assert not any(comparison.complaint for comparison in decode.compare(observed, CANCELS, "float32"))
    at_once = expect_of((Specification,), decode.reference, CANCELS, "float32", "exact")
    assert at_once["ones.logits"].allowed < decode.expected(CANCELS, "float32")["ones.logits"].allowed / 2


def test_no_mistake_is_named_for_what_rounding_alone_has_done() -> None:
    decode = CHANNELS["decode"]
    observed = decode.observe(load(bdh_spec.get_backend("numpy"), CANCELS, "float32"), CANCELS)
    at_once = expect_of((Specification,), decode.reference, CANCELS, "float32", "exact")
    harmless = [MISTAKES[name] for name in ("loss_in_bits", "dropout_missing", "gradient_clipped", "positions_32_bits")]
    assert not diagnose(observed, decode.observe, CANCELS, "float32", "exact", at_once, among=harmless)


def test_a_port_of_float32_phases_alone_is_looked_at_as_closely():
    def checked(*phases):
        capabilities = bdh_spec.Capabilities(phases=phases)
        return [check for check in plan(TIERS["standard"], capabilities, dtypes=("float32",)) if not check.reason]

    assert len(checked("float32")) == len(checked("exact"))
    assert {check.phase for check in checked("float32")} == {"float32"}


def test_padded_texts_are_claimed_by_name_only() -> None:
    (padding,) = plan(TIERS["standard"], bdh_spec.Capabilities(), channels=("padding",), dtypes=("float32",))
    assert padding.reason == "the port does not claim the verb padded"
    unclaimed = Run(bdh_spec.get_backend("numpy"))
    unclaimed.run(padding)
    assert levels(unclaimed.results)["padding"] == "not claimed"


def test_texts_are_padded_to_every_length() -> None:
    for config, batch, time in POOL:
        if time > 1:
            lengths = padded_lengths(Case(config, batch, time)).values()
            assert {1, time} <= {length for row in lengths for length in row}
            assert all((row >= 1).all() and (row <= time).all() for row in lengths)
            assert batch == 1 or all(len(set(row)) > 1 for row in lengths)


class Broken(type(bdh_spec.get_backend("numpy"))):
    name = "broken"

    def _load(self, params, config, **how):
        raise RuntimeError("no such kernel")


def test_a_port_that_raises_is_an_error_with_its_sentence() -> None:
    run = results(Broken(), SHORT, explains=True, channels=("logits",), dtypes=("float32",))
    assert run.results[0].status == "error"
    assert run.results[0].worst.message.startswith("broken fails in logits: RuntimeError: no such kernel")


class Moody(type(bdh_spec.get_backend("numpy"))):
    """Wrong on the first call of every second model."""

    name = "moody"
    loaded = 0

    def _load(self, params, config, **how):
        model = super()._load(params, config, **how)
        self.loaded += 1
        if self.loaded == 3:
            model._forward = lambda tokens: np.zeros((*tokens.shape, config.vocab_size), np.float32)
        return model


def test_a_failure_that_does_not_come_again_is_a_failure() -> None:
    run = results(Moody(), SHORT, explains=True, channels=("logits",), dtypes=("float32",))
    assert run.results[0].status == "failed"
    assert "it does not fail every time" in run.results[0].worst.message


@pytest.mark.parametrize("case", [Case(*POOL[4], seed=1, scale=0.3), Case(*POOL[0], weights="mixed"), *dropout.CASES], ids=str)
def test_a_case_is_what_it_prints(case: Case) -> None:
    again = Case.parse(str(case))
    assert again == case
    assert np.array_equal(again.params.encoder, case.params.encoder)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("B1 T2", "lacks L, h, D, V, m"),
        ("B1 T2 L2 h2 D4 m4 V7 sed=1", "'sed=1' is no part of a case"),
        ("B1 T2 L2 h2 D4 N9 m4 V7", "N9 in a case whose other sizes make it N8"),
        ("B1 T2 L2 h2 D4 m4 V7 weights=odd", "choose from normal"),
        ("B1 T2 L2 h2 D4 m4 V7 freqs=odd", "choose from published"),
        ("B1 T2 L2 h3 D3 m1 V7", "must be even"),
    ],
)
def test_a_text_that_is_no_case_gets_a_sentence(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Case.parse(text)


def test_a_case_may_leave_out_what_follows_from_the_rest() -> None:
    assert Case.parse("B1 T2 L2 h2 D4 m4 V7 seed=7 scale=0.3").config.n_neurons == 8


@pytest.mark.parametrize("freqs", FREQS)
def test_a_case_says_which_frequencies_it_is_made_with(freqs: str) -> None:
    case = Case(CONFIGS["plain"], seed=3, freqs=freqs)
    assert Case.parse(str(case)) == case
    assert Case.parse(str(case)).config.freqs == case.config.freqs
    assert (case.config.freqs is None) == (freqs == "published")
    assert dataclasses.replace(case, freqs="published").config == CONFIGS["plain"]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_trained_table_has_everything_that_a_port_may_get_wrong(config: str) -> None:
    table = Case(CONFIGS[config], freqs="trained").config.freqs.array
    assert (table < 0).any()
    assert (np.abs(table) >= 1).any()
    assert (table[0::2] != table[1::2]).all()
    assert (np.abs(table) < 1e-7).any()


@pytest.mark.parametrize("channel", ["properties", "phases", "padding"])
@pytest.mark.parametrize("freqs", FREQS)
def test_an_honest_port_passes_whatever_a_channel_asks_of_a_table(channel: str, freqs: str) -> None:
    case = Case(CONFIGS["plain"], 2, 6, seed=3, scale=20.0, freqs=freqs)
    run = Run(bdh_spec.get_backend("numpy"), explains=False)
    what = {"case": case, "channels": (channel,), "dtypes": ("float64",), "phases": ("exact",)}
    assert [run.run(check).status for check in plan(TIERS["standard"], run.backend.capabilities, **what)] == ["passed"]


def test_a_port_without_frequencies_of_its_own_is_not_judged_by_them() -> None:
    case = Case(CONFIGS["plain"], freqs="trained")
    without = bdh_spec.Capabilities(verbs=tuple(verb for verb in VERBS if verb != "frequencies"))
    reasons = {check.reason for check in plan(TIERS["standard"], without, case=case, channels=("logits", "frequencies"))}
    assert all("does not claim" in reason for reason in reasons)
    asked = plan(TIERS["standard"], bdh_spec.Capabilities(verbs=VERBS), case=case, channels=("logits",), dtypes=("float32",))
    assert not any(check.reason for check in asked)


def test_gradient_cases_stand_clear_of_kinks() -> None:
    case = Case(CONFIGS["plain"], 2, 6, seed=3, scale=20.0)
    params = case.params._replace(encoder=case.params.encoder.copy())
    assert kinks.is_clear(case.tokens, params, case.config)
    x = Specification(params, case.config).trace(case.tokens)["embed"][0, 0]
    along = x / (x @ x)
    params.encoder[0, :, 0] -= along * (x @ params.encoder[0, :, 0] - 1e-9)  # the first token is now at a kink
    assert not kinks.is_clear(case.tokens, params, case.config)


def test_dropout_masks_must_come_as_often_as_they_should() -> None:
    case = dropout.CASES[0]
    honest = CHANNELS["dropout"].observe(load(bdh_spec.get_backend("numpy"), case, "float64"), case)
    assert not any(c.complaint for c in dropout.judge(honest, case, "float64", "exact"))
    repeated = honest | {"losses": np.resize(honest["losses"][: dropout.SEEDED], dropout.DRAWS)}
    assert [c.stage for c in dropout.judge(repeated, case, "float64", "exact") if c.complaint] == [
        "training.frequencies",
        "training.likeliest",
    ]


@pytest.mark.parametrize("case", dropout.CASES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_two_seeds_hardly_ever_drop_the_same(case: Case, dtype: str) -> None:
    assert np.sum(dropout.outcomes(case, dtype).chances ** 2) ** dropout.SEEDED < 1e-12


@pytest.mark.parametrize("case", dropout.CASES, ids=str)
def test_no_mask_brings_a_relu_of_the_dropout_cases_to_its_kink(case: Case) -> None:
    for mask in dropout.outcomes(case, "float32").masks:
        keep = dropout.kept(mask[None], case, np.dtype(np.float64))
        assert kinks.is_clear(case.tokens, case.params, case.config, keep)


@pytest.mark.parametrize("case", dropout.CASES, ids=str)
def test_masks_of_one_loss_have_one_gradient(case: Case) -> None:
    possible = dropout.outcomes(case, "float64")
    for mask in np.random.default_rng(1).integers(0, 2, (200, possible.masks.shape[1])).astype(np.float64):
        value, slopes = masked(case, mask)
        outcome = dropout.which(np.array([value]), possible)[0]
        assert value == pytest.approx(possible.losses[outcome], abs=dropout.SAME)
        same = masked(case, possible.masks[outcome])[1]._asdict()
        assert_agrees("a mask", slopes._asdict(), {name: Expectation(slope, FLOAT64, FLOAT64) for name, slope in same.items()})


def masked(case: Case, mask: np.ndarray) -> tuple[float, Params]:
    """The loss and its slopes under a mask."""
    keep = dropout.kept(mask[None], case, np.dtype(np.float64))
    return gradients(case.tokens, case.tokens, case.params, case.config, keep=keep)


def test_a_result_keeps_its_failure() -> None:
    run = specification("smoke")
    passed = run.results[0].worst
    result = Result("logits", "forward", "float32", "exact")
    result.add(dataclasses.replace(passed, status="failed", message="wrong"))
    result.add(passed)
    assert result.status == "failed"
    assert result.worst.message == "wrong"
