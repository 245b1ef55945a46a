"""What generation carries from token to token: a state of fixed size, or the rows of all earlier tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from bdh_torch.attention import attend, write
from bdh_torch.decode import Memory, Rows, keeps_rows
from bdh_torch.layer import wide


class BDHStateLayer(CacheLayerMixin):
    """One layer's state (R13): a matrix per head of each text, (h*B, N, D), never narrower than float32.

    Short texts are held by their rows, until somebody looks at the state.
    """

    def __init__(self, n_head: int, **_: Any) -> None:
        super().__init__()
        self.n_head = n_head
        self.memory: Memory | None = None
        self.length = 0

    @property
    def state(self) -> Tensor | None:
        """The state, or None before the first token."""
        return None if self.memory is None else self.memory.state()

    @state.setter
    def state(self, state: Tensor | None) -> None:
        self.memory = None if state is None else Memory(state)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse: rows cannot be had back from a state."""
        raise NotImplementedError(
            "a state has no rows of keys and values to return: BDHRecurrentAttention calls read_and_write"
        )

    def read_and_write(self, rotated: Tensor, v: Tensor) -> Tensor:
        """Attention (h*B, T, D) of these tokens to one another and to all earlier ones; then the state remembers them too."""
        if keeps_rows():
            memory = self.memory_for(len(rotated) // self.n_head, rotated.shape[2], v, T=v.shape[1])
            if isinstance(memory.held, Rows):
                self.length += v.shape[1]
                return memory.through(rotated, v)
        attention = attend(rotated, v, self.state)  # before the first token there is nothing to read
        self.remember(rotated, v)
        return attention

    def remember(self, rotated: Tensor, v: Tensor) -> None:
        """Write these tokens into the state."""
        state = blank(rotated, v) if self.state is None else self.state
        # Not in place where gradients are recorded: they need what the state was.
        self.state = write(state, rotated, v, donate=not torch.is_grad_enabled())
        self.length += v.shape[1]
        self.is_initialized = True

    def memory_for(self, texts: int, n_neurons: int, v: Tensor, T: int) -> Memory:
        """What T tokens more, with values v (..., D), are to be written to in place."""
        if self.memory is None:
            self.memory = Memory.blank(self.n_head * texts, texts, n_neurons, v.shape[-1], like=v)
            self.is_initialized = True
        self.memory = self.memory.for_writing(T, donate=True)
        return self.memory

    def room(self, texts: int, n_neurons: int, v: Tensor) -> Tensor:
        """The state, to be written in place; zeros before the first token."""
        return self.memory_for(texts, n_neurons, v, v.shape[1]).state()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start with a blank state."""
        self.state, self.is_initialized = blank(key_states, value_states), True

    @property
    def batch_size(self) -> int:
        """How many texts it remembers; -1 before the first."""
        return -1 if self.memory is None else self.memory.groups // self.n_head

    def get_seq_length(self) -> int:
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

    def _texts(self, change: Any) -> None:
        if (state := self.state) is not None:
            self.state = change(state.view(self.n_head, -1, *state.shape[1:])).flatten(0, 1)


def blank(rotated: Tensor, v: Tensor) -> Tensor:
    """The state before the first token: zeros, of the size that these rotated neurons and values ask for."""
    B, N, D = rotated.shape[0], rotated.shape[-1], v.shape[-1]
    return torch.zeros((B, N, D), dtype=wide(rotated.dtype), device=rotated.device)


class BDHCache(Cache):
    """The cache of a model with this configuration, in the form of attention that it is set to at the moment.

    ``bdh_recurrent``: a state of fixed size in each layer. ``bdh_parallel``: in each layer the rotated neurons of every token,
    and what it was read from.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        recurrent = config._attn_implementation in (None, "bdh_recurrent")
        layers = (
            BDHStateLayer(config.num_attention_heads) if recurrent else DynamicLayer() for _ in range(config.num_hidden_layers)
        )
        super().__init__(layers=list(layers))


def check_cache(cache: Any, form: str | None) -> None:
    """Refuse a cache that this form of attention cannot use, before anything is lost in it."""
    if getattr(cache, "offloading", False):
        raise ValueError(f"{form} cannot use a cache that is offloaded: a long text reads all of its rows; pass one that stays")
    layers = getattr(cache, "layers", [None])
    kinds: set[Any] = {type(layer) for layer in layers} or {getattr(cache, "layer_class_to_replicate", None)}
    needed = BDHStateLayer if form == "bdh_recurrent" else DynamicLayer
    if kinds != {needed}:
        found = type(cache).__name__ + "".join(f" of {kind.__name__}" for kind in kinds if kind is not None)
        raise ValueError(f"{form} cannot use a {found}: {_remedy(kinds, form)}")


def _remedy(kinds: set[Any], form: str | None) -> str:
    if form == "bdh_recurrent" and kinds == {DynamicLayer}:
        return "pass BDHCache(model.config), or use model.set_attn_implementation('bdh_parallel'), which keeps rows"
    if kinds == {BDHStateLayer}:
        return "the form was changed after this state was written: start again, or change it back"
    return "pass BDHCache(model.config), or no cache at all and generate makes the right one"
