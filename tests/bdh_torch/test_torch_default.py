"""The kernel that a model reads by if nobody chooses: the streamed one where neurons are many, and nobody notices."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bdh_conformance.yardstick.agreement import assert_agrees
from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.tolerances import FLOAT64, Expectation
from bdh_spec import get_backend
from bdh_torch import BDH, BDHConfig, forms, streamed
from bdh_torch.backend import TorchBackend

CONFIG = BDHConfig(n_layer=2, n_embd=6, n_head=2, mlp_internal_dim_multiplier=24, vocab_size=11)
TOKENS = torch.arange(20).view(2, 10).remainder(11)
ROW = CONFIG.n_head * CONFIG.n_neurons * 8  # bytes of one token's neurons in float64


class Calls:
    """How often a layer was streamed."""

    def __init__(self) -> None:
        self.count = 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Thresholds at which 20 tokens are many, and what is streamed."""
    seen, gated = Calls(), streamed.gated

    def counted(*args: Any, **options: Any) -> Tensor:
        seen.count += 1
        return gated(*args, **options)

    monkeypatch.setattr(streamed, "gated", counted)
    monkeypatch.setattr(forms, "STREAMED", 20 * ROW)
    monkeypatch.setattr(forms, "STREAMED_WITH_GRADIENTS", 20 * ROW)
    monkeypatch.setattr(streamed, "BLOCK", 512)
    return seen


@pytest.fixture
def model() -> BDH:
    """A model of the default kernel, with weights large enough for its logits to tell tokens apart."""
    torch.manual_seed(0)
    made = BDH(CONFIG).double().eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(20)
    return made


def plainly(model: BDH) -> BDH:
    """The same weights, read by the plain kernel."""
    other = BDH(CONFIG, kernel="plain").to(model.encoder.dtype).train(model.training)
    other.load_state_dict(model.state_dict())
    return other


