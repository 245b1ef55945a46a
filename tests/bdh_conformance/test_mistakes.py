"""The library of known mistakes: each builds, shows where it says it does, and is named by a diagnosis of its own answer.

Legal variants agree where mistakes do not, and hostile ports never do.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache, cached_property

import numpy as np
import pytest

import bdh_spec
from bdh_conformance import Expectation, expect
from bdh_conformance.adversaries.diagnosis import RUNS, apart, diagnose, explanations, repeated, say, unsteady
from bdh_conformance.adversaries.hostile import HOSTILE
from bdh_conformance.adversaries.legal import FUSED_NORM, LEGAL
from bdh_conformance.adversaries.mistakes import MISTAKES, RULES, Mistake
from bdh_conformance.adversaries.variants import Change, variant
from bdh_conformance.channels import CHANNELS, dropout
from bdh_conformance.channels.channel import against
from bdh_conformance.channels.loading import ORIGINS, load
from bdh_conformance.channels.refusals import refusal
from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_conformance.yardstick.tolerances import FLOAT64, error
from bdh_spec import AdamW, Backend, Model, Params, RecurrentState, model
from bdh_spec.numpy_backend import NumpyBackend
from bdh_spec.params import Array

Observed = dict[str, Array]
Observe = Callable[[Model, Case], Observed]
PAIRS = ("determinism", "mutation")  # judged within one observation, and not against the specification's


class DeadNeurons(Case):
    """A case in which some neurons of every head have no weights, so that their relus read exact zeros."""

    @cached_property
    def params(self) -> Params:
        weights = Params(*(weight.copy() for weight in super().params))
        weights.encoder[:, :, 0] = weights.encoder_v[:, :, 1] = 0
        return weights


PLAIN = Case(CONFIGS["plain"], 2, 6, 1, 5.0)
CASES = (
    Case(CONFIGS["three_heads"], 2, 6, 2, 20.0),
    replace(PLAIN, scale=1.0),
    Case(CONFIGS["square_head"], 2, 5, 4, 10.0, weights="mixed"),
    replace(PLAIN, weights="ties"),
)
# What shows itself elsewhere only: codes beyond 6, exact zeros before a relu, logits beyond the range of exp, logits that are
# all equal, texts longer than what the specification reads at once.
SPECIAL = {
    "logits": (replace(PLAIN, scale=200.0),),
    "traces": (replace(PLAIN, scale=200.0),),
    "decode": (replace(PLAIN, scale=200.0), Case(CONFIGS["one_layer"], 1, 260, 1, 5.0)),
    "gradients": (DeadNeurons(CONFIGS["plain"], 2, 6, 1, 20.0),),
    "loss": (replace(PLAIN, scale=1e5),),
    "sampling": (replace(PLAIN, scale=0.0),),
}


def observe_dropout(port: Model, case: Case) -> Observed:
    """Training draw for draw: a mistake draws from the specification's generator, and it alone does."""
    optimizer = port.optimizer(AdamW(learning_rate=1e-2, seed=3))
    losses = [port.train_step(optimizer, case.tokens, case.targets) for _ in range(3)]
    return {"losses": np.array(losses), "logits": port.forward(case.tokens), **port.params()._asdict()}


def observe_training(port: Model, case: Case) -> Observed:
    """The channel's observation, and a step whose gradients are too small to be clipped."""
    seen = CHANNELS["training"].observe(port, case)
    return (
        seen
        | {"unclipped": np.array(port.train_step(port.optimizer(AdamW(clip=1e3)), case.tokens, case.targets))}
        | {f"unclipped.{name}": weight for name, weight in port.params()._asdict().items()}
    )


def observe_refusals(port: Model, case: Case) -> Observed:
    """The channel's observation, and refusals that it leaves out."""
    others_state = load(ORIGINS[port].backend, case, "float64").init_state(case.batch)
    misfit = RecurrentState(0, tuple(m[:, :, 2:] for m in model.init_state(case.batch, case.config).layers))
    extra: dict[str, Callable[[], object]] = {
        "others_state": lambda: port.advance(others_state, case.tokens),
        "misfit": lambda: port.import_state(misfit),
        "nan": lambda: port.generate(case.tokens, 1, temperature=float("nan")),
    }
    seen = CHANNELS["refusals"].observe(port, case) | {name: refusal(make) for name, make in extra.items()}
    return {name: said for name, said in seen.items() if not name.startswith("no_such")}  # these sentences name the port


OBSERVE: dict[str, Observe] = {name: channel.observe for name, channel in CHANNELS.items()}
OBSERVE |= {
    "dropout": observe_dropout,
    "training": observe_training,
    "refusals": observe_refusals,
}


@cache
def prepared(channel: str) -> list[Case]:
    """The cases on which a channel is observed."""
    cases = CASES if channel == "dropout" else (CHANNELS[channel].prepare(case) for case in CASES)
    return [case for case in (*cases, *SPECIAL.get(channel, ())) if case is not None]


def observed(backend: Backend, channel: str, case: Case, dtype: str = "float64") -> Observed | None:
    """What a port shows, or None if it fails; on a case of its own, because mistakes write into anything."""
    own = replace(case)
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return OBSERVE[channel](load(backend, own, dtype), own)
    except Exception:  # noqa: BLE001  a mistake may fail in any way
        return None


@cache
def right(channel: str, case: Case) -> Observed:
    found = observed(NumpyBackend(), channel, case)
    assert found is not None
    return found


