"""Rows that are packed with several texts: each is read as if it stood alone, by both forms and by both kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from bdh_conformance.yardstick.agreement import assert_agrees
from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_conformance.yardstick.tolerances import FLOAT64, expect
from bdh_spec.model import forward
from bdh_torch.forms import Kernel
from bdh_transformers import BDHForCausalLM, modeling_bdh
from bdh_transformers.texts_bdh import packed

Load = Callable[..., BDHForCausalLM]

CASE = Case(CONFIGS["three_heads"], time=11, seed=1, scale=10)
TOKENS = torch.from_numpy(CASE.tokens)  # 2 11
LENGTHS = ((3, 1, 5, 2), (4, 7))  # of the texts of each row
PIECES = [(row, piece) for row, lengths in enumerate(LENGTHS) for piece in torch.arange(11).split(lengths)]


def restarting(start: int = 0) -> Tensor:
    """Positions (2, 11) that begin with each text."""
    return torch.stack([torch.cat([start + torch.arange(n) for n in lengths]) for lengths in LENGTHS])


# What tells where texts begin: positions, as collators and TRL write them, boundaries for flash attention, numbers of texts.
BOUNDARIES: dict[str, dict[str, Tensor]] = {
    "position_ids": {"position_ids": restarting()},
    "position_ids from 2 on": {"position_ids": restarting(2)},
    "cu_seq_lens_q": {"cu_seq_lens_q": torch.tensor([0, 3, 4, 9, 11, 15, 22], dtype=torch.int32)},
    "seq_idx": {"seq_idx": torch.tensor([[0] * 3 + [1] + [2] * 5 + [3] * 2, [0] * 4 + [1] * 7], dtype=torch.int32)},
}


@pytest.fixture(params=["usual", "short"])
def _lengths(request: pytest.FixtureRequest) -> None:
    """Texts that are read whole, and the same in chunks."""
    if request.param == "short":
        request.getfixturevalue("short_chunks")


@pytest.fixture(params=["plain", "streamed"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    """The kernel under test, and a demand that it was used."""
    count, gated = [0], modeling_bdh.gated

    def counted(*args: Any, **options: Any) -> Tensor:
        count[0] += 1
        return gated(*args, **options)

    monkeypatch.setattr(modeling_bdh, "gated", counted)
    yield request.param
    assert bool(count[0]) is (request.param == "streamed")


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal to rounding in float64."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=FLOAT64 * expected.abs().max().item())


def alone(model: BDHForCausalLM, tokens: Tensor = TOKENS) -> Tensor:
    """Logits (2, 11, V) of texts that are read one by one."""
    logits = tokens.new_zeros(*tokens.shape, model.config.vocab_size, dtype=model.dtype)
    for row, piece in PIECES:
        logits[row, piece] = model(tokens[row : row + 1, piece], use_cache=False).logits[0]
    return logits


@pytest.mark.usefixtures("_lengths")
@pytest.mark.parametrize("given", BOUNDARIES.values(), ids=BOUNDARIES)
@torch.no_grad()
def test_texts_of_a_packed_row_are_read_as_if_alone(load: Load, form: str, kernel: Kernel, given: dict[str, Tensor]) -> None:
    model = load(CASE, form)
    model.backbone.kernel = kernel
    close(model(TOKENS, use_cache=False, **given).logits, alone(model))


@pytest.mark.usefixtures("_lengths")
@torch.no_grad()
def test_texts_of_a_packed_row_are_those_of_the_specification_in_float32(load: Load, form: str, kernel: Kernel) -> None:
    model = load(CASE, form, torch.float32)
    model.backbone.kernel = kernel
    logits = model(TOKENS, position_ids=restarting(), use_cache=False).logits
    for row, piece in PIECES:
        tokens = CASE.tokens[row : row + 1, piece.numpy()]
        expected = expect(lambda p, tokens=tokens: {"logits": forward(tokens, p, CASE.config)}, CASE.params, "float32")
        assert_agrees(f"transformers {form}", {"logits": logits[row, piece][None].numpy()}, expected, str(CASE))


@pytest.mark.usefixtures("_lengths")
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_of_packed_texts_are_those_of_the_texts_alone(
    load: Load, form: str, kernel: Kernel, checkpointed: bool
) -> None:
    model = load(CASE, form)
    model.backbone.kernel = kernel
    if checkpointed:
        model.train().activation_checkpointing_enable()
        for layer in model.backbone.layers:
            layer.drop.p = 0.0

    def slopes(logits: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), TOKENS.flatten()), list(model.parameters()))

    found = slopes(model(TOKENS, position_ids=restarting(), use_cache=False).logits)
    for actual, expected in zip(found, slopes(alone(model)), strict=True):
        close(actual, expected)


@pytest.mark.parametrize("given", BOUNDARIES.values(), ids=BOUNDARIES)
@torch.no_grad()
def test_r12_the_loss_of_packed_texts_is_the_mean_over_what_each_has_to_say(
    load: Load, form: str, given: dict[str, Tensor]
) -> None:
    model = load(CASE, form)
    said = [(alone(model)[row, piece[:-1]], TOKENS[row, piece[1:]]) for row, piece in PIECES]
    expected = F.cross_entropy(torch.cat([logits for logits, _ in said]), torch.cat([targets for _, targets in said]))
    assert model(TOKENS, labels=TOKENS, **given).loss.item() == pytest.approx(expected.item(), rel=1e-6)  # taken in float32


@pytest.mark.usefixtures("_lengths")
@torch.no_grad()
def test_a_cache_goes_on_with_the_last_text_of_each_row(load: Load, form: str) -> None:
    for each in ("plain", "streamed"):
        model = load(CASE, form)
        model.backbone.kernel = each
        more, last = TOKENS.flip(1)[:, :6], torch.tensor([[lengths[-1]] for lengths in LENGTHS])
        for given in ({}, {"position_ids": last + torch.arange(6)}):
            output = model(TOKENS, position_ids=restarting(), use_cache=True)
            close(output.logits, alone(model))
            rest = model(more, past_key_values=output.past_key_values, **given).logits
            for row, (n,) in enumerate(last.tolist()):
                text = torch.cat((TOKENS[row, -n:], more[row]))[None]
                close(rest[row], model(text, use_cache=False).logits[0, n:])


@pytest.mark.usefixtures("_lengths")
@torch.no_grad()
def test_the_first_text_of_a_row_goes_on_from_a_cache(load: Load, form: str) -> None:
    for each in ("plain", "streamed"):
        model = load(CASE, form)
        model.backbone.kernel = each
        cache = model(TOKENS.flip(1)[:, :6]).past_key_values
        positions = torch.tensor([[6, 7, 8, 0, 1, 2, 3, 4, 5, 6, 7]])
        logits = model(TOKENS, position_ids=positions, past_key_values=cache).logits
        whole = torch.cat((TOKENS.flip(1)[:, :6], TOKENS[:, :3]), dim=1)
        close(logits[:, :3], model(whole, use_cache=False).logits[:, 6:])
        close(logits[:, 3:], model(TOKENS[:, 3:], use_cache=False).logits)


@torch.no_grad()
def test_r5_no_score_is_shown_from_one_text_to_another(load: Load) -> None:
    model = load(CASE, "bdh_parallel")
    matrix = model(TOKENS, position_ids=restarting(), output_attentions=True).attentions[0]
    for row, piece in PIECES:
        own = model(TOKENS[row : row + 1, piece], output_attentions=True).attentions[0][0]
        close(matrix[row][:, piece][:, :, piece], own)
        matrix[row, :, piece[0] : piece[-1] + 1, piece[0] : piece[-1] + 1] = 0
    assert not matrix.any()


# Positions as transformers, its older versions and users derive them: where there is padding they stand still or start again.
HOLE = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1], [1] * 8 + [0] * 3])
PADDED = {
    "zero": (HOLE.cumsum(1) - 1).masked_fill(HOLE == 0, 0),
    "one": (HOLE.cumsum(1) - 1).masked_fill(HOLE == 0, 1),
    "still": (HOLE.cumsum(1) - 1).clamp(min=0),
}


@pytest.mark.parametrize("positions", PADDED.values(), ids=PADDED)
@torch.no_grad()
def test_padding_begins_no_text(load: Load, form: str, positions: Tensor) -> None:
    model = load(CASE, form)
    assert packed(TOKENS.shape, positions, HOLE != 0) is None
    logits = model(TOKENS, attention_mask=HOLE, position_ids=positions, use_cache=False).logits
    for row, kept in enumerate(HOLE.bool()):
        close(logits[row, kept], model(TOKENS[row, kept][None], use_cache=False).logits[0])


@torch.no_grad()
def test_packed_rows_may_be_padded(load: Load, form: str, kernel: Kernel) -> None:
    model, mask = load(CASE, form), torch.ones_like(TOKENS)
    model.backbone.kernel = kernel
    mask[:, 9:] = 0
    positions = restarting().masked_fill(mask == 0, 0)
    close(
        model(TOKENS, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, :9],
        model(TOKENS[:, :9], position_ids=positions[:, :9], use_cache=False).logits,
    )


@pytest.mark.parametrize("options", [{}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}], ids=["plain", "all"])
def test_trainer_learns_from_flattened_texts_what_it_learns_from_padded_ones(
    load: Load, tmp_path: Path, options: dict[str, bool]
) -> None:
    texts = [{"input_ids": TOKENS[row, piece].tolist()} for row, piece in PIECES if len(piece) > 1]
    model = load(CASE, "bdh_recurrent", torch.float32)
    arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True, per_device_eval_batch_size=8)
    flat = Trainer(model, arguments, data_collator=DataCollatorWithFlattening(**options)).evaluate(texts)["eval_loss"]
    said = [model(torch.tensor([text["input_ids"]])).logits[0, :-1] for text in texts]
    targets = torch.cat([torch.tensor(text["input_ids"][1:]) for text in texts])
    assert flat == pytest.approx(F.cross_entropy(torch.cat(said), targets).item(), rel=1e-6)


@pytest.mark.thorough  # the tracers take some seconds
@torch.no_grad()
def test_one_program_reads_packed_rows_and_others(load: Load, form: str) -> None:
    model = load(CASE, form)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    program = torch.export.export(model, (), {"input_ids": TOKENS, "position_ids": restarting(), "use_cache": False}).module()
    for positions in (restarting(), torch.arange(11).expand(2, -1).contiguous()):
        given = {"input_ids": TOKENS, "position_ids": positions, "use_cache": False}
        expected = model(**given).logits
        close(compiled(**given).logits, expected)
        close(program(**given).logits, expected)
        torch.compiler.set_stance("fail_on_recompile")
    torch.compiler.set_stance("default")
    torch.compiler.reset()