def same(actual: Tensor, expected: Tensor) -> None:
    """Equal to rounding in float64."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=FLOAT64 * expected.abs().max().item())


@pytest.mark.parametrize("T", [9, 10, 11])
@pytest.mark.parametrize("records", [False, True])
def test_texts_on_both_sides_of_the_threshold_are_the_specifications(calls: Calls, T: int, records: bool) -> None:
    case = Case(CONFIG, 2, T, seed=3, scale=10)
    given = {"device": "cpu", "dtype": "float64"}
    port, reference = TorchBackend().load(case.params, CONFIG, **given), get_backend("numpy").load(case.params, CONFIG, **given)
    if records:
        actual, expected = (m.gradients(case.tokens, case.targets)[1]._asdict() for m in (port, reference))
    else:
        actual, expected = ({"logits": m.forward(case.tokens)} for m in (port, reference))
    assert_agrees("torch", actual, {name: Expectation(value, FLOAT64, FLOAT64) for name, value in expected.items()}, str(case))
    assert (calls.count > 0) == (T >= 10)


@torch.no_grad()
def test_the_embedded_model_reads_a_short_text_plainly_and_the_default_size_streams() -> None:
    def reads(config: BDHConfig, T: int) -> bool:
        with torch.device("meta"):
            weights = BDH(config).weights
        on_cpu = weights._replace(encoder=nn.Parameter(torch.empty(1, 1, 1).expand(weights.encoder.shape)))
        return forms.streams(None, torch.empty(1, T, config.n_embd), on_cpu, nn.Dropout(0.1))

    embedded = BDHConfig(n_layer=4, n_embd=64, mlp_internal_dim_multiplier=32)
    assert [reads(embedded, T) for T in (1, 64, 256)] == [False] * 3
    assert [reads(BDHConfig(), T) for T in (1, 16, 128, 2048)] == [False, False, True, True]


@pytest.mark.parametrize("records", [False, True])
def test_a_wide_model_reads_longer_texts_by_scores_alone_than_a_narrow_one(records: bool) -> None:
    """Of the same number of neurons: what a state costs grows with the width, and what a score costs does not."""
    with torch.set_grad_enabled(records):
        longest = {D: max(T for T in range(2049) if forms.is_read_whole(T, D)) for D in (16, 256, 512)}
        chunks = {D: forms.chunk(1025, None, torch.empty(1, D, 1)) for D in (64, 512)}
        narrow = {D: forms.chunk(1025, None, torch.empty(1, D, 1, dtype=torch.bfloat16)) for D in (64, 512)}
    assert longest[16] == forms.CHUNK  # which is read whole whatever the width
    assert longest[512] == 2 * longest[256] > 2 * longest[16]
    assert chunks == {64: forms.CHUNK, 512: 1025}
    assert narrow == {64: forms.CHUNK_NARROW, 512: 1025}


def optimise(model: BDH) -> None:
    adam = torch.optim.AdamW(model.parameters(), lr=0.1)
    with torch.enable_grad():
        model(TOKENS, TOKENS)[1].backward()
    adam.step()


def load(model: BDH) -> None:
    model.load_state_dict({**model.state_dict(), **{name: 2 * w for name, w in model.named_parameters()}})


def assign(model: BDH) -> None:
    model.load_state_dict({name: value.clone() for name, value in BDH(CONFIG).double().state_dict().items()}, assign=True)


def edit(model: BDH) -> None:
    with torch.no_grad():
        model.encoder[0, 2].neg_()
        model.decoder[3:7] += 1
        model.encoder_v.mul_(0.5)


def edit_data(model: BDH) -> None:
    model.encoder.data[1] *= 3
    model.encoder_v.data.neg_()
    model.decoder.data = model.decoder.data.flip(0)


def edit_numpy(model: BDH) -> None:
    for weight in model.weights:
        array = weight.detach().numpy()
        array[...] = np.flip(array, -1).copy()


def cast(model: BDH) -> None:
    model.float().double()


@pytest.mark.parametrize(
    "change", [optimise, load, assign, edit, edit_data, edit_numpy, cast], ids=lambda change: change.__name__
)
def test_what_is_read_is_never_an_older_weight(calls: Calls, model: BDH, change: Callable[[BDH], None]) -> None:
    with torch.no_grad():
        before, _ = model(TOKENS)
        change(model)
        after, _ = model(TOKENS)
        streams, calls.count = calls.count, 0
        same(after, plainly(model)(TOKENS)[0])
    assert streams >= 2 * CONFIG.n_layer
    assert calls.count == 0
    assert not torch.equal(before, after)


def test_a_narrow_copy_of_the_weights_is_read_after_a_cast(calls: Calls, model: BDH) -> None:
    with torch.no_grad():
        expected, _ = model(TOKENS)
        narrow, _ = model.bfloat16()(TOKENS)
    assert narrow.dtype == torch.bfloat16
    assert calls.count >= CONFIG.n_layer  # rows of two bytes are fewer bytes: the second reading may be plain
    assert (narrow - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("records", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_without_gradients(calls: Calls, model: BDH, records: Callable[[], torch.no_grad]) -> None:
    expected, _ = model(TOKENS)
    with records():
        logits, _ = model(TOKENS)
    assert not logits.requires_grad
    same(logits, expected.detach())
    assert calls.count == 2 * CONFIG.n_layer


def test_copies_and_files_of_a_model_are_the_model(calls: Calls, model: BDH) -> None:
    expected, _ = model(TOKENS)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        same(other(TOKENS)[0], expected)
        assert list(other.state_dict()) == list(BDH(CONFIG, kernel="plain").state_dict())
    assert calls.count == 3 * CONFIG.n_layer


def slopes(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients at hand, which are then forgotten."""
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


def test_r15_gradients_of_parts_add_up(calls: Calls, model: BDH) -> None:
    many = torch.cat((TOKENS, TOKENS.flip(1)))
    model(many, many)[1].backward()
    whole = slopes(model)
    for part in many.split(2):
        (model(part, part)[1] / 2).backward()
    parts = slopes(model)
    assert calls.count == 3 * CONFIG.n_layer
    for name, slope in whole.items():
        same(parts[name], slope)


