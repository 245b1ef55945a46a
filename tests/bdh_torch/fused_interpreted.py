"""What test_torch_fused runs in a process of its own, in which Triton's interpreter takes the place of its compiler.

Tiles are 16 x 16, the smallest, and models just below, of and above one or two of them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bdh_conformance.yardstick.agreement import assert_agrees
from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.tolerances import FACTOR, FLOOR, Expectation, error, expect
from bdh_spec import BDHConfig
from bdh_spec import model as spec
from bdh_spec.gradients import gradients
from bdh_torch import BDH, forms, fused, fused_decode, layer, streamed
from bdh_torch.attention import without_padding
from bdh_torch.backend import StreamedTorchBackend, TorchBackend
from bdh_torch.rope import Rotary, relative

TILE = 16
DTYPES = ("float32", "bfloat16")
# Layers, D, heads, and neurons per head of D; texts and their tokens.
SHAPES = {
    "below a tile": Case(BDHConfig(1, 7, 0.0, 1, 2, 5), 1, 15, seed=1, scale=10),  # N 14
    "a tile": Case(BDHConfig(1, 16, 0.0, 2, 2, 5), 1, 16, seed=2, scale=10),  # N 16
    "above a tile": Case(BDHConfig(1, 17, 0.0, 1, 2, 5), 1, 17, seed=3, scale=10),  # N 34
    "texts across tiles": Case(BDHConfig(2, 4, 0.0, 2, 9, 5), 3, 6, seed=4, scale=10),  # N 18
    "chunks": Case(BDHConfig(1, 6, 0.0, 2, 6, 5), 2, 25, seed=5, scale=10),  # N 18, chunks of 12
}


@pytest.fixture(autouse=True, params=["in steps", "held"])
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which the smallest models are cut everywhere: two texts of a chunk at once.

    A left operand is read in steps and all scores by the kernel, or it is held for several tiles and scores are PyTorch's.
    """
    holds = request.param == "held"
    smallest = dict.fromkeys(fused.NARROW, fused.Tiles(TILE, TILE, 64 if holds else TILE, 4, 2))
    for name in ("NARROW", "STEPPED", "WIDE"):
        monkeypatch.setattr(fused, name, smallest)
    monkeypatch.setattr(fused, "PROGRAMS", 2 if holds else 512)
    monkeypatch.setattr(fused, "MANY", 1 if holds else 512)
    monkeypatch.setattr(fused, "STRIP", 7)
    monkeypatch.setattr(fused, "ROOM", 2 * 12 * 2 * 18 * 4)
    for name, size in {"CHUNK": 12, "CHUNK_NARROW": 12, "WHOLE_STREAMED": 2.5, "WHOLE_STREAMED_NARROW": 2.5}.items():
        monkeypatch.setattr(forms, name, size)


def loaded(case: Case, dtype: str) -> Any:
    return StreamedTorchBackend().load(case.params, case.config, device="cpu", dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_r15_loss_and_every_gradient(case: Case, dtype: str) -> None:
    def by_specification(params: Any) -> dict[str, Any]:
        loss, slopes = gradients(case.tokens, case.targets, params, case.config)
        return {"loss": np.reshape(loss, (1, 1)), **slopes._asdict()}

    loss, slopes = loaded(case, dtype).gradients(case.tokens, case.targets)
    actual = {"loss": np.full((1, 1), loss, np.float32), **slopes._asdict()}
    assert_agrees("torch", actual, expect(by_specification, case.params, dtype), str(case))


@pytest.mark.parametrize("dtype", DTYPES)
def test_r13_a_text_is_read_on_from_a_state(dtype: str) -> None:
    case = SHAPES["chunks"]
    model = loaded(case, dtype)
    state, logits = model.init_state(case.batch), []
    for piece in np.split(case.tokens, [1, 14], axis=1):
        part, state = model.advance(state, piece)
        logits.append(part)

    def by_specification(params: Any) -> dict[str, Any]:
        return {"logits": spec.forward(case.tokens, params, case.config)}

    actual = {"logits": np.concatenate(logits, axis=1)}
    assert_agrees("torch", actual, expect(by_specification, case.params, dtype), str(case))


@pytest.mark.parametrize("small_tiles", ["held"], indirect=True)  # as all operands are here
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["below a tile", "above a tile", "texts across tiles"])
def test_r13_a_text_is_read_token_by_token(shape: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = SHAPES[shape]
    sizes = {"TILE": 2 * TILE**2, "PIECES": 4, "ROWS": 2 * TILE, "PROGRAMS": 8}  # of which no head is one piece
    for name, size in sizes.items():
        monkeypatch.setattr(fused_decode, name, size)
    model = TorchBackend().load(case.params, case.config, device="cpu", dtype=dtype)
    logits, state = model.advance(model.init_state(case.batch), case.tokens[:, :2])
    rows = [logits]
    for token in np.split(case.tokens[:, 2:], case.time - 2, axis=1):
        given = state
        logits, state = model.advance(given, token, donate=bool(len(rows) % 3))
        if len(rows) % 3 == 0:  # what was not given away is as it was, and says the same again
            assert np.array_equal(model.advance(given, token)[0], logits)
        rows.append(logits)
    assert isinstance(state.native.layers, fused_decode.Steps)

    def by_specification(params: Any) -> dict[str, Any]:
        return {"logits": spec.forward(case.tokens, params, case.config)}

    assert_agrees("torch", {"logits": np.concatenate(rows, axis=1)}, expect(by_specification, case.params, dtype), str(case))


def mask_of(dropout: fused.Dropout, B: int, T: int, N: int, tile: int = TILE) -> Tensor:
    """The mask (2, B*T, N) of two heads: what the gate makes of ones."""
    ones, mask = torch.ones(2, B * T, N), torch.ones(2, B * T, N)
    programs = 2 * math.ceil(B * T / tile) * math.ceil(N / tile)
    tiles = fused.Tiles(tile, tile, TILE, 4, 2).options(1)
    fused.kernels.gate[(programs,)](
        ones[..., :1].contiguous(),
        ones[:, :1].contiguous(),
        mask,
        B * T,
        T,
        1,
        N,
        T,
        0,
        dropout.seed,
        dropout.p,
        dropout.scale,
        tile,
        True,
        **tiles,
    )
    return mask


def test_r8_the_mask_of_a_seed_depends_on_head_token_and_neuron_alone() -> None:
    masks = [mask_of(fused.Dropout(0.25, seed), 2, 20, 64, tile) for seed, tile in ((5, 16), (5, 64), (2**61, 64))]
    assert torch.equal(masks[0], masks[1])
    assert masks[0].unique().tolist() == pytest.approx([0, 1 / 0.75])
    kept = torch.stack(masks[1:]) > 0  # seeds h R N
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.015)
    rows = kept.flatten(0, 2)
    assert len({row.numpy().tobytes() for row in rows}) == len(rows)
    assert not (kept[..., 1:] == kept[..., :-1]).all(dim=(0, 1, 2)).any()


