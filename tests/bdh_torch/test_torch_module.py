"""What users of the original implementation meet: the module, its state dict, its generate."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bdh_spec
from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_conformance.yardstick.tolerances import FLOAT64
from bdh_spec import ParamsError, SamplingError, TokensError
from bdh_spec.rope import PHASES
from bdh_torch import BDH, BDHConfig

CONFIG = BDHConfig(n_layer=2, n_embd=8, n_head=3, mlp_internal_dim_multiplier=7, vocab_size=11)
TOKENS = torch.tensor([[10, 3, 3, 7, 0], [1, 2, 9, 4, 5]])


@pytest.fixture
def model() -> BDH:
    """A model with weights large enough for its logits to tell tokens apart."""
    torch.manual_seed(0)
    made = BDH(CONFIG)
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(20)
    return made


def test_r15_only_the_five_weights_are_trainable(model: BDH) -> None:
    assert {name for name, _ in model.named_parameters()} == {"encoder", "encoder_v", "decoder", "lm_head", "embed.weight"}


def test_fresh_weights_are_normal_with_standard_deviation_0_02() -> None:
    for weight in BDH(BDHConfig(n_layer=1, n_embd=64, n_head=2, mlp_internal_dim_multiplier=4)).parameters():
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert weight.mean().item() == pytest.approx(0, abs=0.002)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_state_dict_loads_strictly_into_the_original_and_back(plain: type[nn.Module], config: BDHConfig) -> None:
    ours, original = BDH(config), plain(config)
    shapes = {name: value.shape for name, value in original.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == shapes
    assert all(value.dtype == torch.float32 for value in ours.state_dict().values())
    original.load_state_dict(ours.state_dict(), strict=True)
    BDH(config).load_state_dict(original.state_dict(), strict=True)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_original_computes_the_same(plain: type[nn.Module], config: BDHConfig) -> None:
    case = Case(config, time=9)
    ours, original = BDH(config).double().eval(), plain(config).double().eval()
    original.load_state_dict(ours.state_dict())
    idx, targets = torch.tensor(case.tokens), torch.tensor(case.targets)
    for mine, theirs in zip(ours(idx, targets), original(idx, targets), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=FLOAT64, atol=FLOAT64)


def test_without_targets_there_is_no_loss(model: BDH) -> None:
    logits, loss = model(TOKENS)
    assert logits.shape == (2, 5, 11)
    assert loss is None


@pytest.mark.parametrize("phase", ["exact", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_r4_a_cast_of_the_model_changes_no_phase(phase: bdh_spec.rope.Phase, dtype: torch.dtype) -> None:
    model = BDH(CONFIG, phase=phase)
    positions = 10**6 + torch.arange(4)
    before = model.attn(positions, torch.float32)
    assert torch.equal(model.to(dtype).attn(positions, torch.float32), before)


def test_r4_phases_never_come_from_the_buffer(model: BDH) -> None:
    before, _ = model.eval()(TOKENS)
    model.attn.freqs.zero_()
    assert torch.equal(model(TOKENS)[0], before)


def test_frequencies_that_are_not_the_table_are_refused_before_anything_is_loaded(model: BDH) -> None:
    other = copy.deepcopy(model.state_dict())
    other["encoder"].zero_()
    other["attn.freqs"][..., 4] *= 1.001
    with pytest.raises(ParamsError, match=r"attn\.freqs\[4\] is .*1\.0e-03 of it off.*bdh-convert"):
        model.load_state_dict(other)
    assert model.encoder.any()


def test_frequencies_that_are_not_numbers_are_refused(model: BDH) -> None:
    other = copy.deepcopy(model.state_dict())
    other["attn.freqs"][..., 2] = torch.nan
    with pytest.raises(ParamsError, match=r"attn\.freqs\[2\] is nan"):
        model.load_state_dict(other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_frequencies_may_be_rounded_by_the_formula_and_by_a_cast(dtype: torch.dtype) -> None:
    config = BDHConfig(n_layer=1)
    n = config.n_neurons
    by_formula = 1 / (2**16) ** (torch.arange(n) // 2 * 2 / n) / (2 * torch.pi)
    with torch.device("meta"):
        model = BDH(config)
    state = dict.fromkeys(model.state_dict()) | model.state_dict() | {"attn.freqs": by_formula.to(dtype).view(1, 1, 1, n)}
    model.load_state_dict(state, assign=True)


@pytest.mark.parametrize("freqs", ["trained", "paired"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_model_of_its_own_frequencies_saves_and_loads_them_and_computes_by_them(
    plain: type[nn.Module], freqs: str, phase: bdh_spec.rope.Phase
) -> None:
    case = Case(CONFIG, 2, 9, freqs=freqs)
    ours, original = BDH(case.config, phase=phase).double().eval(), plain(CONFIG).double().eval()
    state = ours.state_dict()
    assert torch.equal(state["attn.freqs"].float().flatten(), torch.tensor(case.config.freqs.array))
    original.load_state_dict(state)
    original.attn.freqs = original.attn.freqs.float()
    idx = torch.tensor(case.tokens)
    torch.testing.assert_close(ours(idx)[0], original(idx)[0], rtol=1e-5, atol=1e-5)
    again = BDH(case.config, phase=phase)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):  # of the model that was saved
        again.load_state_dict(ours.to(dtype).state_dict())
    assert {name for name, _ in again.named_parameters()} == {name for name, _ in ours.named_parameters()}
    assert "attn.freqs" not in dict(again.named_parameters())


def test_frequencies_of_another_table_than_the_models_are_refused_with_what_is_possible() -> None:
    own, other = (Case(CONFIG, freqs=freqs).config for freqs in ("trained", "paired"))
    for config, state in ((CONFIG, BDH(own)), (own, BDH(CONFIG)), (own, BDH(other))):
        with pytest.raises(
            ParamsError, match=r"attn\.freqs\[\d+\] is .*freqs=bdh_spec\.Frequencies.*bdh-convert --freqs reset"
        ):
            BDH(config).load_state_dict(state.state_dict())
    state = BDH(own).state_dict()
    found = BDH(replace(CONFIG, freqs=bdh_spec.Frequencies(state["attn.freqs"])))  # as the sentence says
    found.load_state_dict(state)
    short = state | {"attn.freqs": state["attn.freqs"][..., :4]}
    with pytest.raises(ParamsError, match=r"attn\.freqs has 4 values, the model 18 neurons"):
        BDH(own).load_state_dict(short)


def test_missing_frequencies_are_torchs_own_affair(model: BDH) -> None:
    state = model.state_dict()
    del state["attn.freqs"]
    with pytest.raises(RuntimeError, match=r"attn\.freqs"):
        model.load_state_dict(state)
    model.load_state_dict(state, strict=False)


def test_a_model_built_without_memory_computes_once_it_is_loaded(model: BDH) -> None:
    with torch.device("meta"):
        empty, assigned = BDH(CONFIG), BDH(CONFIG)
    empty.to_empty(device="cpu").attn.fixed.zero_()  # what memory holds is anything
    empty.load_state_dict(model.state_dict())
    assigned.load_state_dict(model.state_dict(), assign=True)
    expected, _ = model.eval()(TOKENS)
    assert torch.equal(empty.eval()(TOKENS)[0], expected)
    assert torch.equal(assigned.eval()(TOKENS)[0], expected)


def test_a_model_built_without_memory_can_start_fresh() -> None:
    with torch.device("meta"):
        empty = BDH(CONFIG)
    empty.to_empty(device="cpu").attn.fixed.zero_()
    empty.reset_parameters()
    fresh = BDH(CONFIG)
    assert torch.equal(empty.attn.freqs, fresh.attn.freqs)
    assert torch.equal(empty.attn.fixed, fresh.attn.fixed)


def test_r8_dropout_acts_in_training_only(model: BDH) -> None:
    model.train()
    assert not torch.equal(model(TOKENS)[0], model(TOKENS)[0])
    model.eval()
    assert torch.equal(model(TOKENS)[0], model(TOKENS)[0])


def test_r8_dropout_acts_on_the_gated_neurons(model: BDH) -> None:
    kept: list[tuple[Tensor, Tensor]] = []
    model.drop.register_forward_hook(lambda _, given, result: kept.append((given[0], result)))
    model.train()(TOKENS)
    for gated, result in kept:
        assert gated.shape == (3, 10, CONFIG.n_neurons)
        assert (gated >= 0).all()
        scale = result[result > 0] / gated[result > 0]
        torch.testing.assert_close(scale, torch.full_like(scale, 1 / 0.9))
    assert len(kept) == CONFIG.n_layer


def test_generate_writes_what_forward_prefers(model: BDH) -> None:
    text = model.generate(TOKENS, 8, temperature=0)
    for length in range(5, 13):
        logits, _ = model.eval()(text[:, :length])
        assert torch.equal(text[:, length], logits[:, -1].argmax(-1))
    assert torch.equal(text[:, :5], TOKENS)


def test_generate_never_drops_and_restores_training(model: BDH) -> None:
    written = model.train().generate(TOKENS, 8, temperature=0)
    assert model.training
    assert model.drop.training
    assert torch.equal(written, model.eval().generate(TOKENS, 8, temperature=0))
    assert not model.training


def test_generate_restores_training_after_an_error(model: BDH) -> None:
    with torch.no_grad():
        model.lm_head.fill_(torch.nan)
    with pytest.raises(SamplingError, match="diverged"):
        model.train().generate(TOKENS, 1)
    assert model.training


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.7, 3), (1.5, 99)])
def test_r14_one_seed_gives_the_text_of_the_numpy_port(model: BDH, temperature: float, top_k: int | None) -> None:
    weights = (model.embed.weight, model.encoder, model.encoder_v, model.decoder, model.lm_head)
    params = bdh_spec.Params(*(weight.detach().numpy() for weight in weights))
    reference = bdh_spec.get_backend("numpy").load(params, CONFIG)
    expected = reference.generate(TOKENS.numpy(), 20, temperature, top_k, seed=7)
    assert np.array_equal(model.generate(TOKENS, 20, temperature, top_k, seed=7).numpy(), expected)


def test_without_a_seed_torchs_own_generator_decides(model: BDH) -> None:
    torch.manual_seed(3)
    first, second = model.generate(TOKENS, 20), model.generate(TOKENS, 20)
    torch.manual_seed(3)
    assert torch.equal(model.generate(TOKENS, 20), first)
    assert not torch.equal(first, second)


def test_generate_refuses_what_means_nothing(model: BDH) -> None:
    with pytest.raises(SamplingError, match="temperature"):
        model.generate(TOKENS, 1, temperature=-1)
    with pytest.raises(TokensError, match="token 11 at"):
        model.generate(torch.tensor([[11]]), 1)


@pytest.mark.parametrize("idx", [torch.zeros(3, dtype=torch.long), torch.zeros(1, 0, dtype=torch.long)])
def test_tokens_must_be_a_rectangle(model: BDH, idx: Tensor) -> None:
    with pytest.raises(TokensError, match="have shape"):
        model(idx)
    with pytest.raises(TokensError, match="have shape"):
        model.advance(model.init_state(1), idx)


def test_autocast_trains_and_streams_with_a_float32_state(model: BDH) -> None:
    expected, _ = model.eval()(TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(TOKENS, TOKENS)
        first, state = model.advance(model.init_state(2), TOKENS[:, :3])
        second, state = model.advance(state, TOKENS[:, 3:])
    loss.backward()
    assert all(memory.dtype == torch.float32 for memory in state.layers)
    for narrow in (logits, torch.cat((first, second), dim=1)):
        assert (narrow - expected).norm() < 0.05 * expected.norm()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())
