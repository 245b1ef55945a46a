"""Tasks and limits to try the bench with."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import mlx.core as mx
import pytest

from bdh_bench.rows import Row
from bdh_bench.sides import Task
from bdh_bench.worker import Limits
from bdh_spec import BDHConfig

TINY = BDHConfig(n_layer=2, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=11, dropout=0.0)


@pytest.fixture
def task() -> Callable[..., Task]:
    """A side of a row of a tiny model."""

    def made(port: str, side: str, row: Row, **other: Any) -> Task:
        return replace(Task(port, side, row, TINY, "float32", "cpu", seed=3), **other)

    return made


@pytest.fixture
def limits() -> Limits:
    """A slow machine with a gigabyte free."""
    return Limits("cpu", flops=1e10, copy=1e10, available=2**30, facts={})


@pytest.fixture
def restored() -> Iterator[None]:
    """Settings of frameworks that a measurement chooses for its process, put back for other tests."""
    device = mx.default_device()
    yield
    mx.set_default_device(device)
    jax.config.update("jax_default_device", None)
    jax.config.update("jax_default_matmul_precision", None)
