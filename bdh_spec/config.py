"""The six numbers that make a BDH model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bdh_spec.errors import ConfigError


@dataclass(frozen=True)
class BDHConfig:
    """Sizes of a model. The order of the fields is the original implementation's.

    >>> BDHConfig().n_neurons
    8192
    """

    n_layer: int = 6  # L: how often the shared weights are applied
    n_embd: int = 256  # D
    dropout: float = 0.1  # in training only (R8)
    n_head: int = 4  # nh
    mlp_internal_dim_multiplier: int = 128
    vocab_size: int = 256  # V: raw bytes

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name != "dropout":
                _demand_positive_integer(field.name, getattr(self, field.name))
        _demand_probability("dropout", self.dropout)
        if self.n_neurons < 2 or self.n_neurons % 2:
            raise ConfigError(
                f"{self.n_neurons} neurons per head, which rotation cannot pair: mlp_internal_dim_multiplier * n_embd // n_head"
                f" = {self.mlp_internal_dim_multiplier} * {self.n_embd} // {self.n_head} must be even and at least 2"
            )

    @property
    def n_neurons(self) -> int:
        """N, the neurons of one head."""
        return self.mlp_internal_dim_multiplier * self.n_embd // self.n_head

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BDHConfig:
        """Read a configuration in which every key is known and n_layer, which no weight shows, is present."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"unknown configuration keys {', '.join(unknown)}: BDH has {', '.join(sorted(known))}")
        if "n_layer" not in values:
            raise ConfigError("no n_layer in the configuration: layers share weights, so nothing else tells it; say it")
        return cls(**values)


def _demand_positive_integer(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} is {value!r}: it must be a whole number of at least 1")


def _demand_probability(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ConfigError(f"{name} is {value!r}: it must be a number from 0 up to, but not including, 1")
