"""What all tests of the face for transformers need: small models with given weights, in each form of attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bdh_conformance.yardstick.cases import Case
from bdh_spec import Params
from bdh_torch import forms
from bdh_transformers import BDHConfig, BDHForCausalLM

FORMS = ("bdh_recurrent", "bdh_parallel")

# What transformers marks its own tests with.
MARKERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "is_training_test",
    "slow",
    "torch_compile_test",
)


def pytest_configure(config: pytest.Config) -> None:
    """Know the markers of test_transformers_own_tests.py."""
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: of transformers")


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    """The form of attention under test."""
    return request.param


@pytest.fixture
def load() -> Callable[..., BDHForCausalLM]:
    """Make the model of a case, in evaluation: ``load(case, form, dtype)``."""
    return model_of


def model_of(case: Case, form: str, dtype: torch.dtype = torch.float64, **options: object) -> BDHForCausalLM:
    """A model with the case's weights."""
    model = BDHForCausalLM(BDHConfig.from_sizes(case.config, **options)).to(dtype).eval()
    model.set_attn_implementation(form)
    for weight, value in zip(weights_of(model), case.params, strict=True):
        weight.data.copy_(torch.from_numpy(value))
    return model


def weights_of(model: BDHForCausalLM) -> Params:
    """Views of the five weights, in the order and the shapes of the specification."""
    body = model.backbone
    return Params(body.embed.weight, body.encoder, body.encoder_v, body.decoder, model.lm_head.weight.T)


@pytest.fixture
def weights() -> Callable[[BDHForCausalLM], Params]:
    """Views of a model's five weights."""
    return weights_of


@pytest.fixture
def gradients() -> Callable[[BDHForCausalLM], dict[str, Tensor]]:
    """The slopes that a backward pass has left, by the specification's names."""

    def by_name(model: BDHForCausalLM) -> dict[str, Tensor]:
        body = model.backbone
        given = (body.embed.weight, body.encoder, body.encoder_v, body.decoder)
        return Params(*(weight.grad for weight in given), model.lm_head.weight.grad.T)._asdict()

    return by_name


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths at which small texts already are long, the last chunk ragged."""
    for name in ("CHUNK", "CHUNK_NARROW"):
        monkeypatch.setattr(forms, name, 4)
    for name in ("WHOLE", "WHOLE_WITH_GRADIENTS", "WHOLE_STREAMED", "WHOLE_STREAMED_NARROW"):
        monkeypatch.setattr(forms, name, 0)
