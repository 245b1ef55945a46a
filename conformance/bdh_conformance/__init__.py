"""When do two implementations of BDH agree: the comparison and its tolerances."""

from bdh_conformance.yardstick.agreement import assert_agrees
from bdh_conformance.yardstick.tolerances import Expectation, expect

__all__ = ["Expectation", "assert_agrees", "expect"]
