"""When do two implementations of BDH agree: the comparison and its tolerances."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bdh_conformance.yardstick.agreement import assert_agrees
    from bdh_conformance.yardstick.tolerances import Expectation, expect

__all__ = ["Expectation", "assert_agrees", "expect"]


def __getattr__(name: str) -> Any:
    """Imported when they are asked for, so that the command is ready for an interruption before anything is."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    where = "agreement" if name == "assert_agrees" else "tolerances"
    return getattr(import_module(f"bdh_conformance.yardstick.{where}"), name)
