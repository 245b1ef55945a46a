"""Every port computes what the specification says: logits, traces, losses, gradients, decoding, at any position."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from bdh_conformance import Expectation, assert_agrees, expect
from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_spec import Model, Params, RecurrentState, model
from bdh_spec.dtypes import DTYPES
from bdh_spec.gradients import gradients
from bdh_spec.rope import Phase

Load = Callable[..., Model]
# Fresh weights, where an eps or a score's scale shows, and large ones, where everything else does.
CASES = [Case(config, time=6, seed=i, scale=scale) for i, config in enumerate(CONFIGS.values()) for scale in (1.0, 20.0)]
POSITIONS = (0, 10**4, 10**6, 2**24 + 1, 2**40)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_stage_agrees(port: str, loaded: Load, claims: Callable[[str], None], case: Case, dtype: str) -> None:
    claims(dtype)
    expected = expect(lambda p: model.trace(case.tokens, p, case.config), case.params, dtype)
    traced = loaded(case, dtype).trace(case.tokens)
    assert list(traced) == list(expected)
    assert_agrees(port, traced, expected, f"{dtype} {case}")
    assert_agrees(port, {"logits": loaded(case, dtype).forward(case.tokens)}, {"logits": expected["logits"]}, f"{dtype} {case}")


@pytest.mark.parametrize("phase", ["exact", "float32"])
def test_r4_both_phases_agree_with_their_own_reference(port: str, loaded: Load, phase: Phase) -> None:
    case = Case(CONFIGS["plain"], time=6, seed=1, scale=20)
    start = 10**5
    expected = expect(lambda p: {"logits": read_at(start, p, case, phase)}, case.params, "float32")
    other = expect(
        lambda p: {"logits": read_at(start, p, case, "float32" if phase == "exact" else "exact")}, case.params, "float32"
    )
    logits = {"logits": port_reads_at(start, loaded(case, "float32", phase), case)}
    assert_agrees(port, logits, expected, f"{phase} phases at {start} {case}")
    with pytest.raises(AssertionError, match="worst row"):
        assert_agrees(port, logits, other)


@pytest.mark.parametrize("start", POSITIONS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_r4_exact_phases_at_long_positions(
    port: str, loaded: Load, claims: Callable[[str], None], start: int, dtype: str
) -> None:
    claims(dtype)
    case = Case(CONFIGS["three_heads"], time=6, seed=2, scale=20)
    expected = expect(lambda p: {"logits": read_at(start, p, case, "exact")}, case.params, dtype)
    assert_agrees(port, {"logits": port_reads_at(start, loaded(case, dtype), case)}, expected, f"{dtype} at {start} {case}")


def read_at(start: int, params: Params, case: Case, phase: Phase) -> np.ndarray:
    """The specification's logits of a text of which the first token stands at ``start``."""
    empty = model.init_state(case.batch, case.config, np.float64).layers
    return model.advance(RecurrentState(start, empty), case.tokens, params, case.config, phase=phase)[0]


def port_reads_at(start: int, port: Model, case: Case) -> np.ndarray:
    empty = model.init_state(case.batch, case.config).layers
    return port.advance(port.import_state(RecurrentState(start, empty)), case.tokens)[0]


@pytest.mark.parametrize("split", [(1,) * 6, (5, 1), (2, 3, 1), (6,), (1, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_r13_any_split_agrees_with_the_parallel_form(
    port: str, loaded: Load, claims: Callable[[str], None], split: tuple[int, ...], dtype: str
) -> None:
    claims(dtype)
    for config in ("plain", "three_heads"):
        case = Case(CONFIGS[config], time=6, seed=3, scale=20)

        def whole(params: Params, case: Case = case) -> dict[str, np.ndarray]:
            start = model.init_state(case.batch, case.config, np.float64)
            logits, state = model.advance(start, case.tokens, params, case.config)
            return {"logits": logits} | {f"layers.{i}.state": memory for i, memory in enumerate(state.layers)}

        expected = expect(whole, case.params, dtype)
        assert_agrees(port, decoded(loaded(case, dtype), case, split), expected, f"{dtype} split {split} {case}")


def decoded(port: Model, case: Case, split: tuple[int, ...], *, donate: bool = True) -> dict[str, np.ndarray]:
    """Logits of a text read in pieces, and the state after it."""
    state, logits = port.init_state(case.batch), []
    for end, length in zip(itertools.accumulate(split), split, strict=True):
        part, state = port.advance(state, case.tokens[:, end - length : end], donate=donate)
        logits.append(part)
    memories = port.export_state(state).layers
    assert state.position == case.time
    return {"logits": np.concatenate(logits, axis=1)} | {f"layers.{i}.state": memory for i, memory in enumerate(memories)}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_r15_every_gradient_agrees(port: str, loaded: Load, claims: Callable[[str], None], config: str, dtype: str) -> None:
    claims(dtype)
    case = Case(CONFIGS[config], time=6, seed=4, scale=20)

    def slopes(params: Params) -> dict[str, np.ndarray]:
        loss, slopes = gradients(case.tokens, case.targets, params, case.config)
        return {"loss": np.array(loss), **slopes._asdict()}

    loss, found = loaded(case, dtype).gradients(case.tokens, case.targets)
    expected = expect(slopes, case.params, dtype)
    actual = {"loss": np.array(loss), **found._asdict()}
    assert_agrees(port, actual, expected, f"{dtype} {case}")
    assert_agrees(port, {"loss": np.array(loaded(case, dtype).loss(case.tokens, case.targets))}, {"loss": expected["loss"]})


def test_a_run_equals_itself_and_leaves_its_inputs_alone(port: str, loaded: Load) -> None:
    case = Case(CONFIGS["plain"], time=6, seed=5, scale=20)
    tokens, weights = case.tokens.copy(), Params(*(w.copy() for w in case.params))
    first, second = (loaded(case).forward(tokens) for _ in range(2))
    assert np.array_equal(first, second)
    first[:] = 0
    assert np.array_equal(loaded(case).forward(tokens), second)
    assert np.array_equal(tokens, case.tokens)
    assert all(np.array_equal(a, b) for a, b in zip(weights, case.params, strict=True))


def test_params_are_the_weights_that_were_loaded(port: str, loaded: Load) -> None:
    case = Case(CONFIGS["three_heads"], seed=6)
    held = loaded(case).params()
    exact = {name: Expectation(w.astype(np.float32), 0.0, 0.0) for name, w in case.params._asdict().items()}
    assert_agrees(port, held._asdict(), exact)
    held.encoder[:] = 0
    assert loaded(case).params().encoder.any()
