"""Small runs, and the text they learn from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bdh_train import TrainConfig

SIZES = {"n_layer": 2, "n_embd": 8, "n_head": 2, "mlp_internal_dim_multiplier": 4, "dropout": 0.2}
RECIPE = {"block_size": 16, "batch_size": 3, "max_steps": 6, "eval_every": 3, "eval_batches": 2, "checkpoint_every": 2}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of 4,000 bytes and more."""
    path = tmp_path / "book.txt"
    path.write_bytes(b"".join(b"%d and %d make %d.\n" % (i, j, i + j) for i in range(16) for j in range(16)))
    return path


@pytest.fixture
def small(text: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """A run of six steps on NumPy, with whatever else is asked for."""

    def configured(**more: Any) -> TrainConfig:
        return TrainConfig(**{"data": str(text), "out": str(tmp_path / "run"), "backend": "numpy", **SIZES, **RECIPE, **more})

    return configured
