"""Texts of different lengths in one batch, padded on the left: each is read alone. A port may have this verb or not."""

from collections.abc import Callable

import numpy as np
import pytest

import bdh_spec
from bdh_conformance import assert_agrees, expect
from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_spec import CapabilityError, Model, model
from bdh_spec.numpy_backend import NumpyModel

Load = Callable[..., Model]
CASE = Case(CONFIGS["plain"], batch=3, time=6, seed=1, scale=20)
LENGTHS = (1, 6, 4)


def alone(params: bdh_spec.Params) -> dict[str, np.ndarray]:
    """The logits of each text by itself."""
    texts = (row[None, CASE.time - length :] for row, length in zip(CASE.tokens, LENGTHS, strict=True))
    return {f"text {b}": model.forward(text, params, CASE.config) for b, text in enumerate(texts)}


def test_a_padded_text_is_read_alone_or_not_at_all(port: str, loaded: Load) -> None:
    reader = loaded(CASE)
    if "padded" not in bdh_spec.get_backend(port).capabilities.verbs:
        with pytest.raises(CapabilityError, match=f"the {port} port has no padded: read each text by itself"):
            reader.forward_padded(CASE.tokens, LENGTHS)
        return
    logits = reader.forward_padded(CASE.tokens, LENGTHS)
    assert not any(logits[b, : CASE.time - length].any() for b, length in enumerate(LENGTHS))
    found = {f"text {b}": logits[b : b + 1, CASE.time - length :] for b, length in enumerate(LENGTHS)}
    assert_agrees(port, found, expect(alone, CASE.params, "float32"))


class Careless(NumpyModel):
    """Leaves in the padding what happens to be there."""

    def _forward_padded(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        logits = super()._forward_padded(tokens, lengths)
        logits[0, : tokens.shape[1] - lengths[0]] = np.nan
        return logits


def test_the_logits_of_padding_are_zero_whatever_the_port_leaves_there() -> None:
    careless = Careless(CASE.params, CASE.config, device="cpu", dtype="float32", phase="exact")
    logits = careless.forward_padded(CASE.tokens, np.array(LENGTHS, np.uint8))
    assert logits.dtype == np.float32
    assert not logits[0, :-1].any()
    assert np.array_equal(logits[:1, -1:], careless.forward(CASE.tokens[:1, -1:]))
