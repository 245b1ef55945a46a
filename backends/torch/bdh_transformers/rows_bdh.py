"""What the parallel form carries from token to token: rows of all earlier ones, in room that grows or has a fixed length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.utils.import_utils import is_tracing


class BDHRowsLayer(DynamicLayer):
    """One layer's rows, keys (B, h, S, N) and values (B, 1, S, D), in room that is larger: a token copies its own ones only."""

    keys: Tensor
    values: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.rooms: tuple[Tensor | None, Tensor | None] = (None, None)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add rows, and return all of them."""
        # Gradients need what was there, a traced program takes no room that depends on a length, and many texts are read once.
        if torch.is_grad_enabled() or is_tracing(key_states) or not self.get_seq_length():
            found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return found
        self.keys, room_of_keys = appended(self.keys, key_states, self.rooms[0])
        self.values, room_of_values = appended(self.values, value_states, self.rooms[1])
        self.rooms = room_of_keys, room_of_values
        return self.keys, self.values


def appended(rows: Tensor, more: Tensor, room: Tensor | None) -> tuple[Tensor, Tensor]:
    """All rows (B, h, S, K) and the room that they are in: the one at hand, if they are there already and more fit in."""
    S, stop = rows.shape[2], rows.shape[2] + more.shape[2]
    if room is None or not _is_in(rows, room) or stop > room.shape[2]:
        room = more.new_empty((*rows.shape[:2], stop + stop // 4 + 16, rows.shape[3]))
        room[:, :, :S] = rows
    room[:, :, S:stop] = more
    return room[:, :, :stop], room


def _is_in(rows: Tensor, room: Tensor) -> bool:
    """Whether rows are the first ones of a room, and not a copy in another order."""
    is_there = rows.data_ptr() == room.data_ptr() and rows.stride() == room.stride()
    return is_there and rows.shape[:2] == room.shape[:2]


class BDHStaticRowsLayer(StaticLayer):
    """One layer's rows in room for ``max_cache_len`` tokens that stays where it is, as compiled programs ask."""

    cumulative_length: Tensor  # tokens that were written

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for rows like these: values have one head, whatever the number of the keys'."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_zeros((*states.shape[:2], self.max_cache_len, states.shape[3])) for states in (key_states, value_states)
        )
        self.cumulative_length = self.cumulative_length.to(self.device)
        stays(self.keys, self.values, self.cumulative_length)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add rows, and return the whole room: what was not written yet is zero."""
        T = key_states.shape[2]
        if _can_look(key_states) and int(self.get_seq_length()) + T > self.max_cache_len:
            raise ValueError(
                f"this cache has room for {self.max_cache_len} tokens, and {int(self.get_seq_length())} and {T} more do not fit"
                " in: give it a larger max_cache_len"
            )
        found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return found


def _can_look(states: Tensor) -> bool:
    """Whether a length can be looked at: other devices would have to be waited for, and a traced program has none yet."""
    return states.device.type == "cpu" and not is_tracing(states)


def stays(*tensors: Tensor) -> None:
    """Tell compilers that these tensors will be written in place and stay where they are."""
    for tensor in tensors:
        if not is_tracing(tensor):
            torch._dynamo.mark_static_address(tensor)
