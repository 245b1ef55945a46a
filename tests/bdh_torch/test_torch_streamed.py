"""The streamed kernel: the same function as the plain one, whatever the blocks, chunks and pieces it is cut into."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from bdh_conformance.outcomes import BAD
from bdh_conformance.plan import TIERS, plan
from bdh_conformance.runner import Run
from bdh_conformance.yardstick.agreement import assert_agrees
from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.tolerances import FLOAT64, Expectation
from bdh_spec import Backend, BDHConfig, ConfigError, get_backend
from bdh_spec.rope import PHASES, Phase
from bdh_torch import BDH, attention, forms, streamed
from bdh_torch.backend import PlainTorchBackend, StreamedTorchBackend
from bdh_torch.forms import Attention, Kernel
from bdh_torch.layer import Weights, layer_norm
from bdh_torch.rope import relative
from bdh_torch.streamed import gated

# Texts and neurons on both sides of what is worked on at once below: chunks of 8, 64 neurons, scores of 3 rows.
SHAPES = {
    "within_a_chunk": Case(BDHConfig(2, 6, 0.0, 2, 8, 11), 3, 5, seed=1, scale=10),
    "a_chunk": Case(BDHConfig(2, 6, 0.0, 2, 8, 11), 2, 8, seed=2, scale=10),
    "ragged_chunks": Case(BDHConfig(2, 6, 0.0, 2, 8, 11), 2, 37, seed=3, scale=10),
    "whole_chunks": Case(BDHConfig(2, 6, 0.0, 3, 8, 11), 1, 32, seed=4, scale=10),
    "ragged_blocks": Case(BDHConfig(2, 5, 0.0, 3, 90, 7), 2, 19, seed=5, scale=10),
    "many_texts": Case(BDHConfig(3, 4, 0.0, 1, 33, 7), 23, 3, seed=6, scale=10),
    "one_token": Case(BDHConfig(2, 6, 0.0, 2, 8, 11), 2, 1, seed=7, scale=10),
}
SPACING = 2.0**-8  # of bfloat16
each_shape = pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which the smallest models are cut everywhere."""
    for module, sizes in (
        (forms, {"CHUNK": 8, "CHUNK_NARROW": 8, "WHOLE_STREAMED": 0, "WHOLE_STREAMED_NARROW": 0}),
        (forms, {"WHOLE": 0, "WHOLE_WITH_GRADIENTS": 0}),
        (streamed, {"BLOCK": 64, "TOGETHER": 16, "STEP": 3}),
    ):
        for name, size in sizes.items():
            monkeypatch.setattr(module, name, size)


def both(case: Case, phase: Phase = "exact") -> tuple[Any, Any]:
    """The streamed kernel and the specification in float64."""
    given = {"device": "cpu", "dtype": "float64", "phase": phase}
    return (
        StreamedTorchBackend().load(case.params, case.config, **given),
        get_backend("numpy").load(case.params, case.config, **given),
    )


def agree(actual: dict[str, np.ndarray], reference: dict[str, np.ndarray], case: Case) -> None:
    assert_agrees("torch", actual, {name: Expectation(value, FLOAT64, FLOAT64) for name, value in reference.items()}, str(case))


@pytest.mark.parametrize("phase", PHASES)
@each_shape
def test_logits_are_the_specifications(case: Case, phase: Phase) -> None:
    port, reference = both(case, phase)
    agree({"logits": port.forward(case.tokens)}, {"logits": reference.forward(case.tokens)}, case)


@each_shape
def test_r15_every_gradient(case: Case) -> None:
    port, reference = both(case)
    (loss, slopes), (expected, reference_slopes) = (m.gradients(case.tokens, case.targets) for m in (port, reference))
    assert loss == pytest.approx(expected, rel=FLOAT64)
    agree(slopes._asdict(), reference_slopes._asdict(), case)


