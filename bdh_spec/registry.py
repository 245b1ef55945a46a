"""Which ports this machine has, which one suits it, and the door that downstream code goes through."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias

from bdh_spec import checkpoint
from bdh_spec.config import BDHConfig
from bdh_spec.errors import BackendUnavailable, CheckpointError
from bdh_spec.files import check_readable
from bdh_spec.int8 import widened
from bdh_spec.numpy_backend import NumpyBackend
from bdh_spec.params import Params
from bdh_spec.protocol import Backend, Model
from bdh_spec.rope import Phase

PORTS = "bdh_spec.backends"  # entry points: name = package.module:BackendClass
READERS = "bdh_spec.readers"  # entry points: function(path, n_layer, freqs) -> (Params, BDHConfig)

Freqs: TypeAlias = Literal["keep", "reset"]  # what to do with frequencies that are not BDH's: compute by them, or by BDH's


@dataclass(frozen=True)
class PortReport:
    """What one port can do on this machine, or why it cannot."""

    name: str
    available: bool
    version: str = ""
    devices: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    reason: str = ""


def backends() -> list[PortReport]:
    """Every port that is registered, available or not."""
    return [_report(name) for name in ["numpy", *sorted(_ports())]]


def get_backend(name: str) -> Backend:
    """A port by name: BackendUnavailable if its framework is absent, the framework's own error if it is broken."""
    if name == "numpy":
        return NumpyBackend()
    ports = _ports()
    if name not in ports:
        raise BackendUnavailable(f"no port is named {name!r}: there are numpy, {', '.join(sorted(ports))}")
    try:
        backend: Backend = ports[name].load()()
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != name:  # a port bears the name of its framework
            raise
        raise BackendUnavailable(f"{name} is not installed: pip install '{_distribution(ports[name])}[{name}]'") from None
    return backend


def choose(name: str = "auto") -> Backend:
    """The port asked for; for "auto" the one that BDH_BACKEND names, or else the one that suits this machine best."""
    name = os.environ.get("BDH_BACKEND", "auto") if name == "auto" else name
    return get_backend(name if name != "auto" else _best())


def load(
    path: str | Path | None = None,
    backend: str = "auto",
    device: str | None = None,
    dtype: str | None = None,
    *,
    phase: Phase = "exact",
    n_layer: int | None = None,
    freqs: Freqs | None = None,
) -> Model:
    """A checkpoint of any dialect on the port that suits this machine; without a path the embedded checkpoint.

    ``freqs`` decides for a file whose frequencies were trained.

    >>> load(backend="numpy").generate("The ", 0)
    b'The '
    """
    params, config = read_stored(path, n_layer, freqs)
    return choose(backend).load(params, config, device=device, dtype=dtype, phase=phase)


def read(path: str | Path | None = None, n_layer: int | None = None, freqs: Freqs | None = None) -> tuple[Params, BDHConfig]:
    """The weights and configuration of a checkpoint of any dialect; ``n_layer`` where the file cannot tell it.

    Weights in int8 are read as the float32 numbers that they stand for (R17). Frequencies that were trained by accident are
    refused, unless ``freqs`` says "keep" or "reset". A canonical file's own are part of its model, which "reset" takes off.
    """
    params, config = read_stored(path, n_layer, freqs)
    return widened(params), config


def read_stored(
    path: str | Path | None = None, n_layer: int | None = None, freqs: Freqs | None = None
) -> tuple[Params, BDHConfig]:
    """The same with weights in int8 as they are, each a ``bdh_spec.int8.Int8``: for ports, which may compute in int8."""
    if freqs not in (None, "keep", "reset"):
        raise CheckpointError(f"freqs is {freqs!r}: say 'keep' for the file's own frequencies, 'reset' for BDH's, or nothing")
    if path is None:
        return checkpoint.read(checkpoint.EMBEDDED)
    if not Path(path).is_dir():
        check_readable(Path(path))
    for point in entry_points(group=READERS):  # the converter reads every dialect; without it, only the canonical one is read
        reader: Callable[[Path, int | None, Freqs | None], tuple[Params, BDHConfig]] = point.load()
        return reader(Path(path), n_layer, freqs)
    if Path(path).is_dir():
        raise CheckpointError(f"{path} is a folder, and no reader of folders is installed: install bdh_convert")
    params, config = checkpoint.read(path)
    return params, replace(config, freqs=None) if freqs == "reset" else config


def _ports() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=PORTS)}


def _distribution(port: EntryPoint) -> str:
    return port.dist.name if port.dist else "bdh-spec"


def _report(name: str) -> PortReport:
    try:
        port = get_backend(name)
        return PortReport(name, True, port.version(), port.devices(), port.capabilities.dtypes)
    except Exception as error:  # noqa: BLE001  a table of ports must survive whatever a broken framework raises
        return PortReport(name, False, reason=str(error) or type(error).__name__)


def _best() -> str:
    ports = _ports()
    if platform.system() == "Darwin" and platform.machine() == "arm64" and "mlx" in ports and _installed("mlx.core"):
        return "mlx"
    if "torch" in ports and _installed("torch") and "cuda" in get_backend("torch").devices():
        return "torch"
    if "jax" in ports and _installed("jax") and _jax_may_accelerate() and get_backend("jax").devices()[0] != "cpu":
        return "jax"
    return next((name for name in ("torch", "jax") if name in ports and _installed(name)), "numpy")


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _jax_may_accelerate() -> bool:
    """Whether JAX has a plugin for an accelerator: asked first, because importing JAX takes seconds."""
    found: Any = entry_points(group="jax_plugins")
    return bool(found) or _installed("libtpu")
