"""Ports by name: registered ones, and classes under development by their path."""

from __future__ import annotations

import importlib
import sys

import bdh_spec
from bdh_spec import Backend, BDHError


class PortError(BDHError, ValueError):
    """A name that leads to no port."""


def find_port(name: str) -> Backend:
    """A registered port by its name, or any class by its path."""
    if ":" not in name:
        return bdh_spec.get_backend(name)
    module, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as python -m does: a port under development is not installed
    try:
        found = getattr(importlib.import_module(module), attribute)
        backend = found() if callable(found) else found
    except AttributeError as error:
        raise PortError(f"{name} leads nowhere ({error}): give package.module:Class") from None
    except Exception as error:  # a port may raise anything while it is imported or made
        kind = "cannot be imported" if module not in sys.modules else "cannot be made"
        raise PortError(f"{name} {kind} ({type(error).__name__}: {error}): give package.module:Class") from error
    if not isinstance(backend, Backend):
        raise PortError(f"{name} is no bdh_spec.Backend: see PORTING.md for what a port is")
    return backend
