"""What the tokens of one call see of one another and of earlier ones, in two forms that compute the same.

Axes: B batch, T time, h head (nh of them), N neurons per head, D embedding width; S all tokens so far.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from bdh_torch.attention import attend, without_padding
from bdh_torch.forms import is_read_whole, plain_chunk
from bdh_torch.layer import multiply
from bdh_transformers.cache_bdh import BDHStateLayer, attend_to_own
from bdh_transformers.rows_bdh import BDHStaticRowsLayer
from bdh_transformers.texts_bdh import Texts


class BDHRecurrentAttention:
    """One call's attention through a state of fixed size: all that is remembered, whatever the length of the text (R13).

    ``chunk`` is the number of tokens that are to be read at once; ``matrix`` there is none.
    """

    matrix: Tensor | None = None

    def __init__(
        self,
        n_head: int,
        layer_idx: int,
        T: int,
        D: int,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> None:
        self.memory: Any = None
        if past_key_values is not None:
            self.memory = past_key_values.layers[layer_idx]
        elif not is_read_whole(T, D):
            self.memory = BDHStateLayer(n_head)
        self.chunk = plain_chunk(T, is_whole=self.memory is None)

    def __call__(self, rotated: Tensor, v: Tensor, kept: Tensor | None = None, texts: Texts | None = None) -> Tensor:
        """Rotated neurons (h*B, T, N) and values (h*B, T, D) to attention (h*B, T, D).

        ``kept`` (B, T) is 0 at padding; ``texts`` are there where rows are packed with several.
        """
        v = v if kept is None else without_padding(v, kept)  # what has no value is seen by nobody
        if self.memory is None:
            return attend(rotated, v, None) if texts is None else attend_to_own(rotated, v, None, texts)
        return self.memory.read_and_write(rotated, v, texts)

    def finish(self, texts: Texts | None) -> None:
        """The last chunk was read."""


class BDHParallelAttention:
    """One call's attention to the rows of all earlier tokens: the last tokens can be taken back (R5).

    ``chunk`` is the number of tokens that are to be read at once; ``matrix`` (B, h, T, S) is there if it was asked for.
    """

    matrix: Tensor | None = None

    def __init__(
        self,
        n_head: int,
        layer_idx: int,
        T: int,
        D: int,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> None:
        self.n_head, self.layer_idx, self.past_key_values, self.shows = n_head, layer_idx, past_key_values, output_attentions
        is_long = not is_read_whole(T, D) and not output_attentions
        self.memory = remembered(n_head, past_key_values, layer_idx) if is_long else None
        self.chunk = plain_chunk(T, is_whole=self.memory is None)
        self.unkept: list[tuple[Tensor, Tensor]] = []  # rows of a long text that the cache is still to be given

    def __call__(self, rotated: Tensor, v: Tensor, kept: Tensor | None = None, texts: Texts | None = None) -> Tensor:
        """Rotated neurons (h*B, T, N) and values (h*B, T, D) to attention (h*B, T, D).

        ``kept`` (B, T) is 0 at padding; ``texts`` are there where rows are packed with several.
        """
        v = v if kept is None else without_padding(v, kept)  # what has no value is seen by nobody
        if self.memory is not None:  # time linear in the length also where rows are kept
            self.unkept += [] if self.past_key_values is None else [rows(rotated, v, self.n_head)]
            return self.memory.read_and_write(rotated, v, texts)
        if self.past_key_values is None and not self.shows:
            return attend(rotated, v, None) if texts is None else attend_to_own(rotated, v, None, texts)
        return self._attend_to_rows(rotated if kept is None or not self.shows else without_padding(rotated, kept), v, texts)

    def _attend_to_rows(self, rotated: Tensor, v: Tensor, texts: Texts | None) -> Tensor:
        queries, values = rows(rotated, v, self.n_head)  # B h T N, B 1 T D
        keys, (B, nh, T, _), at = queries, queries.shape, self._places(queries)
        if self.past_key_values is not None:
            keys, values = self.past_key_values.update(keys, values, self.layer_idx)  # B h S N, B 1 S D
        S, D = values.shape[2:]
        scores = queries @ keys.mT  # B h T S
        scores = scores.tril(S - T - 1) if at is None else multiply(scores, torch.arange(S, device=at.device) < at[:, None])
        if texts is not None:
            scores = multiply(scores, texts.seen(S, at)[:, None])
        attention = scores.view(B, nh * T, S) @ values[:, 0]  # B h*T D: all heads have the same values
        if texts is not None:
            self._forget_others(texts, at)
        self.matrix = scores if self.shows else None
        return attention.view(B, nh, T, D).transpose(0, 1).flatten(0, 1)

    def finish(self, texts: Texts | None) -> None:
        """The last chunk was read: rows go to the cache all at once, for it copies what it has whenever it is given more."""
        if self.past_key_values is not None and self.unkept:
            keys, values = (torch.cat(chunks, dim=2) for chunks in zip(*self.unkept, strict=True))
            at = self._places(keys)
            self.past_key_values.update(keys, values, self.layer_idx)
            if texts is not None:
                self._forget_others(texts, at)

    def _places(self, keys: Tensor) -> Tensor | None:
        """Where a cache of a fixed length will have these rows, (T); None where they will be its last."""
        layers = [] if self.past_key_values is None else self.past_key_values.layers
        if len(layers) <= self.layer_idx or not isinstance(layers[self.layer_idx], BDHStaticRowsLayer):
            return None
        start = layers[self.layer_idx].get_seq_length()
        return start + torch.arange(keys.shape[2], device=keys.device)

    def _forget_others(self, texts: Texts, at: Tensor | None) -> None:
        """Take the values from cached rows of texts that have ended: only the last one of each row goes on."""
        if self.past_key_values is not None:
            layer = self.past_key_values.layers[self.layer_idx]
            kept = texts.remembered(layer.values.shape[2], at)[:, None, :, None]
            if at is None:
                layer.values = layer.values * kept
            else:
                layer.values.mul_(kept)  # in place, where a compiled program expects them


def rows(rotated: Tensor, v: Tensor, nh: int) -> tuple[Tensor, Tensor]:
    """What a cache keeps of tokens: rotated neurons (h*B, T, N) as (B, h, T, N), and values (B, 1, T, D), one for all heads."""
    return torch.unflatten(rotated, 0, (nh, -1)).transpose(0, 1), v[: len(v) // nh, None]


def remembered(n_head: int, past_key_values: Cache | None, layer_idx: int) -> BDHStateLayer:
    """A state for the length of one call, which remembers the rows that a cache has kept."""
    memory = BDHStateLayer(n_head)
    layers = [] if past_key_values is None else past_key_values.layers
    kept = layers[layer_idx] if len(layers) > layer_idx else None
    if kept is not None and kept.is_initialized and kept.keys.numel():  # rows that were not written yet are zero
        keys = kept.keys.transpose(0, 1).flatten(0, 1)  # h*B S N
        v = kept.values.transpose(0, 1).expand(n_head, -1, -1, -1).flatten(0, 1)  # h*B S D
        memory.remember(keys, v)
    return memory
