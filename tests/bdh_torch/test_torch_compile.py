"""torch.compile takes the whole of forward and of a training step, and takes it once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from bdh_conformance.yardstick.tolerances import FLOAT64
from bdh_spec.rope import PHASES, Phase
from bdh_torch import BDH, BDHConfig

# In this process: starting workers would take longer than compiling these few kernels.
whole = partial(torch.compile, fullgraph=True, options={"compile_threads": 1})

CONFIG = BDHConfig(n_layer=1, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=30)
TOKENS = torch.arange(60).view(2, 30).remainder(30)

pytestmark = [
    pytest.mark.thorough,  # the compilers take half a minute
    # Warnings of PyTorch about its own code.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch.compiler.reset()


def model(phase: Phase = "exact") -> BDH:
    torch.manual_seed(0)
    return BDH(CONFIG, phase=phase)


@pytest.mark.parametrize("phase", PHASES)
@torch.no_grad()
def test_forward_is_one_graph_and_computes_the_same(phase: Phase) -> None:
    eager = model(phase).double().eval()
    compiled = whole(eager)
    expected, _ = eager(TOKENS)
    torch.testing.assert_close(compiled(TOKENS)[0], expected, rtol=FLOAT64, atol=0)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(TOKENS.flip(1))


def step(compiled: Callable[..., tuple[Tensor, Tensor]]) -> float:
    _, loss = compiled(TOKENS, TOKENS)
    loss.backward()
    return loss.item()


def test_a_training_step_is_one_graph_and_drops() -> None:
    eager = model().train()
    compiled = whole(eager)
    losses = [step(compiled)]
    with torch.compiler.set_stance("fail_on_recompile"):
        losses.append(step(compiled))
    assert losses[0] != losses[1]
    assert all(weight.grad.isfinite().all() for weight in eager.parameters())


def test_r15_compiled_gradients_are_those_of_the_eager_form() -> None:
    eager = model().double().eval()
    weights = list(eager.parameters())
    expected = torch.autograd.grad(eager(TOKENS, TOKENS)[1], weights)
    actual = torch.autograd.grad(whole(eager)(TOKENS, TOKENS)[1], weights)
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=FLOAT64 * theirs.abs().max().item())
