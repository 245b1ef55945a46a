"""Ports made of the specification's own source with lines of it changed: mistakes to be caught, and legal rewritings.

A variant is a private copy of ``bdh_spec``: nothing that is imported elsewhere changes. Types that cross the border stay the
real ones, so that errors, states and ``isinstance`` mean the same on both sides.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import CodeType, MappingProxyType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import bdh_spec
from bdh_conformance.adversaries.places import replaced
from bdh_spec import Backend, int8, model, optimizer, protocol, rope

# The modules that a copy consists of, each after those it imports. Errors, configuration and weights are shared.
MODULES = ("rope", "int8", "model", "gradients", "sampling", "optimizer", "checks", "protocol", "numpy_backend")

# Types that carry nothing but data are replaced by the real ones; the protocol's classes become subclasses of the real ones.
DATA: dict[str, tuple[type, ...]] = {
    "rope": (rope.Frequencies,),
    "int8": (int8.Int8,),
    "model": (model.RecurrentState,),
    "optimizer": (optimizer.AdamW, optimizer.OptimizerState),
    "protocol": (protocol.Capabilities,),
}
CLASSES = {"protocol": (protocol.State, protocol.Optimizer, protocol.Model, protocol.Backend)}


class Change(NamedTuple):
    """One place in one source file of bdh_spec, and what stands there instead."""

    module: str
    before: str
    after: str


@cache
def variant(name: str, changes: tuple[Change, ...]) -> Backend:
    """A NumPy port of the specification so changed.

    >>> variant("theta", (Change("rope", "THETA = 2.0**16", "THETA = 10000.0"),)).version()
    'numpy with theta'
    """
    backend: type[Backend] = copied(changes, unchanged())["numpy_backend"].NumpyBackend
    return type(name, (backend,), {"name": name, "version": lambda self: f"numpy with {name}"})()


@cache
def unchanged() -> dict[str, ModuleType]:
    """A private copy of each module as it is, which variants share."""
    return copied(())


def copied(changes: tuple[Change, ...], known: Mapping[str, ModuleType] = MappingProxyType({})) -> dict[str, ModuleType]:
    """Private copies of all modules: of ``known`` those that have no change and import no module that has."""
    copies: dict[str, ModuleType] = {}
    for module in MODULES:
        own = tuple(change for change in changes if change.module == module)
        same = not own and all(copies[other] is known.get(other) for other in imports(module))
        copies[module] = known[module] if same and module in known else load(module, own, copies)
    return copies


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of a copy that one of them imports."""
    found = {node for node in ast.walk(ast.parse(source(module))) if isinstance(node, ast.ImportFrom)}
    named = {name for node in found for name in (node.module or "").split(".") + [alias.name for alias in node.names]}
    return frozenset(named & set(MODULES))


def load(module: str, changes: tuple[Change, ...], copies: Mapping[str, ModuleType]) -> ModuleType:
    """A private copy of a module, whose imports find the ``copies`` made before it."""
    # The real name, because dataclasses look their module up by it.
    copy = ModuleType(f"bdh_spec.{module}")
    vars(copy)["__builtins__"] = vars(builtins) | {"__import__": finder(copies)}
    exec(compiled(module, changes), vars(copy))
    for real in DATA.get(module, ()):
        setattr(copy, real.__name__, real)
    for kind in CLASSES.get(module, ()):
        changed = getattr(copy, kind.__name__)
        setattr(copy, kind.__name__, type(changed)(kind.__name__, (changed, kind), {}))
    return copy


def finder(copies: Mapping[str, ModuleType]) -> Any:
    """An ``__import__`` that prefers the copies."""
    by_name = {f"bdh_spec.{module}": copy for module, copy in copies.items()}

    def find(name: str, *args: Any) -> Any:
        if name == "bdh_spec":
            return SimpleNamespace(**(vars(bdh_spec) | dict(copies)))
        return by_name[name] if name in by_name else builtins.__import__(name, *args)

    return find


@cache
def compiled(module: str, changes: tuple[Change, ...]) -> CodeType:
    """The code of a module with its changes made."""
    text = source(module)
    for change in changes:
        try:
            text = replaced(text, change.before, change.after)
        except ValueError as error:
            raise ValueError(f"bdh_spec/{module}.py: {error}") from None
    return compile(text, f"bdh_spec/{module}.py, changed", "exec")


@cache
def source(module: str) -> str:
    """The text of one of the specification's files."""
    return (Path(bdh_spec.__file__).parent / f"{module}.py").read_text()
