"""Many texts written together: each may join and leave at any step, and reads and writes as if it were alone.

A token multiplies each weight once for all texts of a batch. What a text remembers is a state of fixed size in a cache of its
own (R13), so that to join or to leave moves nothing, texts need not be of one length, and nothing is padded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdh_spec.checks import check_tokens
from bdh_spec.errors import SamplingError
from bdh_spec.params import Array
from bdh_spec.sampling import Sampling, probabilities, sample, uniform
from bdh_torch.decode import Memory
from bdh_torch.forms import CHUNK
from bdh_torch.layer import wide
from bdh_transformers.cache_bdh import BDHCache, BDHStateLayer, PositionedCache, is_recurrent


@dataclass(frozen=True, eq=False)
class Text:
    """A text of a batch. To those outside it says which one a token belongs to, and how many tokens it has read."""

    how: Sampling
    top_p: float
    row: int
    cache: BDHCache = field(repr=False)
    pending: deque[int] = field(repr=False)  # what it has not read yet

    @property
    def length(self) -> int:
        """Tokens that were read: the position of the next draw (R14)."""
        return int(self.cache.get_seq_length())


class ContinuousBatch:
    """Texts that one model writes at once, a token of each in every step.

    ``model`` is a ``BDHForCausalLM`` in evaluation, in the form ``bdh_recurrent``. A step reads at most ``chunk`` tokens of
    prompts, some of each that waits in turn, so that a long one delays nobody by more than that. One thread at a time may ask.

    >>> from bdh_transformers import BDHConfig, BDHForCausalLM
    >>> batch = ContinuousBatch(BDHForCausalLM(BDHConfig(hidden_size=8, num_hidden_layers=1)).eval())
    >>> text = batch.join(b"The dragon", Sampling(0.8, top_k=50, seed=7))
    >>> [(which, token)] = batch.step()
    >>> which is text, 0 <= token < 256
    (True, True)
    >>> batch.leave(text)
    """

    def __init__(self, model: Any, *, chunk: int = CHUNK) -> None:
        if not is_recurrent(model.config):
            raise ValueError(
                f"a batch is of states, and {model.config._attn_implementation} keeps rows: call"
                " model.set_attn_implementation('bdh_recurrent')"
            )
        if model.training:
            raise ValueError("the model is in training mode, and text is written without dropout: call model.eval()")
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}: a step reads 1 or more tokens of prompts")
        self.model, self.chunk = model, chunk
        self.reading: deque[Text] = deque()  # their prompts
        self.writing: list[Text] = []

    def __len__(self) -> int:
        """How many texts there are."""
        return len(self.reading) + len(self.writing)

    def join(self, prompt: bytes | Sequence[int] | Array, how: Sampling, *, top_p: float = 1.0, row: int = 0) -> Text:
        """A text that begins with these tokens, of which each step from the next one on reads some, and then writes one more.

        One seed gives one text (R14): that of every port's ``generate``, at ``row`` 0, or of the row of its batch. ``top_p``,
        which is no part of R14, leaves of the ``top_k`` the least number of likeliest tokens that hold this share of their
        probability, and those as likely as the last of them. Bad tokens are a ``TokensError``, a bad share is a
        ``SamplingError``.
        """
        if not 0 <= top_p <= 1:
            raise SamplingError(f"top_p is {top_p}: it is a share of probability, from 0 to 1")
        tokens = check_tokens(np.array([list(prompt)] if len(prompt) else np.zeros((1, 0), int)), self.model.config.sizes)
        text = Text(how, top_p, row, BDHCache(self.model.config), deque(tokens[0].tolist()))
        self.reading.append(text)
        return text

    def leave(self, text: Text) -> None:
        """Take a text out, which frees what it remembers; nothing happens if it has left already."""
        for texts in (self.reading, self.writing):
            if text in texts:
                texts.remove(text)

    @torch.no_grad()
    def step(self) -> list[tuple[Text, int | SamplingError]]:
        """The next token of each text whose prompt was read.

        Where none can be drawn, because the model has diverged, there is the reason, and that text has left.
        """
        logits = list(self._write())
        logits += self._read()
        drawn = [(text, draw(text, row)) for text, row in logits]
        for text, token in drawn:
            if isinstance(token, SamplingError):
                self.leave(text)
            else:
                text.pending.append(token)
        return drawn

    def _write(self) -> Iterator[tuple[Text, Array]]:
        """Let all texts that are written read their last token: the logits (V) of each."""
        texts = tuple(self.writing)
        if texts:
            rows = self._logits([[text.pending.popleft()] for text in texts], texts)
            yield from zip(texts, rows, strict=True)

    def _read(self) -> Iterator[tuple[Text, Array]]:
        """Let texts read on in their prompts: the logits (V) of those that come to the end."""
        left = self.chunk
        while self.reading and left:
            text = self.reading.popleft()
            part = [text.pending.popleft() for _ in range(min(left, len(text.pending)))]
            left -= len(part)
            (row,) = self._logits([part], [text])
            if text.pending:
                self.reading.append(text)
            else:
                self.writing.append(text)
                yield text, row

    def _logits(self, tokens: list[list[int]], texts: Sequence[Text]) -> Array:
        """Logits (B, V) after tokens (B, T) of as many texts."""
        device = self.model.device
        positions = torch.tensor([[text.length + t for t in range(len(tokens[0]))] for text in texts], device=device)
        cache = texts[0].cache if len(texts) == 1 else JoinedCache([text.cache for text in texts])
        out = self.model(torch.tensor(tokens, device=device), position_ids=positions, past_key_values=cache, logits_to_keep=1)
        last: Tensor = out.logits[:, -1]
        return last.to("cpu", wide(last.dtype)).numpy()


def draw(text: Text, logits: Array) -> int | SamplingError:
    """The next token of a text by its logits (V), or why there is none."""
    try:
        how = text.how
        chance = uniform(how.seed, text.length, text.row)
        if text.top_p < 1 and how.temperature > 0 and np.isfinite(logits).all():
            how = replace(how, top_k=nucleus(probabilities(logits, how), text.top_p))
        return sample(logits, chance, how)
    except SamplingError as error:
        return error


def nucleus(chances: Array, top_p: float) -> int:
    """The least number of tokens, of these probabilities (V), that hold a share ``top_p`` together."""
    together = np.cumsum(np.sort(chances)[::-1])
    return min(int(np.searchsorted(together, top_p * together[-1])) + 1, chances.size)


def state_bytes(config: Any) -> int:
    """The bytes that a text takes in a model of this configuration, however long it is: those of its state in float32."""
    sizes = config.sizes
    return 4 * int(sizes.n_layer * sizes.n_head * sizes.n_neurons * sizes.n_embd)


class JoinedCache(PositionedCache):
    """The caches of several texts as one, for the length of a call that reads a token of each."""

    def __init__(self, caches: Sequence[BDHCache]) -> None:
        super().__init__(layers=[JoinedLayer(each) for each in zip(*(cache.layers for cache in caches), strict=True)])


class JoinedLayer(BDHStateLayer):
    """One layer's states of several texts, each in its own cache: read and written there, where they are."""

    def __init__(self, each: Sequence[BDHStateLayer]) -> None:
        super().__init__(each[0].n_head)
        self.each = each

    def memory_for(self, T: int, texts: int, n_neurons: int, width: int, like: Tensor) -> Any:
        """What T tokens more of each text are to be written to in place."""
        return Memories([layer.memory_for(T, 1, n_neurons, width, like) for layer in self.each])

    def count(self, T: int) -> None:
        """Take note that as many tokens of each text were written."""
        for layer in self.each:
            layer.count(T)

    def read_and_write(self, rotated: Tensor, v: Tensor, texts: Any = None) -> Tensor:
        """Attention (h*B, T, D) of each text's tokens to its own; then its state remembers them too."""
        parts = zip(self.each, by_text(rotated, len(self.each)), by_text(v, len(self.each)), strict=True)
        return in_heads([layer.read_and_write(q, value) for layer, q, value in parts])

    def room(self, texts: int, n_neurons: int, width: int, like: Tensor) -> Tensor:
        """Refuse: there is no one state, which the streamed kernel would write to."""
        raise NotImplementedError("texts that were joined are read a token at a time: set model.backbone.kernel to None")


class Memories:
    """What a layer remembers of several texts."""

    def __init__(self, each: Sequence[Memory]) -> None:
        self.each = each

    def through(self, rotated: Tensor, v: Tensor, active: Tensor | None = None) -> Tensor:
        """Attention (h*B, 1, D) of a token of each text by way of its own memory, which then remembers the token too.

        Rotated neurons (h*B, 1, N) and values (B, 1, D); neurons that are not ``active`` (h, B, N) are zero.
        """
        B = len(self.each)
        seen = [None] * B if active is None else by_text(active.flatten(0, 1)[:, None], B)
        parts = zip(self.each, by_text(rotated, B), torch.split(v, 1), seen, strict=True)
        return in_heads([memory.through(q, value, active) for memory, q, value, active in parts])


def by_text(values: Tensor, B: int) -> tuple[Tensor, ...]:
    """What heads have of texts, (h*B, T, K), as (h, T, K) of each text."""
    return torch.unflatten(values, 0, (-1, B)).transpose(0, 1).contiguous().unbind()


def in_heads(each: Sequence[Tensor]) -> Tensor:
    """(h, T, K) of each text as what heads have of them, (h*B, T, K)."""
    return torch.stack(tuple(each), dim=1).flatten(0, 1)
