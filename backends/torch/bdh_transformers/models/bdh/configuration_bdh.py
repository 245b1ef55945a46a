"""The configuration, where the earlier integration has it."""

from bdh_transformers.configuration_bdh import BDHConfig

__all__ = ["BDHConfig"]
