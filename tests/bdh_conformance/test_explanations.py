"""What a failure says: once, of the right stage, with what was drawn; and how long a run draws cases."""

import time
from dataclasses import replace

import numpy as np
import pytest

import bdh_spec
from bdh_conformance import search
from bdh_conformance.adversaries import table
from bdh_conformance.adversaries.mistakes import MISTAKES
from bdh_conformance.channels import CHANNELS, masks
from bdh_conformance.channels.loading import load
from bdh_conformance.plan import TIERS, plan
from bdh_conformance.runner import Run, share
from bdh_conformance.yardstick import stages
from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_spec import model
from bdh_spec.numpy_backend import NumpyBackend, NumpyModel

CASE = Case(CONFIGS["plain"], 2, 6, 1, 20.0)


def test_one_mistake_is_diagnosed_once_and_named_by_the_other_checks() -> None:
    run = Run(MISTAKES["rotation_backwards"].backend())
    checks = plan(TIERS["smoke"], run.backend.capabilities, channels=("logits", "traces"), dtypes=("float32",))
    first, *others = [run.run(check) for check in checks if check.phase == "exact"]
    assert first.same_as == ""
    assert "looks like: the rotation turns backwards (rotation_backwards)" in first.worst.message
    assert {other.same_as for other in others} == {first.id}
    assert all(f"looks like {first.id}: " in other.worst.message for other in others)


@pytest.mark.parametrize("of", ["layers.0.yKV", "layers.1.x"])
def test_a_stage_that_amplifies_is_not_blamed(of: str) -> None:
    """An early stage is off by less than its own tolerance, and all that follow are right functions of it."""
    params = bdh_spec.params.cast(CASE.params, np.float32)
    trace = model.trace(CASE.tokens, params, CASE.config)
    held = (CASE.tokens, CASE.params, CASE.config, "float32", "exact")
    assert not [c for c in stages.by_themselves(trace, *held) if c.complaint]
    sentence = stages.blame(trace, *held, of)
    assert sentence == f"{of} follows from the stages before it and amplifies what they are off by: the mistake is earlier"
    wrong = trace | {of: trace[of] * np.float32(1.001)}
    assert stages.blame(wrong, *held, of) == ""
    before = list(trace)[list(trace).index(of) - 1]
    assert f"stands before {before}" in stages.blame(trace | {before: trace[before] * np.float32(1.001)}, *held, of)


def test_a_failure_of_sampling_shows_the_draw_and_what_it_was_drawn_from() -> None:
    run = Run(MISTAKES["top_k_one_more"].backend(), explains=False)
    (check,) = plan(TIERS["smoke"], run.backend.capabilities, channels=("sampling",), dtypes=("float32",), case=CASE)
    message = run.run(check).worst.message
    assert all(word in message for word in ("temperature", ", k ", "seed ", "position ", "; u 0.", "logits and ends"))


class Later(NumpyModel):
    """Phases are products in float32 from a position on that no known mistake has."""

    def _advance(self, native, position, tokens, donate):
        phase, self.phase = self.phase, "float32" if native.position >= 9000 else self.phase
        try:
            return super()._advance(native, position, tokens, donate)
        finally:
            self.phase = phase


class LaterBackend(NumpyBackend):
    name = "later"

    def _load(self, params, config, **how):
        return Later(params, config, **how)


@pytest.mark.thorough  # held against every mistake of phases
def test_r4_a_mistake_made_from_some_position_on_is_named() -> None:
    run = Run(LaterBackend())
    (check,) = plan(TIERS["smoke"], run.backend.capabilities, channels=("phases",), dtypes=("float32",), phases=("exact",))
    message = run.run(replace(check, fixed=check.fixed[:1])).worst.message
    assert "(phases_float32)" in message or "(phases_float32_later)" in message


@pytest.mark.parametrize(
    ("factor", "named"),
    [(1.0, []), (1 + 2.0**-22, ["table_by_float32_power"]), (1 + 2e-4, ["table_trained"])],
    ids=["the table", "a unit off", "trained"],
)
def test_r4_a_table_is_measured_from_a_trace(factor: float, named: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(CONFIGS["one_layer"], 1, table.STEPS, seed=1, scale=20.0)
    of_rope = bdh_spec.rope.frequencies
    monkeypatch.setattr(bdh_spec.model, "frequencies", lambda n: (of_rope(n) * factor).astype(np.float32))
    trace = load(NumpyBackend(), case, "float32").trace(case.tokens)
    monkeypatch.undo()
    assert [mistake.name for mistake in table.of_trace(trace, table.PHASE_ERROR["exact"])] == named


@pytest.mark.parametrize("case", masks.CASES, ids=str)
@pytest.mark.parametrize("port", ["numpy", "torch"])
def test_r8_whole_masks_are_drawn_as_they_should_be(port: str, case: Case) -> None:
    seen = masks.observe(load(bdh_spec.get_backend(port), case, "float32", device="cpu"), case)
    assert not [c for c in masks.judge(seen, case) if c.complaint]


def test_r8_two_tokens_that_drop_alike_are_seen() -> None:
    seen = masks.observe(load(NumpyBackend(), masks.PAIRS, "float32"), masks.PAIRS)
    wrong = masks.judge(seen | {"moved.0.6": seen["moved.0.5"]}, masks.PAIRS)
    assert [c.stage for c in wrong if c.complaint] == ["masks.text_0_token_6_and_text_0_token_5"]


def test_time_is_shared_by_the_checks_that_draw_cases() -> None:
    checks = plan(TIERS["deep"], NumpyBackend.capabilities, channels=("logits", "decode"), dtypes=("float32",))
    now = time.time()
    first = share(checks, 0, now + 60)
    assert 0 < first - now < 60
    assert share(checks, len(checks) - 1, now + 60) == pytest.approx(now + 60, abs=1)
    assert share(checks, 0, None) is None


def test_no_case_is_drawn_once_time_is_up() -> None:
    run = Run(NumpyBackend(), explains=False)
    (check,) = plan(TIERS["deep"], run.backend.capabilities, channels=("batch",), dtypes=("float32",))
    result = run.run(check, time.time())
    assert result.status == "passed"
    assert result.cases == len(list(run.fitting(check)))
    with pytest.raises(search.Enough):
        raise search.Enough


def test_a_norm_over_two_features_is_judged_in_no_long_text_of_a_narrow_type() -> None:
    case = Case.parse("B1 T266 L2 h2 D2 N2 V7 m2 seed=48 scale=20.0")
    narrow, wide = (
        plan(TIERS["standard"], bdh_spec.Capabilities((dtype,)), channels=("logits",), dtypes=(dtype,), case=case)[0]
        for dtype in ("bfloat16", "float32")
    )
    assert narrow.fit(case) is None
    assert wide.fit(case) == case


def test_some_channel_of_the_standard_tier_meets_each_class_of_sizes() -> None:
    from bdh_conformance.yardstick.sizes import SIZES

    assert {name for channel in CHANNELS.values() for name in (*channel.sizes, *channel.narrow_sizes)} == set(SIZES)
