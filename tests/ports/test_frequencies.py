"""Models that bring frequencies of their own, on every port that claims them: each computes by its table, which stays."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

import bdh_spec
from bdh_conformance import assert_agrees, expect
from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_conformance.yardstick.tolerances import error
from bdh_spec import AdamW, Frequencies, Model, Params, RecurrentState, model
from bdh_spec.gradients import gradients
from bdh_spec.rope import Phase, frequencies

Load = Callable[..., Model]
CASES = {freqs: Case(CONFIGS["three_heads"], 3, 6, seed=1, scale=20, freqs=freqs) for freqs in ("trained", "paired")}
N = CASES["trained"].config.n_neurons


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def decoded(reader: Model, case: Case, start: int = 0) -> np.ndarray:
    """The logits of a text read in pieces, of which the first begins at a position."""
    empty = reader.export_state(reader.init_state(case.batch))
    state, logits = reader.import_state(RecurrentState(start, empty.layers)), []
    for piece in np.split(case.tokens, [2, 3, 4], axis=1):
        part, state = reader.advance(state, piece, donate=True)
        logits.append(part)
    return np.concatenate(logits, axis=1)


@pytest.mark.parametrize("phase", ["exact", "float32"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_r4_a_port_computes_by_the_table_of_the_model(
    port: str, loaded: Load, claims: Callable[[str], None], case: Case, dtype: str, phase: Phase
) -> None:
    claims(dtype)
    starts = (0, 70_001, 2**40 + 3) if phase == "exact" else (0, 70_001)

    def by_specification(params: Params) -> dict[str, np.ndarray]:
        def later(start: int) -> np.ndarray:
            empty = replace(model.init_state(case.batch, case.config, params.embed.dtype), position=start)
            return model.advance(empty, case.tokens, params, case.config, phase=phase)[0]

        logits = model.forward(case.tokens, params, case.config, phase=phase)
        return {"forward": logits} | {f"decoded at {start}": later(start) for start in starts}

    reader = loaded(case, dtype, phase)
    found = {"forward": reader.forward(case.tokens)}
    found |= {f"decoded at {start}": decoded(reader, case, start) for start in starts}
    assert_agrees(port, found, expect(by_specification, case.params, dtype))
    published = model.forward(case.tokens, case.params, replace(case.config, freqs=None), phase=phase)
    assert error(found["forward"], published) > 0.01


def test_r15_slopes_go_back_the_way_they_came(port: str, loaded: Load, case: Case) -> None:
    _, expected = gradients(case.tokens, case.targets, case.params, case.config)
    value, slopes = loaded(case, "float64").gradients(case.tokens, case.targets)
    assert value == pytest.approx(model.loss(model.forward(case.tokens, case.params, case.config), case.targets), rel=1e-12)
    assert all(error(slope, wanted) < 1e-10 for slope, wanted in zip(slopes, expected, strict=True))


def test_r15_the_table_is_never_trained(port: str, case: Case) -> None:
    still = replace(case, config=replace(case.config, dropout=0.0))
    trained = bdh_spec.get_backend(port).load(still.params, still.config, device="cpu", dtype="float64")
    reference = bdh_spec.get_backend("numpy").load(still.params, still.config, dtype="float64")
    for one in (trained, reference):
        optimizer = one.optimizer(AdamW(learning_rate=0.01, eps=1e-3))
        for _ in range(2):
            one.train_step(optimizer, still.tokens, still.targets)
    assert trained.config == still.config
    assert error(trained.forward(still.tokens), reference.forward(still.tokens)) < 1e-9


@pytest.mark.parametrize("phase", ["exact", "float32"])
def test_a_padded_text_is_counted_from_its_own_first_token(port: str, loaded: Load, case: Case, phase: Phase) -> None:
    if "padded" not in bdh_spec.get_backend(port).capabilities.verbs:
        pytest.skip(f"not claimed: {port} has no padded")
    if phase == "float32" and case.freqs == "paired":
        pytest.skip("phases in float32 change with an offset, and where an offset is legal a port may count from anywhere")
    lengths = (2, 6, 4)
    logits = loaded(case, "float64", phase).forward_padded(case.tokens, lengths)
    for b, length in enumerate(lengths):
        text = case.tokens[b : b + 1, case.time - length :]
        assert (
            error(logits[b : b + 1, case.time - length :], model.forward(text, case.params, case.config, phase=phase)) < 1e-10
        )


def test_a_text_longer_than_what_a_port_reads_at_once_is_one_text(port: str, loaded: Load) -> None:
    case = Case(replace(CONFIGS["one_layer"], n_embd=6), 1, 1100, seed=2, scale=20, freqs="trained")
    expected = expect(lambda p: {"logits": decoded_by_specification(case, p)}, case.params, "float32", runs=2)
    assert_agrees(port, {"logits": loaded(case).forward(case.tokens)}, expected)


def decoded_by_specification(case: Case, params: Params) -> np.ndarray:
    return model.advance(model.init_state(1, case.config, params.embed.dtype), case.tokens, params, case.config)[0]


def test_models_that_differ_in_their_tables_alone_do_not_meet(port: str) -> None:
    """Whatever a port keeps for a configuration, compiled programs or tables, belongs to one with that very table."""
    case, seen = CASES["trained"], []
    tables = [None, case.config.freqs, Frequencies(frequencies(N)), Frequencies(-case.config.freqs.array)]
    for table in (*tables, *tables):
        config = replace(case.config, freqs=table)
        reader = bdh_spec.get_backend(port).load(case.params, config, device="cpu")
        seen.append(reader.forward(case.tokens))
        assert error(seen[-1], model.forward(case.tokens, case.params, config)) < 1e-4
    assert all(np.array_equal(a, b) for a, b in zip(seen[:4], seen[4:], strict=True))
    assert np.array_equal(seen[0], seen[2])
    assert min(error(seen[i], seen[j]) for i, j in ((0, 1), (0, 3), (1, 3))) > 1e-2