@pytest.mark.parametrize("donate", [True, False])
@each_shape
def test_r13_a_text_is_read_on_from_a_state(case: Case, donate: bool) -> None:
    port, reference = both(case)
    cut = case.time // 3
    pieces = [piece for piece in np.split(case.tokens, [cut, 2 * cut], axis=1) if piece.size]
    state, logits = port.init_state(case.batch), []
    for piece in pieces:
        before = port.export_state(state)
        part, after = port.advance(state, piece, donate=donate)
        if not donate:
            assert all(np.array_equal(a, b) for a, b in zip(before.layers, port.export_state(state).layers, strict=True))
        logits, state = [*logits, part], after
    _, expected = reference.advance(reference.init_state(case.batch), case.tokens)
    actual = {f"layers.{i}": memory for i, memory in enumerate(port.export_state(state).layers)}
    wanted = {f"layers.{i}": memory for i, memory in enumerate(reference.export_state(expected).layers)}
    agree({"logits": np.concatenate(logits, axis=1), **actual}, {"logits": reference.forward(case.tokens), **wanted}, case)


@pytest.mark.parametrize("start", [10**6, 2**40, 2**63 - 40])
def test_r4_chunks_far_into_a_text_are_turned_on_exactly(start: int) -> None:
    case = SHAPES["ragged_chunks"]
    port, reference = both(case)
    _, state = reference.advance(reference.init_state(2), case.tokens[:, :5])
    far = type(reference.export_state(state))(start, reference.export_state(state).layers)
    actual, expected = (m.advance(m.import_state(far), case.tokens)[0] for m in (port, reference))
    agree({"logits": actual}, {"logits": expected}, case)


def layer_of(case: Case) -> tuple[Tensor, Weights, Any]:
    model = StreamedTorchBackend().load(case.params, case.config, device="cpu", dtype="float64").module
    with torch.no_grad():
        x = layer_norm(model.embed(torch.tensor(case.tokens)))
    return x, model.weights, relative(0, case.time, 8, model.attn.fixed, torch.float64, "exact")


@each_shape
def test_r8_what_is_dropped_is_the_same_in_the_gradient(case: Case) -> None:
    """The slope along a random direction against a central difference, with the same seed and so the same mask."""
    x, weights, rotations = layer_of(case)
    rng = torch.Generator().manual_seed(5)
    away = torch.randn(x.shape, generator=rng, dtype=x.dtype)
    directions = [torch.randn(value.shape, generator=rng, dtype=x.dtype) for value in (x, *weights)]

    def value(step: float) -> Tensor:
        moved = [v.detach() + step * d for v, d in zip((x, *weights), directions, strict=True)]
        leaves = [leaf.requires_grad_() for leaf in moved]
        torch.manual_seed(11)
        out = (gated(leaves[0], Weights(*leaves[1:]), rotations, 8, dropout=0.4) * away).sum()
        if step == 0:
            slopes = torch.autograd.grad(out, leaves)
            return sum((s * d).sum() for s, d in zip(slopes, directions, strict=True))  # type: ignore[return-value]
        return out.detach()

    step = 1e-7
    assert value(0.0).item() == pytest.approx(((value(step) - value(-step)) / (2 * step)).item(), rel=1e-4, abs=1e-5)


def test_r8_dropout_keeps_its_share_and_drops_otherwise_for_each_head_and_chunk() -> None:
    masks = [
        streamed._Dropout(0.25, seed).mask((64, 64), torch.zeros(()), head, row)
        for seed in (1, 2)
        for head in (0, 1)
        for row in (0, 8)
    ]
    assert len({mask.numpy().tobytes() for mask in masks}) == 8
    kept = torch.stack(masks)
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert (kept > 0).double().mean().item() == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("kernel", get_args(Kernel))
@pytest.mark.parametrize("attention", get_args(Attention))
def test_every_form_by_its_name_computes_the_same(kernel: Kernel, attention: Attention) -> None:
    case = SHAPES["ragged_chunks"]
    reference, _ = both(case)
    model = BDH(case.config, kernel=kernel, attention=attention).double()
    model.load_state_dict(reference.module.state_dict())
    with torch.no_grad():
        logits, _ = model(torch.tensor(case.tokens))
    agree({"logits": logits.numpy()}, {"logits": both(case)[1].forward(case.tokens)}, case)


