"""torch.compile and torch.export take the whole of the model as transformers calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_conformance.yardstick.tolerances import FLOAT64
from bdh_transformers import BDHForCausalLM

Load = Callable[..., BDHForCausalLM]

CASE = Case(CONFIGS["one_layer"], time=11, seed=1, scale=10)
TOKENS = torch.from_numpy(CASE.tokens)  # 2 11
MASK = torch.ones_like(TOKENS).index_put((torch.tensor(0), torch.arange(3)), torch.tensor(0))  # the first text is shorter

pytestmark = [
    pytest.mark.thorough,  # the compilers take half a minute
    # Warnings of PyTorch about its own code.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def same(actual: Tensor, expected: Tensor) -> None:
    """Equal to rounding in float64."""
    torch.testing.assert_close(actual, expected, rtol=FLOAT64, atol=FLOAT64)


class Graphs:
    """A backend that runs each graph as it is, and counts them: quick where only the graphs matter."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        self.count += 1
        return graph.forward


@torch.no_grad()
def test_forward_is_one_graph_and_computes_the_same(load: Load, form: str) -> None:
    model = load(CASE, form)
    # In this process: starting workers would take longer than compiling these few kernels.
    compiled = torch.compile(model, fullgraph=True, options={"compile_threads": 1})
    same(compiled(TOKENS, attention_mask=MASK, use_cache=False).logits, model(TOKENS, attention_mask=MASK).logits)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(TOKENS.flip(1), attention_mask=MASK, use_cache=False)


@torch.no_grad()
def test_one_more_graph_serves_texts_of_all_lengths(load: Load, form: str) -> None:
    model, graphs = load(CASE, form), Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for T in (11, 2, 7, 5, 9):
        same(compiled(TOKENS[:, :T], use_cache=False).logits, model(TOKENS[:, :T]).logits)
    assert graphs.count == 2


@torch.no_grad()
def test_steps_on_a_cache_are_a_few_graphs_whatever_their_number(load: Load, form: str) -> None:
    model, graphs = load(CASE, form), Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    cache, logits, counts = model(TOKENS[:, :4]).past_key_values, [], []
    for token in TOKENS[:, 4:].split(1, dim=1):
        logits.append(compiled(token, past_key_values=cache).logits)
        counts.append(graphs.count)
    same(torch.cat(logits, dim=1), model(TOKENS).logits[:, 4:])
    assert counts[1:] == counts[1:2] * 6
    assert counts[1] <= 2


def test_a_training_step_is_one_graph_with_the_gradients_of_the_eager_form(load: Load, form: str) -> None:
    model = load(CASE, form)
    weights = list(model.parameters())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(model(TOKENS).logits.square().sum(), weights)
    actual = torch.autograd.grad(compiled(TOKENS, use_cache=False).logits.square().sum(), weights)
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=FLOAT64 * theirs.abs().max().item())


@torch.no_grad()
def test_an_exported_program_computes_the_same_for_other_sizes(load: Load, form: str) -> None:
    model = load(CASE, form)
    sizes = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    given = {"input_ids": TOKENS, "use_cache": False}
    program = torch.export.export(model, (), given, dynamic_shapes={"input_ids": sizes, "use_cache": None}).module()
    for tokens in (TOKENS, TOKENS.repeat(1, 2), TOKENS.repeat(2, 1)[:3, :7]):
        same(program(input_ids=tokens, use_cache=False).logits, model(tokens).logits)