def test_r8_nothing_is_left_of_all_that_is_dropped() -> None:
    assert mask_of(fused.Dropout(1.0, 3), 1, 16, 16).eq(0).all()


@pytest.mark.parametrize("chunk", [21, 9])
def test_r8_a_gradient_drops_what_was_dropped_and_nobody_sees_padding(chunk: int) -> None:
    """A layer and its slopes as by the plain one with the same mask and padding."""
    B, T, D, h, N, p = 2, 21, 5, 2, 20, 0.4
    rng = torch.Generator().manual_seed(7)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    leaves, away = [layer.layer_norm(drawn(B, T, D)), drawn(h, D, N), drawn(h, D, N), drawn(h * N, D)], drawn(B, T, D)
    kept = torch.ones(B, T)
    kept[0, :4] = 0
    fixed = Rotary(BDHConfig(1, D, p, h, h * N // D, 5), "exact").fixed
    torch.manual_seed(11)
    mask = mask_of(fused.Dropout(p, int(torch.randint(2**62, ()))), B, T, N)

    def attend(rotated: Tensor, v: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(rotated, rotated.mT).tril(-1), without_padding(v, kept))

    def plainly(x: Tensor, weights: layer.Weights) -> Tensor:
        phases = torch.view_as_real(relative(0, T, T, fixed, x.dtype, "exact").local)
        return layer.gated(x, weights, phases, attend, lambda values: values * mask.to(values.dtype))

    def ours(x: Tensor, weights: layer.Weights) -> Tensor:
        torch.manual_seed(11)
        return streamed.gated(x, weights, relative(0, T, chunk, fixed, x.dtype, "exact"), chunk, dropout=p, kept=kept)

    def found(run: Any, dtype: torch.dtype) -> dict[str, np.ndarray]:
        given = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        out = run(given[0], layer.Weights(*given[1:]))
        slopes = torch.autograd.grad((out * away).sum(), given)
        names = ("decoded", "x", "encoder", "encoder_v", "decoder")
        return {name: value.detach().numpy() for name, value in zip(names, (out, *slopes), strict=True)}

    exact, honest = found(plainly, torch.float64), found(plainly, torch.float32)
    expected = {}
    for name, reference in exact.items():
        allowed = FACTOR["float32"] * max(float(np.max(error(honest[name], reference))), FLOOR)
        expected[name] = Expectation(reference, allowed, allowed)
    assert_agrees("torch", found(ours, torch.float32), expected)


def test_a_value_that_is_no_number_stays_one() -> None:
    case = SHAPES["a tile"]
    model = loaded(case, "float32")
    with torch.no_grad():
        model.module.encoder[0, 3, 4] = torch.nan
    assert np.isnan(model.forward(case.tokens)[:, 1:]).all()


def test_a_gradient_keeps_nothing_that_has_an_axis_of_neurons_but_the_table() -> None:
    model, sizes = BDH(BDHConfig(1, 4, 0.0, 2, 64, 5), kernel="streamed"), dict[int, int]()
    weights = {weight.data_ptr() for weight in model.parameters()}

    def pack(value: Tensor) -> Tensor:
        if value.data_ptr() not in weights and not value.is_complex():
            sizes[value.data_ptr()] = value.numel()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        model(torch.randint(5, (1, 8)), torch.randint(5, (1, 8)))
    assert max(sizes.values()) < 8 * model.config.n_neurons


def test_r15_a_slope_may_be_one_number_expanded() -> None:
    model = loaded(SHAPES["below a tile"], "float32").module
    x = torch.randn(1, 3, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()
    decoded = streamed.gated(x, model.weights, relative(0, 3, 3, model.attn.fixed, x.dtype, "exact"), 3)
    expanded, each = (torch.autograd.grad(value, x, retain_graph=True)[0] for value in (decoded.sum(), (decoded * 2).sum()))
    assert torch.equal(2 * expanded, each)


def test_a_second_derivative_is_refused() -> None:
    model = loaded(SHAPES["below a tile"], "float32").module
    _, loss = model(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.autograd.grad(loss, model.encoder, create_graph=True)