def test_a_form_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match="no form is named 'flash': there are plain, streamed"):
        BDH(BDHConfig(), kernel="flash")  # type: ignore[arg-type]  # it is no kernel


def test_autocast_streams_in_its_own_dtype() -> None:
    """As close to float64 as the plain kernel under autocast, and with slopes in the weights' own dtype."""
    case = SHAPES["ragged_blocks"]
    exact = torch.tensor(both(case)[1].forward(case.tokens))
    errors = {}
    for kernel in get_args(Kernel):
        model = BDH(case.config, kernel=kernel)
        model.load_state_dict({name: value.float() for name, value in both(case)[0].module.state_dict().items()})
        with torch.autocast("cpu", torch.bfloat16):
            logits, loss = model(torch.tensor(case.tokens), torch.tensor(case.targets))
        assert loss is not None
        loss.backward()
        assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in model.parameters())
        errors[kernel] = ((logits.double() - exact).norm() / exact.norm()).item()
    assert 1e-4 < errors["streamed"] < 2 * errors["plain"]


@pytest.mark.parametrize("backend", [StreamedTorchBackend(), PlainTorchBackend()], ids=get_args(Kernel)[::-1])
def test_products_of_bfloat16_with_a_state_are_those_in_float32_but_for_their_rounding(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which the tests in float64 hold against the specification: the code is the same. A second layer would add its own."""
    case = Case(BDHConfig(1, 32, 0.0, 2, 8, 11), 2, 37, seed=3, scale=10)
    model = backend.load(case.params, case.config, device="cpu", dtype="bfloat16")

    def found() -> dict[str, np.ndarray]:
        _, slopes = model.gradients(case.tokens, case.targets)
        logits, state = model.advance(model.init_state(case.batch), case.tokens)
        memories = model.export_state(state).layers
        return {"logits": logits, **slopes._asdict(), **{f"layers.{i}": memory for i, memory in enumerate(memories)}}

    narrow = found()
    for module in (attention, streamed):
        monkeypatch.setattr(module, "of_products", lambda _, wide: wide)
    for name, exact in found().items():
        off = np.linalg.norm(narrow[name] - exact) / np.linalg.norm(exact)
        assert off < 3 * SPACING, name


def test_a_gradient_keeps_one_table_and_nothing_else_that_has_an_axis_of_neurons() -> None:
    """Of a layer x, attention and scores: the plain kernel keeps several tensors (h, T, N) of each."""
    config = BDHConfig(3, 8, 0.0, 2, 500, 11)
    kept: dict[str, dict[int, int]] = {}
    for kernel in get_args(Kernel):
        model, sizes = BDH(config, kernel=kernel), kept.setdefault(kernel, {})
        weights = {weight.data_ptr() for weight in model.parameters()}

        def pack(value: Tensor, sizes: dict[int, int] = sizes, weights: set[int] = weights) -> Tensor:
            if value.data_ptr() not in weights:
                sizes[value.data_ptr()] = value.numel()
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            model(torch.randint(11, (1, 8)), torch.randint(11, (1, 8)))
    of_a_layer = config.n_head * 8 * config.n_neurons
    assert sum(kept["plain"].values()) > 3 * 3 * of_a_layer
    assert sum(kept["streamed"].values()) < of_a_layer / 2


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_suite_finds_nothing(dtype: str) -> None:
    """The structured cases of the standard tier, which float64 above does not replace: rounding, states, training, orders."""
    run = Run(StreamedTorchBackend(), explains=False)
    standard = TIERS["standard"]
    results = [run.run(check) for check in plan(standard, run.backend.capabilities, dtypes=(dtype,)) if not check.reason]
    assert len(results) > 8
    assert [result.worst.message for result in results if result.status in BAD and result.worst] == []
