"""Models to measure, by name or by their numbers."""

from __future__ import annotations

from bdh_spec import BDHConfig

SIZES = {
    "hatchling": BDHConfig(n_layer=4, n_embd=64, mlp_internal_dim_multiplier=32),  # the embedded checkpoint's
    "small": BDHConfig(n_layer=6, n_embd=128, mlp_internal_dim_multiplier=64),
    "base": BDHConfig(),
    "large": BDHConfig(n_layer=8, n_embd=512, n_head=8),
}


def configured(size: str, dropout: float, **numbers: int | None) -> BDHConfig:
    """The size of that name, with the numbers that are given in place of its own.

    >>> configured("base", 0.0, n_layer=2, n_embd=None).n_layer
    2
    """
    given = {name: value for name, value in numbers.items() if value is not None}
    return BDHConfig.from_dict(SIZES[size].as_dict() | {"dropout": dropout} | given)
