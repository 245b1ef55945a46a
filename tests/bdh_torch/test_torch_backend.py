"""What only the torch port's adapter has to promise: it leaves PyTorch's global settings as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
import torch

from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_spec import AdamW, CapabilityError
from bdh_torch.backend import TorchBackend, TorchModel, full_precision

CASE = Case(CONFIGS["plain"])


@pytest.fixture
def port() -> TorchModel:
    return TorchBackend().load(CASE.params, CASE.config, device="cpu")


@pytest.fixture
def _tf32_allowed() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("_tf32_allowed")
def test_tf32_is_off_inside_a_verb_and_as_before_outside(port: TorchModel) -> None:
    seen = []
    port.module.drop.register_forward_hook(lambda *_: seen.append(torch.backends.cuda.matmul.fp32_precision))
    port.forward(CASE.tokens)
    port.gradients(CASE.tokens, CASE.targets)
    port.advance(port.init_state(2), CASE.tokens)
    port.loss(CASE.tokens, CASE.targets)
    port.trace(CASE.tokens)
    port.train_step(port.optimizer(AdamW()), CASE.tokens, CASE.targets)
    assert seen == ["ieee"] * 6 * CASE.config.n_layer
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.usefixtures("_tf32_allowed")
def test_tf32_is_off_until_the_last_of_several_threads_leaves() -> None:
    first, second = ExitStack(), ExitStack()
    for call in (first, second):
        call.enter_context(full_precision())
    first.close()
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    second.close()
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_no_verb_draws_from_pytorchs_generator() -> None:
    before = torch.get_rng_state()
    port = TorchBackend().load(CASE.params, CASE.config, device="cpu")
    port.train_step(port.optimizer(AdamW()), CASE.tokens, CASE.targets)
    port.generate(CASE.tokens, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_train_step_leaves_no_gradients_and_no_training_mode_behind(port: TorchModel) -> None:
    port.train_step(port.optimizer(AdamW()), CASE.tokens, CASE.targets)
    assert all(weight.grad is None for weight in port.module.parameters())
    assert not port.module.training


def test_params_that_were_given_or_handed_out_are_copies(port: TorchModel) -> None:
    given = [weight.copy() for weight in CASE.params]
    handed_out = port.params()
    kept = [weight.copy() for weight in handed_out]
    port.train_step(port.optimizer(AdamW()), CASE.tokens, CASE.targets)
    assert all(np.array_equal(a, b) for a, b in zip(CASE.params, given, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(handed_out, kept, strict=True))
    assert not np.array_equal(port.params().encoder, kept[1])


def test_the_gpu_of_a_mac_has_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchBackend, "devices", lambda self: ("mps", "cpu"))
    with pytest.raises(CapabilityError, match="no dtype 'float64' on mps"):
        TorchBackend().load(CASE.params, CASE.config, dtype="float64")
