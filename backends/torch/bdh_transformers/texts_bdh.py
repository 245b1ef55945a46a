"""Where tokens stand, and which texts they belong to: several may be packed into a row, and padding may lie anywhere.

Axes: B batch, T the tokens of a call, S the tokens that a mask tells of, of which those of the call are the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.utils.import_utils import is_tracing


class Texts(NamedTuple):
    """The texts that rows are packed with. Each sees itself only, and the first also what was remembered before the call."""

    number: Tensor  # B T: the text of each token, counted from 0 in its row
    before: Tensor  # B: the text that is remembered of what came before these tokens

    def part(self, start: int, stop: int) -> Texts:
        """The same of the tokens from ``start`` to before ``stop``."""
        return Texts(self.number[:, start:stop], self.number[:, start - 1] if start else self.before)

    def seen(self, S: int, at: Tensor | None = None) -> Tensor:
        """Whether each token, (B, T), sees each of S rows, (B, T, S), as far as texts decide it.

        Its own are the last ones, or those ``at`` (T).
        """
        return self.number[:, :, None] == self._remembered_and_read(S, at)[:, None]

    def begins(self) -> Tensor:
        """Which tokens, (B, T), are the first of a text that stands behind another."""
        return pad(self.number.diff(dim=1) != 0, (1, 0))

    def going_on(self) -> Tensor:
        """Whether the text of each token, (B, T), is the one that is remembered."""
        return self.number == self.before[:, None]

    def remembered(self, S: int, at: Tensor | None = None) -> Tensor:
        """Which of S rows, (B, S), are of the text that goes on after these tokens, whose own are the last or those ``at``."""
        return self._remembered_and_read(S, at) == self.number[:, -1:]

    def _remembered_and_read(self, S: int, at: Tensor | None) -> Tensor:
        if at is not None:
            return self.before[:, None].repeat(1, S).index_copy(1, at, self.number)
        earlier = S - self.number.shape[1]
        return torch.cat((self.before[:, None].expand(-1, earlier), self.number), dim=1) if earlier else self.number


def packed(
    shape: Sequence[int],
    position_ids: Tensor | None,
    kept: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Texts | None:
    """The texts of rows of this shape (B, T); None where each row is one text.

    A text starts where ``position_ids`` (B or 1, T) do not go up, unless there is padding or nothing but padding before it;
    and where the boundaries of collators say so: ``cu_seq_lens_q`` counts tokens of all rows, ``seq_idx`` (B, T) texts.
    """
    B, T = shape
    if T == 1 or all(given is None for given in (position_ids, cu_seq_lens_q, seq_idx)):
        return None
    begins = torch.zeros((1, T - 1), dtype=torch.bool, device=_device(position_ids, seq_idx, cu_seq_lens_q))
    if position_ids is not None:
        begins = begins | _starts_again(position_ids.view(-1, T), None if kept is None else kept[:, -T:])
    if seq_idx is not None:
        begins = begins | (seq_idx.view(-1, T).diff(dim=1) != 0)
    if cu_seq_lens_q is not None:
        tokens = torch.arange(B * T, device=cu_seq_lens_q.device)
        begins = begins | torch.isin(tokens, cu_seq_lens_q).view(B, T)[:, 1:]
    # What a program that is traced will be given is not known yet: it is made for packed rows.
    if not is_tracing(begins) and not begins.any():
        return None
    number = pad(begins.expand(B, -1).long().cumsum(1), (1, 0))  # B T
    return Texts(number, torch.zeros_like(number[:, 0]))


def _device(*given: Tensor | None) -> torch.device:
    return next(each.device for each in given if each is not None)


def _starts_again(position_ids: Tensor, kept: Tensor | None) -> Tensor:
    """Which tokens but the first, (B, T-1), stand no further on than the one before, padding aside."""
    begins = position_ids.diff(dim=1) <= 0
    return begins if kept is None else begins & kept[:, 1:] & (kept.cumsum(1)[:, :-1] > 0)


def places(kept: Tensor, T: int, past: int | Tensor, start: int | Tensor) -> Tensor:
    """The positions (B, T) of the last T tokens of a mask (B, S): padding counts for none, wherever it lies.

    A mask that does not tell of all of the ``past`` tokens counts on from ``start``, where the next token stands.
    """
    if not isinstance(past, Tensor) and kept.shape[1] < past + T:
        return (start + kept[:, -T:].long().cumsum(1) - 1).clamp(min=0)
    return (kept.long().cumsum(1) - 1)[:, -T:].clamp(min=0)


def last_position(position_ids: Tensor, kept: Tensor | None) -> Tensor:
    """Where the last token of each text stands that is none of padding, (B, 1) or (1, 1)."""
    T = position_ids.shape[-1]
    position_ids = position_ids.view(-1, T)
    if kept is None:
        return position_ids[:, -1:]
    last = T - 1 - kept[:, -T:].flip(1).long().argmax(1, keepdim=True)  # B 1
    return position_ids.expand(len(kept), -1).gather(1, last)


def in_common(position_ids: Tensor, kept: Tensor | None, *, is_whole: bool) -> Tensor:
    """Positions (B, T), or those (T) that all texts of one row each can be read at with the same result.

    A text that is read as a whole, from its first token on, may stand anywhere; padding always may.
    """
    T = position_ids.shape[-1]
    offsets, is_one = spread(position_ids, kept)
    if is_tracing(offsets) or not is_one.all() or not (is_whole or (offsets == offsets[0]).all()):
        return position_ids
    return offsets[0] + torch.arange(T, device=position_ids.device)


def spread(position_ids: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """How far on each text (B) stands, and whether its tokens (B, T) stand there side by side, padding aside."""
    T = position_ids.shape[-1]
    offsets = position_ids.view(-1, T) - torch.arange(T, device=position_ids.device)  # B T
    if kept is None:
        return offsets[:, 0], (offsets == offsets[:, :1]).all(1)
    kept = kept[:, -T:]
    first = offsets.expand(len(kept), -1).gather(1, kept.long().argmax(1, keepdim=True))  # B 1
    return first[:, 0], ((offsets == first) | ~kept).all(1)