@pytest.mark.parametrize("reentrant", [True, False])
def test_r8_activations_that_are_computed_again_drop_the_same(calls: Calls, model: BDH, reentrant: bool) -> None:
    model.train()
    leaf = torch.zeros((), requires_grad=True)  # a reentrant checkpoint wants an input that has a gradient

    def loss(_: Tensor) -> Tensor:
        value: Tensor = model(TOKENS, TOKENS)[1]
        return value

    found = []
    for again in (False, True):
        torch.manual_seed(7)
        value = checkpoint(loss, leaf, use_reentrant=reentrant) if again else loss(leaf)
        value.backward()
        found.append(slopes(model))
    assert calls.count == 3 * CONFIG.n_layer
    for name, slope in found[0].items():
        same(found[1][name], slope)


def test_r8_one_seed_of_torch_gives_one_mask_and_another_another(calls: Calls, model: BDH) -> None:
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model.train()(TOKENS, TOKENS)[1].item())
    assert losses[0] == losses[1] != losses[2]
    assert calls.count == 3 * CONFIG.n_layer


def test_r8_all_may_be_dropped(calls: Calls, model: BDH) -> None:
    model.train().drop.p = 1.0
    logits, _ = model(TOKENS)
    same(logits, plainly_dropping_all(model)(TOKENS)[0])
    assert calls.count == CONFIG.n_layer


def plainly_dropping_all(model: BDH) -> BDH:
    other = plainly(model)
    other.drop.p = 1.0
    return other


def test_r8_a_dropout_that_is_watched_or_replaced_is_called(calls: Calls, model: BDH) -> None:
    seen: list[Tensor] = []
    handle = model.drop.register_forward_hook(lambda _, given, result: seen.append(result))
    model.train()(TOKENS)
    handle.remove()
    model.drop = nn.Identity()  # type: ignore[assignment]  # as users do, whatever its type
    same(model(TOKENS)[0], plainly(model.eval())(TOKENS)[0])
    assert len(seen) == CONFIG.n_layer
    assert calls.count == 0


@pytest.fixture
def weights(model: BDH) -> dict[str, Tensor]:
    """The five, detached, and the model in the default kernel."""
    return {name: weight.detach() for name, weight in model.named_parameters()}


def loss_of(model: BDH) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    def loss(weights: dict[str, Tensor], idx: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (idx[None], idx[None]))[1]

    return loss


def test_gradients_of_each_text_by_torch_func_are_read_plainly(calls: Calls, model: BDH, weights: dict[str, Tensor]) -> None:
    text = torch.arange(60).view(2, 30).remainder(11)  # each of them many
    each = torch.func.vmap(torch.func.grad(loss_of(model)), in_dims=(None, 0))(weights, text)
    assert calls.count == 0
    for b in range(2):
        model(text[b : b + 1], text[b : b + 1])[1].backward()
        for name, slope in slopes(model).items():
            same(each[name][b], slope)
    assert calls.count == 2 * CONFIG.n_layer


def test_second_derivatives_are_the_plain_kernels(calls: Calls, model: BDH) -> None:
    def curvature(of: BDH) -> Tensor:
        slope = torch.autograd.grad(of(TOKENS, TOKENS)[1], of.encoder, create_graph=True)[0]
        return torch.autograd.grad(slope.square().sum(), of.encoder)[0]

    with pytest.raises(NotImplementedError, match=r"first derivatives only.*kernel='plain'"):
        curvature(model)
    assert curvature(plainly(model)).isfinite().all()


def test_a_state_is_read_on_from_by_either_kernel(calls: Calls, model: BDH) -> None:
    text = torch.arange(72).view(2, 36).remainder(11)
    with torch.no_grad():
        expected = plainly(model)(text)[0]
        state, logits = model.init_state(2), []
        for piece in text.split([1, 12, 3, 19, 1], dim=1):
            part, state = model.advance(state, piece, donate=True)
            logits.append(part)
    same(torch.cat(logits, dim=1), expected)
    assert calls.count == 2 * CONFIG.n_layer
