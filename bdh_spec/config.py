"""The six numbers that make a BDH model, and the frequencies that a model may bring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bdh_spec.errors import ConfigError
from bdh_spec.rope import Frequencies
from bdh_spec.stored_table import is_the_table

SIZES = ("n_layer", "n_embd", "dropout", "n_head", "mlp_internal_dim_multiplier", "vocab_size")


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
    freqs: Frequencies | None = field(default=None, repr=False)  # the model's own turns per token, where it has any (R4)

    def __post_init__(self) -> None:
        for name in SIZES:
            if name != "dropout":
                _demand_positive_integer(name, getattr(self, name))
        _demand_probability("dropout", self.dropout)
        if self.n_neurons < 2 or self.n_neurons % 2:
            raise ConfigError(
                f"{self.n_neurons} neurons per head, which rotation cannot pair: mlp_internal_dim_multiplier * n_embd // n_head"
                f" = {self.mlp_internal_dim_multiplier} * {self.n_embd} // {self.n_head} must be even and at least 2"
            )
        object.__setattr__(self, "freqs", _own(self.freqs, self.n_neurons))

    @property
    def n_neurons(self) -> int:
        """N, the neurons of one head."""
        return self.mlp_internal_dim_multiplier * self.n_embd // self.n_head

    def as_dict(self) -> dict[str, Any]:
        """The six numbers, without the frequencies, which files carry as a tensor."""
        return {name: getattr(self, name) for name in SIZES}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BDHConfig:
        """Read a configuration in which every key is known and n_layer, which no weight shows, is present."""
        if unknown := sorted(set(values) - set(SIZES)):
            raise ConfigError(f"unknown configuration keys {', '.join(unknown)}: BDH has {', '.join(sorted(SIZES))}")
        if "n_layer" not in values:
            raise ConfigError("no n_layer in the configuration: layers share weights, so nothing else tells it; say it")
        return cls(**values)


def _own(freqs: Frequencies | None, n_neurons: int) -> Frequencies | None:
    """The table of a model that brings one; none if it is the normative one, so that two equal models are equal."""
    if freqs is None:
        return None
    own = freqs if isinstance(freqs, Frequencies) else Frequencies(freqs)
    if own.array.size != n_neurons:
        raise ConfigError(
            f"{own.array.size} frequencies for {n_neurons} neurons: check n_embd, n_head and mlp_internal_dim_multiplier"
        )
    return None if is_the_table(own.array) else own


def _demand_positive_integer(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} is {value!r}: it must be a whole number of at least 1")


def _demand_probability(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ConfigError(f"{name} is {value!r}: it must be a number from 0 up to, but not including, 1")
