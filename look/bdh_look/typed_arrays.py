"""Arrays that go to a page."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from bdh_spec.params import Array

KINDS = {"u1": "Uint8", "i1": "Int8", "u2": "Uint16", "i2": "Int16", "u4": "Uint32", "f4": "Float32"}


def encoded(values: Array) -> dict[str, Any]:
    """A typed array for JavaScript: its little-endian bytes in base64, its type and its shape."""
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    return {
        "type": KINDS[f"{values.dtype.kind}{values.dtype.itemsize}"],
        "shape": list(values.shape),
        "base64": base64.b64encode(little.tobytes()).decode(),
    }
