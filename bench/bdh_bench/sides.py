"""What a framework shows to a measurement: sides of a row, ready to run; its memory; and what its machine can do at most.

A ``measure_X`` module does it for one framework, and is imported in the process of a side and nowhere else.
"""

from __future__ import annotations

import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

import bdh_spec
from bdh_bench import machine
from bdh_bench.rows import Row
from bdh_spec import Backend, BDHConfig, BDHError
from bdh_spec.params import Array, Params, init

FRAMEWORKS = ("torch", "jax", "mlx")  # those with a module of their own; all other ports are asked through the protocol
OURS, PLAIN, COMPILED, AGAIN, BDH_TORCH = "ours", "plain", "compiled", "again", "bdh_torch"
READING_AGAIN = ("torch", "mlx")  # whose users know a generation that reads the whole text for each token
READ = 512  # tokens of a context that are really read: beyond them a state costs the same wherever it stands
NEXT = 1  # tokens of a step
RATE = 1e-4  # of the optimiser
ITEMSIZE = {"float32": 4, "bfloat16": 2}
TOUCH = BDHConfig(n_layer=1, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4, dropout=0.0)
TOUCHING = 8  # tokens

Named = dict[str, Array]


class BenchError(BDHError, ValueError):
    """A port, an option or a row that nothing can be measured of."""


class AbsentError(BDHError):
    """A side that does not exist here; the message is the reason, and no fault."""


@dataclass(frozen=True)
class Task:
    """One side of one row, in words that another process can read."""

    port: str
    side: str
    row: Row
    config: BDHConfig
    dtype: str
    device: str
    seed: int = 0

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    def tiny(self) -> Task:
        """The same with next to no work, so that libraries are there before memory is looked at."""
        row = replace(self.row, batch=1, length=min(self.row.length, TOUCHING))
        return replace(self, row=row, config=replace(TOUCH, dropout=self.config.dropout))

    def params(self) -> Params:
        """Fresh weights."""
        return init(self.config, np.random.default_rng(self.seed))

    def tokens(self) -> Array:
        """The tokens (B, T) that are read; of a decoding those that are really read before it, at least one."""
        return self._draw(1, min(self.row.length, READ) if self.row.kind == "decode" else self.row.length)

    def targets(self) -> Array:
        """What follows each token (B, T)."""
        return self._draw(2, self.row.length)

    def next(self) -> Array:
        """The token (B, 1) that is decoded again and again."""
        return self._draw(3, NEXT)

    def text(self) -> Array:
        """All that is read again for one token (B, T + 1); beyond READ the same tokens over and over."""
        again = np.resize(np.arange(self.tokens().shape[1]), self.row.length)
        return np.concatenate([self.tokens()[:, again], self.next()], axis=1)

    def _draw(self, which: int, length: int) -> Array:
        rng = np.random.default_rng((self.seed, which))
        return rng.integers(self.config.vocab_size, size=(self.row.batch, length))


@dataclass
class Runner:
    """A side that is loaded: what is timed, and what is compared, which leaves what is timed as it was."""

    run: Callable[[], object]  # once, and to the end: not when it is merely queued
    answer: Callable[[], Named]


class Framework(ABC):
    """What one framework can be asked on one device."""

    name: ClassVar[str]

    def __init__(self, device: str) -> None:
        self.device = device

    @abstractmethod
    def facts(self) -> dict[str, str]:
        """Its version and what its speed depends on."""

    @abstractmethod
    def runner(self, task: Task, params: Params) -> Runner:
        """Load one side. AbsentError where there is no such side here."""

    @abstractmethod
    def product(self, n: int, dtype: str) -> Callable[[], object]:
        """A product of two (n, n) matrices, to the end."""

    @abstractmethod
    def copy(self, size: int) -> Callable[[], object]:
        """A copy of ``size`` bytes, to the end."""

    def held_itemsize(self, task: Task) -> int:
        """The bytes of each weight that a side holds."""
        return task.itemsize

    def available(self) -> int:
        """The bytes that the device has free."""
        return machine.available_memory()

    def in_use(self) -> int:
        """The bytes in use now."""
        machine.settle()
        return machine.resident()

    def forget_peak(self) -> None:
        """Count the peak from here on."""
        machine.forget_peak()

    def peak(self) -> int:
        """The most bytes since ``forget_peak``."""
        return machine.peak()


def framework_of(port: str) -> str:
    """The framework whose module measures a port: its own, or none, which is the protocol."""
    return port if port in FRAMEWORKS else "numpy"


def framework(port: str, device: str) -> Framework:
    """The framework of a port. Imports it."""
    name = framework_of(port)
    found: Framework = importlib.import_module(f"bdh_bench.measure_{name}").MEASURED(device)
    return found


def sides_of(task: Task) -> tuple[str, ...]:
    """The sides of a row, ours first. One that turns out not to exist here says so when it is loaded."""
    name = framework_of(task.port)
    if task.row.kind == "transformers":
        return OURS, BDH_TORCH
    again = (AGAIN,) if name in READING_AGAIN and task.row.kind == "decode" else ()
    return (OURS, PLAIN, *again, *((COMPILED,) if name != "numpy" else ()))


def find_port(name: str) -> Backend:
    """A registered port by its name, or any class by its path, as in package.module:Class."""
    if ":" not in name:
        return bdh_spec.get_backend(name)
    module, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a port under development is not installed
    try:
        backend = getattr(importlib.import_module(module), attribute)()
    except Exception as error:  # a port may raise anything while it is imported or made
        raise BenchError(f"{name} cannot be made ({type(error).__name__}: {error}): give package.module:Class") from error
    if not isinstance(backend, Backend):
        raise BenchError(f"{name} is no bdh_spec.Backend: give the class of a port")
    return backend
