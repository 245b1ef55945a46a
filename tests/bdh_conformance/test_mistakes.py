"""The library of known mistakes: each builds, shows where it says it does, and is named by a diagnosis of its own answer.

Legal variants agree where mistakes do not, and hostile ports never do.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import chain

import numpy as np
import pytest

import bdh_spec
from bdh_conformance import expect
from bdh_conformance.adversaries.diagnosis import RUNS, diagnose, explanations, repeated, say, unsteady
from bdh_conformance.adversaries.hostile import HOSTILE
from bdh_conformance.adversaries.legal import FUSED_NORM, LEGAL
from bdh_conformance.adversaries.mistakes import MISTAKES, RULES
from bdh_conformance.adversaries.narrow import NarrowBackend
from bdh_conformance.adversaries.variants import Change, variant
from bdh_conformance.channels import CHANNELS, dropout
from bdh_conformance.channels.channel import against
from bdh_conformance.channels.loading import load
from bdh_conformance.score import Score, score
from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_conformance.yardstick.tolerances import error
from bdh_spec import Backend, BDHConfig, Model, RecurrentState, model
from bdh_spec.numpy_backend import NumpyBackend
from bdh_spec.params import Array

Observed = dict[str, Array]
Observe = Callable[[Model, Case], Observed]
PAIRS = ("determinism", "mutation")  # judged within one observation, and not against the specification's


PLAIN = Case(CONFIGS["plain"], 2, 6, 1, 5.0)
CASES = (
    Case(CONFIGS["three_heads"], 2, 6, 2, 20.0),
    replace(PLAIN, scale=1.0),
    Case(CONFIGS["square_head"], 2, 5, 4, 10.0, weights="mixed"),
    replace(PLAIN, weights="ties"),
)
MANY_TOKENS = Case(BDHConfig(2, 16, 0.1, 2, 8, 11), 2, 1047, 48, 20.0)
MANY_NEURONS = Case(BDHConfig(1, 4, 0.1, 2, 2048, 9), 1, 5, 1)


OBSERVE: dict[str, Observe] = {name: channel.observe for name, channel in CHANNELS.items()}


@cache
def prepared(channel: str) -> list[Case]:
    """The cases on which a channel is observed."""
    return [case for case in map(CHANNELS[channel].prepare, CASES) if case is not None]


def observed(backend: Backend, channel: str, case: Case, dtype: str = "float64") -> Observed | None:
    """What a port shows, or None if it fails; on a case of its own, because mistakes write into anything."""
    own = replace(case)
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return OBSERVE[channel](load(backend, own, dtype), own)
    except Exception:  # noqa: BLE001  a mistake may fail in any way
        return None


def test_every_mistake_has_a_name_of_its_own_and_known_channels() -> None:
    assert len(MISTAKES) == sum(len(rule) for rule in RULES) >= 100
    named = {channel for m in (*MISTAKES.values(), *HOSTILE.values()) for channel in m.channels}
    assert named == set(CHANNELS)
    assert len({(m.module, m.before, m.after) for m in MISTAKES.values()}) == len(MISTAKES)
    assert len({m.says for m in MISTAKES.values()}) == len(MISTAKES)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_builds(name: str) -> None:
    mistake = MISTAKES[name]
    assert "\n" not in mistake.before + mistake.after
    assert mistake.backend().version() == f"numpy with {name}"


# The score looks at all of them, on every channel: here are some that only sizes, calls, tables or orders show.
SOME = [
    "eps_outside_root",
    "block_of_neurons_lost",
    "texts_beyond_four_lost",
    "state_forgotten_after_512",
    "dropout_seed_ignored",
    "gradient_turned_back",
    "padding_counted_in_positions",
]


@pytest.mark.parametrize("name", SOME)
def test_every_channel_that_a_mistake_names_catches_it_and_its_diagnosis_names_it(name: str) -> None:
    assert score(MISTAKES[name]) == Score(name, MISTAKES[name].channels, (), True)


@pytest.mark.thorough  # on all of the plan
def test_a_channel_without_its_special_cases_misses_what_they_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    mistake = MISTAKES["relu_slope_at_zero_1"]
    assert score(mistake).missed == ()
    monkeypatch.setitem(CHANNELS, "gradients", replace(CHANNELS["gradients"], special=()))
    assert score(mistake).missed == ("gradients",)


def test_a_change_names_one_place() -> None:
    with pytest.raises(ValueError, match=r"bdh_spec/model.py: 'return' stands \d+ times there: a change names one place"):
        variant("twice", (Change("model", "return", "yield"),))


def test_a_variant_leaves_the_specification_alone_and_speaks_its_types() -> None:
    port = MISTAKES["donated_state_read"].backend()
    loaded = load(port, PLAIN, "float32")
    assert isinstance(port, bdh_spec.Backend)
    assert isinstance(loaded, bdh_spec.Model)
    state = loaded.init_state(2)
    assert isinstance(state, bdh_spec.State)
    assert type(loaded.export_state(state)) is RecurrentState
    with pytest.raises(bdh_spec.TokensError):
        loaded.forward([[-1]])
    assert type(loaded).__mro__[-2] is bdh_spec.Model
    donated = load(NumpyBackend(), PLAIN, "float32")
    given = donated.init_state(2)
    donated.advance(given, PLAIN.tokens, donate=True)
    with pytest.raises(bdh_spec.StateError):
        donated.advance(given, PLAIN.tokens)


PLANTED = ("dropout_missing", "diagonal_kept", "gradient_of_sum", "logits_scaled")  # enough: a step of training takes long


@pytest.mark.thorough  # six runs of each
@pytest.mark.parametrize("name", [name for name, mistake in MISTAKES.items() if mistake.random])
def test_a_diagnosis_names_what_answers_at_random_by_where_it_does(name: str) -> None:
    mistake, case = MISTAKES[name], dropout.CASES[0] if "determinism" not in MISTAKES[name].channels else PLAIN
    channel = CHANNELS[mistake.channels[0] if case is not PLAIN else "determinism"]
    answers = repeated(lambda: channel.observe(load(mistake.backend(), replace(case), "float64"), replace(case)))
    assert len(answers) == RUNS
    among = [mistake for mistake in MISTAKES.values() if mistake.random or mistake.name in PLANTED]
    named = diagnose(answers[0], channel.observe, case, "float64", among=among, others=answers[1:])
    assert mistake in named
    assert all(other.random for other in named)


@pytest.mark.thorough  # held against every mistake
def test_a_port_that_repeats_itself_is_taken_for_none_that_does_not() -> None:
    observe = CHANNELS["determinism"].observe
    answers = repeated(lambda: observe(load(NumpyBackend(), PLAIN, "float32"), PLAIN))
    assert len(answers) == 2
    assert unsteady(answers) == set()
    assert diagnose(answers[0], observe, PLAIN, others=answers[1:]) == []
    trembling = [answers[0], answers[0] | {"gradients.embed": answers[0]["forward.logits"]}]
    assert unsteady(trembling) == {"gradients.embed"}
    assert diagnose(answers[0], observe, PLAIN, others=trembling[1:]) == [], "no known mistake makes one gradient tremble"


@pytest.mark.thorough  # held against every mistake of phases
def test_r4_a_phase_too_large_for_float32_is_recognised_by_what_rounding_leaves_of_it() -> None:
    mistake, channel = MISTAKES["phases_not_wrapped"], CHANNELS["phases"]
    answer = channel.observe(load(mistake.backend(), PLAIN, "float32"), PLAIN)
    named = diagnose(answer, channel.observe, PLAIN, "float32", "exact", channel.expected(PLAIN, "float32"))
    assert named == [mistake]


def test_a_diagnosis_names_no_one_where_nothing_fits() -> None:
    case, logits = PLAIN, OBSERVE["logits"]
    expected = CHANNELS["logits"].expected(case, "float32")
    honest = observed(NumpyBackend(), "logits", case, "float32")
    assert honest is not None
    assert diagnose(honest, logits, case, "float32", "exact", expected) == []
    groups = explanations({"logits": honest["logits"][:, ::-1]}, logits, case, "float32", "exact", expected)
    assert say(groups) == f"none of the {len(MISTAKES)} known mistakes computes this"


def test_a_diagnosis_groups_mistakes_that_a_case_cannot_tell_apart() -> None:
    mistake, other = MISTAKES["rotation_backwards"], MISTAKES["cos_and_sin_swapped"]
    found = observed(mistake.backend(), "logits", PLAIN, "float32")
    assert found is not None
    groups = explanations(found, OBSERVE["logits"], PLAIN, "float32")
    assert [mistake, other] == groups[0]
    assert say(groups) == (
        "looks like: the rotation turns backwards (rotation_backwards), or cosine and sine are swapped (cos_and_sin_swapped)"
    )


@pytest.mark.parametrize("channel", ["traces", "decode", "gradients", "loss"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_legal_variant_agrees(channel: str, dtype: str) -> None:
    for case in prepared(channel)[:2]:
        for phase in ("exact", "float32"):
            expected = CHANNELS[channel].expected(case, dtype, phase)
            for legal in LEGAL.values():
                port = legal.backend()
                if phase in port.capabilities.phases:
                    answer = OBSERVE[channel](load(port, case, dtype, phase), case)
                    assert not [c.complaint for c in against(answer, expected) if c.complaint], f"{legal.name}, {phase}, {case}"


@pytest.mark.parametrize("name", LEGAL)
def test_a_legal_variant_is_no_copy(name: str) -> None:
    """It differs from the specification in some bit, or in what it declares.

    Some kernels add few terms in the very order of a loop: none adds thousands so.
    """
    port = LEGAL[name].backend()
    channels = ("traces", "decode", "gradients", "loss", "padding")
    runs = [*((channel, case) for channel in channels for case in prepared(channel)[:2]), ("traces", MANY_NEURONS)]
    assert port.capabilities != NumpyBackend.capabilities or any(other_bits(port, channel, case) for channel, case in runs)


def other_bits(port: Backend, channel: str, case: Case) -> bool:
    """Whether a port rounds otherwise than the specification does in float32."""
    ours, theirs = observed(port, channel, case, "float32"), observed(NumpyBackend(), channel, case, "float32")
    assert ours is not None
    assert theirs is not None
    return not all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_r2_the_fused_variance_is_legal_about_zero_and_not_far_from_it() -> None:
    """E[x^2] - E[x]^2 cancels where the mean is large against the deviation; the centred form does so much less."""
    assert fused_norm_error(0.0) < 1 < fused_norm_error(30.0)


def fused_norm_error(mean: float) -> float:
    """Over what is allowed, the error of the fused norm where the embedding's rows have this mean, in standard deviations."""
    case = replace(PLAIN, scale=20.0)
    params = case.params._replace(embed=case.params.embed + mean * 20 * 0.02)
    expected = expect(lambda p: model.trace(case.tokens, p, case.config), params, "float32")
    traced = FUSED_NORM.backend().load(params, case.config).trace(case.tokens)
    return max(error(traced[name], e.reference) / e.allowed for name, e in expected.items())


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_port_fails(name: str) -> None:
    hostile = HOSTILE[name]
    for channel in hostile.channels:
        assert any(fails(hostile.backend(), channel, case) for case in (*CASES[:2], MANY_TOKENS)), f"{channel} lets it through"


def test_the_honest_port_is_not_taken_for_a_hostile_one() -> None:
    for port in (NumpyBackend(), NarrowBackend()):
        seen = [
            h.channels for h in HOSTILE.values() if isinstance(h.backend(), NarrowBackend) == isinstance(port, NarrowBackend)
        ]
        assert not any(fails(port, channel, case) for channel in {*chain(*seen)} for case in CASES[:2])


def fails(port: Backend, channel: str, case: Case) -> bool:
    """Whether a channel refuses a port, an error of the port's included."""
    own = CHANNELS[channel].prepare(replace(next(iter(CHANNELS[channel].only), case)))
    dtype = port.capabilities.dtypes[0]
    assert own is not None
    try:
        answer = CHANNELS[channel].observe(load(port, own, dtype), own)
        return any(c.complaint for c in CHANNELS[channel].compare(answer, own, dtype))
    except Exception:  # noqa: BLE001  so may a hostile port
        return True