def differs(mistake: Mistake, channel: str, case: Case) -> bool:
    """Whether a mistake shows on a case, in float64."""
    found = observed(mistake.backend(), channel, case)
    if found is None or set(found) != set(right(channel, case)):
        return True
    if channel in PAIRS:
        return not all(np.array_equal(found[n], found[f"{n}.again"]) for n in found if f"{n}.again" in found)
    return any(apart(found[name], value) > FLOAT64 for name, value in right(channel, case).items())


def test_every_mistake_has_a_name_of_its_own_and_known_channels() -> None:
    assert len(MISTAKES) == sum(len(rule) for rule in RULES) >= 100
    assert {channel for m in MISTAKES.values() for channel in m.channels} == set(CHANNELS)
    assert len({(m.module, m.before, m.after) for m in MISTAKES.values()}) == len(MISTAKES)
    assert len({m.says for m in MISTAKES.values()}) == len(MISTAKES)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_shows_on_the_channels_that_it_names(name: str) -> None:
    mistake = MISTAKES[name]
    assert "\n" not in mistake.before + mistake.after
    for channel in mistake.channels:
        assert any(differs(mistake, channel, case) for case in prepared(channel)), f"{channel} does not see it"


def test_the_specification_itself_shows_nothing() -> None:
    assert not any(differs(SPECIFICATION, channel, case) for channel in CHANNELS for case in prepared(channel))


SPECIFICATION = Mistake("spec", "model", "EPS = 1e-5", "EPS = 1e-5 ", "nothing is wrong", ())


def test_a_change_names_one_place() -> None:
    with pytest.raises(ValueError, match=r"'return' stands \d+ times in bdh_spec/model.py: a change names one place"):
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
    assert type(loaded).__mro__[-3] is bdh_spec.Model
    donated = load(NumpyBackend(), PLAIN, "float32")
    given = donated.init_state(2)
    donated.advance(given, PLAIN.tokens, donate=True)
    with pytest.raises(bdh_spec.StateError):
        donated.advance(given, PLAIN.tokens)


UNNAMED = {"chunks_overlap"}  # texts of 260 tokens take long


@pytest.mark.parametrize("channel", ["logits", "decode", "gradients"])
def test_a_diagnosis_names_every_mistake_that_float32_shows(channel: str) -> None:
    pending = [m for m in MISTAKES.values() if channel in m.channels and m.name not in UNNAMED]
    for case in (case for case in prepared(channel) if case.time < 100):
        expected = CHANNELS[channel].expected(case, "float32")
        shown = {m: answer for m in pending if (answer := wrong_in_float32(m, channel, case, expected)) is not None}
        for mistake, answer in shown.items():
            others = [observed(mistake.backend(), channel, case, "float32") or {} for _ in range(RUNS)]
            named = diagnose(answer, OBSERVE[channel], case, "float32", "exact", expected, others=others)
            assert mistake in named[:3], f"{mistake.name} is taken for {[m.name for m in named]} on {case}"
        pending = [m for m in pending if m not in shown]
    assert not pending, f"no case shows {', '.join(m.name for m in pending)} in float32"


def wrong_in_float32(mistake: Mistake, channel: str, case: Case, expected: dict[str, Expectation]) -> Observed | None:
    """What a mistake answers in float32, if that is more than rounding."""
    answer = observed(mistake.backend(), channel, case, "float32")
    return answer if answer is not None and any(c.complaint for c in against(answer, expected)) else None


PLANTED = ("dropout_missing", "diagonal_kept", "gradient_of_sum", "logits_scaled")  # enough: a step of training takes long


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


def test_a_port_that_repeats_itself_is_taken_for_none_that_does_not() -> None:
    observe = CHANNELS["determinism"].observe
    answers = repeated(lambda: observe(load(NumpyBackend(), PLAIN, "float32"), PLAIN))
    assert len(answers) == 2
    assert unsteady(answers) == set()
    assert diagnose(answers[0], observe, PLAIN, others=answers[1:]) == []
    trembling = [answers[0], answers[0] | {"gradients.embed": answers[0]["logits"]}]
    assert unsteady(trembling) == {"gradients.embed"}
    assert diagnose(answers[0], observe, PLAIN, others=trembling[1:]) == [], "no known mistake makes one gradient tremble"


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
    """It differs from the specification in some bit, or in what it declares."""
    port = LEGAL[name].backend()
    channels = ("traces", "decode", "gradients", "loss", "padding")
    runs = [(channel, case) for channel in channels for case in prepared(channel)[:2]]
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
        assert any(fails(hostile.backend(), channel, case) for case in CASES[:2]), f"{channel} lets it through"


def test_the_honest_port_is_not_taken_for_a_hostile_one() -> None:
    channels = {channel for hostile in HOSTILE.values() for channel in hostile.channels}
    assert not any(fails(NumpyBackend(), channel, case) for channel in channels for case in CASES[:2])


def fails(port: Backend, channel: str, case: Case) -> bool:
    """Whether a channel refuses a port, an error of the port's included."""
    own = CHANNELS[channel].prepare(replace(case))
    assert own is not None
    try:
        answer = CHANNELS[channel].observe(load(port, own, "float32"), own)
        return any(c.complaint for c in CHANNELS[channel].compare(answer, own, "float32"))
    except Exception:  # noqa: BLE001  so may a hostile port
        return True
