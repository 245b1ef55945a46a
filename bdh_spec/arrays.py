"""What an array is to a type checker: in a module that needs nothing but NumPy."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
