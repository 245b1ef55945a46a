"""What generation carries from token to token: a state of fixed size, or the rows of all earlier tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, StaticCache
from transformers.utils.import_utils import is_tracing

from bdh_torch.attention import are_transforms_active, attend, read, scores, without_padding, write
from bdh_torch.decode import Memory, Rows, keeps_rows
from bdh_torch.layer import multiply
from bdh_transformers.rows_bdh import BDHRowsLayer, BDHStaticRowsLayer, stays
from bdh_transformers.texts_bdh import Texts, last_position


class BDHStateLayer(CacheLayerMixin):
    """One layer's state (R13): a matrix per head of each text, (h*B, N, D), never narrower than float32.

    Short texts are remembered by their rows, until they are long enough or somebody looks at the state.
    """

    def __init__(self, n_head: int, **_: Any) -> None:
        super().__init__()
        self.n_head = n_head
        self.memory: Memory | None = None
        self.length = 0

    @property
    def state(self) -> Tensor | None:
        """The state, which is what is held from now on; None before the first token."""
        return None if self.memory is None else self.memory.state()

    @state.setter
    def state(self, state: Tensor | None) -> None:
        self.memory = None if state is None else Memory(state)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse: rows cannot be had back from a state."""
        raise NotImplementedError(
            "a state has no rows of keys and values to return: BDHRecurrentAttention calls read_and_write"
        )

    def read_and_write(self, rotated: Tensor, v: Tensor, texts: Texts | None = None) -> Tensor:
        """Attention (h*B, T, D) of these tokens to one another and to all earlier ones; then the state remembers them too."""
        is_blank = self.is_blank()  # before the first token there is nothing to read
        if texts is None and self.may_hold_rows(rotated):
            memory = self.memory_for(v.shape[1], len(rotated) // self.n_head, rotated.shape[-1], v.shape[-1], rotated)
            if isinstance(memory.held, Rows):
                self.count(v.shape[1])
                return memory.through(rotated, v)
        state = None if is_blank else self.state
        attention = attend(rotated, v, state) if texts is None else attend_to_own(rotated, v, state, texts)
        self.remember(rotated, v, texts)
        return attention

    def remember(self, rotated: Tensor, v: Tensor, texts: Texts | None = None) -> None:
        """Write these tokens into the state; of rows that are packed with several texts, those of the last."""
        state = self.room(len(rotated) // self.n_head, rotated.shape[-1], v.shape[-1], rotated)
        if texts is not None:
            v = without_padding(v, texts.remembered(v.shape[1]))
            goes_on = texts.before == texts.number[:, -1]
            state = multiply(state, goes_on.repeat(self.n_head)[:, None, None])
        if torch.is_grad_enabled():  # which need what the state was
            self.state = write(state, rotated, v)
        else:
            write(state, rotated, v, donate=True)
        self.count(v.shape[1])

    def is_blank(self) -> bool:
        """Whether nothing was written yet."""
        return self.memory is None

    def may_hold_rows(self, rotated: Tensor) -> bool:
        """Whether rows like these may be remembered as they are: not where a compiler or gradients would have to follow."""
        return keeps_rows() and not (self.is_compileable or is_tracing(rotated) or are_transforms_active())

    def count(self, T: int) -> None:
        """Take note that as many tokens were written."""
        self.length += T

    def room(self, texts: int, n_neurons: int, width: int, like: Tensor) -> Tensor:
        """The state, to be written in place; zeros before the first token."""
        memory = self.memory or self._begin(texts, n_neurons, width, like, keeps_rows=False)
        return memory.state()

    def memory_for(self, T: int, texts: int, n_neurons: int, width: int, like: Tensor) -> Memory:
        """What T tokens more are to be written to in place: rows while texts are short, and the state from then on."""
        memory = self.memory or self._begin(texts, n_neurons, width, like, keeps_rows=True)
        self.memory = memory.for_writing(T, donate=True)
        return self.memory

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start with a blank state."""
        self.room(len(key_states) // self.n_head, key_states.shape[-1], value_states.shape[-1], key_states)

    @property
    def batch_size(self) -> int:
        """How many texts it remembers; -1 before the first."""
        return -1 if self.memory is None else self.memory.groups // self.n_head

    def get_seq_length(self) -> Any:
        """Tokens read so far."""
        return self.length

    def get_max_length(self) -> int:
        """No end."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The length that a mask would have, and where it would begin."""
        return self.length + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        self.memory, self.length, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let text b go on from what text ``beam_idx[b]`` remembers."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these texts only, in this order."""
        self._texts(lambda state: state[:, indices.to(state.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every text ``repeats`` times."""
        self._texts(lambda state: state.repeat_interleave(repeats, dim=1))

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to forget the last tokens: what was added to a state cannot be told apart from the rest."""
        if tokens_to_remove:
            raise ValueError(
                "the state of bdh_recurrent cannot be cropped: use model.set_attn_implementation('bdh_parallel'),"
                " which keeps rows"
            )

    def offload(self) -> None:
        """Refuse: every token needs the whole state."""
        raise NotImplementedError("a state of bdh_recurrent is needed at every token: it stays on its device")

    def prefetch(self) -> None:
        """Nothing was taken away."""

    def _begin(self, texts: int, n_neurons: int, width: int, like: Tensor, *, keeps_rows: bool) -> Memory:
        self.memory = Memory.blank(self.n_head * texts, texts, n_neurons, width, like, keeps_rows=keeps_rows)
        self.is_initialized = True
        return self.memory

    def _texts(self, change: Any) -> None:
        if (state := self.state) is not None:
            self.state = change(state.view(self.n_head, -1, *state.shape[1:])).flatten(0, 1)


class BDHStaticStateLayer(BDHStateLayer):
    """The same, which stays where it is and counts in a tensor: a compiled program need not be made again for a next token."""

    is_compileable = True

    def __init__(self, n_head: int, **options: Any) -> None:
        super().__init__(n_head, **options)
        self.length: Any = torch.zeros((), dtype=torch.long)
        self.is_written = False

    def is_blank(self) -> bool:
        """Whether nothing was written yet."""
        return not self.is_written

    def count(self, T: int) -> None:
        """Take note that as many tokens were written."""
        self.length.add_(T)
        self.is_written = True

    def room(self, texts: int, n_neurons: int, width: int, like: Tensor) -> Tensor:
        """The state, to be written in place; zeros before the first token."""
        if self.state is None:
            self.length = self.length.to(like.device)
            stays(super().room(texts, n_neurons, width, like), self.length)
        return super().room(texts, n_neurons, width, like)

    def reset(self) -> None:
        """Forget everything."""
        self.is_written = False
        self.length.zero_()
        if self.state is not None:
            self.state.zero_()

    def _texts(self, change: Any) -> None:
        room = self.state
        super()._texts(change)
        if room is not None and self.state is not None and room.shape == self.state.shape:
            self.state = room.copy_(self.state)


def attend_to_own(rotated: Tensor, v: Tensor, memory: Tensor | None, texts: Texts) -> Tensor:
    """Attention (h*B, T, D) of rows packed with texts: each token's to its own, and to the state if that is of its own."""
    similar = torch.unflatten(scores(rotated), 0, (-1, len(texts.number)))  # h B T T
    attention = torch.bmm(multiply(similar, texts.seen(rotated.shape[1])).flatten(0, 1), v)
    return attention if memory is None else attention + read(memory, without_padding(rotated, texts.going_on()))


class PositionedCache(Cache):
    """A cache that knows where the next token stands, also after padding or positions of one's own."""

    last: tuple[Tensor, Tensor | None] | None = None  # positions (B, T) and mask (B, S) of the last tokens, if either was given

    def next_position(self) -> Any:
        """Where the next token stands: a number for all texts, or (1, 1), or (B, 1)."""
        return self.get_seq_length() if self.last is None else last_position(*self.last) + 1

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.last = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let text b go on from what text ``beam_idx[b]`` remembers."""
        super().reorder_cache(beam_idx)
        self._move(lambda position: position[beam_idx.to(position.device)], by_text=True)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these texts only, in this order."""
        super().batch_select_indices(indices)
        self._move(lambda position: position[indices.to(position.device)], by_text=True)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every text ``repeats`` times."""
        super().batch_repeat_interleave(repeats)
        self._move(lambda position: position.repeat_interleave(repeats, dim=0), by_text=True)

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens back, which rows allow and a state does not."""
        super().crop(tokens_to_remove)
        self._move(lambda position: position - abs(tokens_to_remove))

    def _move(self, change: Callable[[Tensor], Tensor], *, by_text: bool = False) -> None:
        if self.last is not None:
            position = last_position(*self.last)
            self.last = position if by_text and len(position) == 1 else change(position), None


class BDHCache(PositionedCache, DynamicCache):
    """The cache of a model with this configuration, in the form of attention that it is set to at the moment.

    ``bdh_recurrent``: a state of fixed size in each layer. ``bdh_parallel``: in each layer the rotated neurons of every token,
    and what it was read from.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        layers = (
            BDHStateLayer(config.num_attention_heads) if is_recurrent(config) else BDHRowsLayer()
            for _ in range(config.num_hidden_layers)
        )
        Cache.__init__(self, layers=list(layers))  # that of a DynamicCache would choose layers by itself


class BDHStaticCache(PositionedCache, StaticCache):
    """The same, which stays where it is, as compiled programs ask: rows have room for as many tokens, a state for any."""

    def __init__(self, config: PreTrainedConfig, max_cache_len: int) -> None:
        layers = (
            BDHStaticStateLayer(config.num_attention_heads) if is_recurrent(config) else BDHStaticRowsLayer(max_cache_len)
            for _ in range(config.num_hidden_layers)
        )
        Cache.__init__(self, layers=list(layers))  # that of a StaticCache would choose layers by itself

    def make_room(self, texts: int, n_neurons: int, width: int, like: Tensor) -> None:
        """Make states for as many texts at once, so that a program that reads the first tokens is none of its own."""
        for layer in self.layers:
            if isinstance(layer, BDHStateLayer):
                layer.room(texts, n_neurons, width, like)


def is_recurrent(config: PreTrainedConfig) -> bool:
    """Whether models of this configuration remember by a state."""
    return config._attn_implementation in (None, "bdh_recurrent")


ROWS: frozenset[Any] = frozenset({DynamicLayer, BDHRowsLayer, BDHStaticRowsLayer})


def check_cache(cache: Any, form: str | None) -> None:
    """Refuse a cache that this form of attention cannot use, before anything is lost in it."""
    if getattr(cache, "offloading", False):
        raise ValueError(f"{form} cannot use a cache that is offloaded: a long text reads all of its rows; pass one that stays")
    layers = getattr(cache, "layers", [None])
    kinds: set[Any] = {type(layer) for layer in layers} or {getattr(cache, "layer_class_to_replicate", None)}
    if not (_are_states(kinds) if form == "bdh_recurrent" else kinds <= ROWS):
        found = type(cache).__name__ + "".join(f" of {kind.__name__}" for kind in kinds if kind is not None)
        raise ValueError(f"{form} cannot use a {found}: {_remedy(kinds, form)}")


def _are_states(kinds: set[Any]) -> bool:
    return all(isinstance(kind, type) and issubclass(kind, BDHStateLayer) for kind in kinds)


def _remedy(kinds: set[Any], form: str | None) -> str:
    if form == "bdh_recurrent" and kinds <= ROWS:
        return "pass BDHCache(model.config), or use model.set_attn_implementation('bdh_parallel'), which keeps rows"
    if _are_states(kinds):
        return "the form was changed after this state was written: start again, or change it back"
    return (
        "pass BDHCache(model.config), or BDHStaticCache(model.config, max_cache_len), or no cache at all and generate makes the"
        " right one"
    )
