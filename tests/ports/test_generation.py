"""R14: one seed, one text, on every port."""

import pydoc_data.topics
from collections.abc import Callable

import numpy as np
import pytest

import bdh_spec
from bdh_conformance.channels.sampling import differences
from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_conformance.yardstick.tolerances import FACTOR
from bdh_spec import Model
from bdh_spec.sampling import Sampling

Load = Callable[..., Model]
CASE = Case(CONFIGS["three_heads"], time=6, seed=1, scale=20)
NEW = 12


@pytest.mark.parametrize(("temperature", "top_k", "seed"), [(1.0, None, 7), (0.8, 3, 8), (2.0, 0, 2**64 - 1), (0.0, None, 0)])
def test_r14_one_seed_gives_one_text(port: str, loaded: Load, temperature: float, top_k: int | None, seed: int) -> None:
    reference = bdh_spec.get_backend("numpy").load(CASE.params, CASE.config, dtype="float64")
    expected = reference.generate(CASE.tokens, NEW, temperature, top_k, seed)
    written = loaded(CASE).generate(CASE.tokens, NEW, temperature, top_k, seed)
    assert np.array_equal(written, expected)
    assert np.array_equal(written[:, : CASE.time], CASE.tokens)
    assert written.shape == (2, CASE.time + NEW)


def test_r14_without_a_seed_every_text_is_a_new_one(port: str, loaded: Load) -> None:
    """On every port alike; tests/bdh_torch, tests/bdh_mlx and tests/bdh_jax hold it for the ports' own classes."""
    model = loaded(CASE)
    assert len({model.generate(CASE.tokens, 30, 3.0).tobytes() for _ in range(3)}) == 3
    streamed = {np.stack([token for token, _ in model.stream(CASE.tokens, 30, 3.0)]).tobytes() for _ in range(3)}
    assert len(streamed) == 3


def test_r14_rows_of_a_batch_draw_apart(port: str, loaded: Load) -> None:
    twice = np.repeat(CASE.tokens[:1], 2, axis=0)
    written = loaded(CASE).generate(twice, 30, temperature=3.0, seed=1)
    assert not np.array_equal(written[0], written[1])


def test_r14_a_text_goes_on_from_a_state_as_if_nothing_happened(port: str, loaded: Load) -> None:
    model = loaded(CASE)
    whole = list(model.stream(CASE.tokens, NEW, seed=3))
    half = list(model.stream(CASE.tokens, NEW // 2, seed=3))
    token, state = half[-1]
    rest = list(model.stream(token[:, None], NEW - NEW // 2, seed=3, state=state))
    assert [t.tolist() for t, _ in whole] == [t.tolist() for t, _ in half + rest]


def test_text_in_bytes_out(port: str, loaded: Load) -> None:
    case = Case(bdh_spec.BDHConfig(n_layer=1, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4), scale=20)
    written = loaded(case).generate("né", 5, seed=1)
    assert written[:3] == "né".encode()
    assert len(written) == 8


def test_r14_texts_part_only_where_a_draw_is_too_close_to_call(port: str) -> None:
    """On the embedded checkpoint, where probabilities are those of real text. README states a larger run of the same."""
    text = np.frombuffer("".join(pydoc_data.topics.topics.values()).encode(), np.uint8)
    prompts = np.stack([text[start : start + 8] for start in range(0, 16 * 997, 997)])
    reference = bdh_spec.load(backend="numpy", dtype="float64")
    found = differences(bdh_spec.load(backend=port, device="cpu"), reference, prompts, 40, Sampling(0.8, seed=5))
    assert len(found) <= 1
    assert all(d.gap <= FACTOR["float32"] * d.rounding for d in found)


def test_a_text_that_parts_for_another_reason_is_found() -> None:
    reference = bdh_spec.load(backend="numpy", dtype="float64")
    params = reference.params()
    shifted = params._replace(lm_head=params.lm_head * 1.01)
    port = bdh_spec.get_backend("numpy").load(shifted, reference.config)
    prompts = np.frombuffer(b"The dragon", np.uint8)[None].repeat(8, axis=0)
    found = differences(port, reference, prompts, 40, Sampling(0.8, seed=5))
    assert any(d.gap > FACTOR["float32"] * d.rounding for d in found)
