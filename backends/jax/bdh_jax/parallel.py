"""Where weights lie: on a device, or on a mesh of them, along which texts, neurons and weights are shared.

The functions of ``model`` and ``training`` stay as they are: given arrays that lie on a mesh, the compiler splits the work, and
sums where parts meet.
"""

from __future__ import annotations

import os

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bdh_spec.errors import CapabilityError
from bdh_spec.files import shown
from bdh_spec.params import Params
from bdh_spec.spread import Spread, Team

PLATFORMS = ("cuda", "rocm", "tpu", "cpu")  # JAX's own names, the best first
DATA, NEURONS = "data", "neurons"  # the axes of a mesh
PATIENCE = 3600  # seconds for which those that are done wait for the one that writes what was made
ADDRESS, NUMBER, PLACE = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


class JAXTeam(Team):
    """The processes that found one another by ``jax.distributed``, each with devices of its own."""

    def __init__(self) -> None:
        if not jax.distributed.is_initialized():
            join()
        self.rank, self.size = jax.process_index(), jax.process_count()

    @property
    def places(self) -> int:
        return jax.device_count()

    def any(self, wish: bool) -> bool:
        return bool(multihost_utils.process_allgather(np.array(wish)).any())

    def wait(self) -> None:
        multihost_utils.sync_global_devices("all are here")


def join() -> None:
    """Meet the other processes. What is not said is found out where a cluster tells it: Slurm, MPI, Kubernetes, TPU pods."""
    try:
        number, place = (int(os.environ[name]) if name in os.environ else None for name in (NUMBER, PLACE))
        jax.distributed.initialize(num_processes=number, process_id=place, shutdown_timeout_seconds=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise CapabilityError(
            f"this process could not meet the others of {os.environ.get(ADDRESS)} ({shown(error, 200)}): check {NUMBER} and"
            f" {PLACE}, and choose the jax port by its name, so that nothing asks JAX for devices before"
        ) from None


def is_launched() -> bool:
    """Whether this process is one of several, which the program itself or whoever started it has told."""
    return jax.distributed.is_initialized() or ADDRESS in os.environ


def devices_of(platform: str) -> list[jax.Device]:
    """The devices of one platform, none if JAX has no such platform here."""
    try:
        return jax.devices(platform)
    except RuntimeError:
        return []


def find_device(name: str) -> jax.Device:
    """The device of a name such as ``cpu``, which is the first of this process, or ``cuda:1``."""
    platform, _, number = name.partition(":")
    found = {str(device.id): device for device in devices_of(platform)}
    number = number or next((its for its, device in found.items() if device.process_index == jax.process_index()), "0")
    if number not in found:
        raise CapabilityError(f"the jax port has no device {name!r} here: {platform} has numbers {', '.join(found)}")
    return found[number]


def mesh(device: str, spread: Spread) -> Mesh:
    """The first devices of a platform, as many as share a model."""
    platform, found = device.split(":")[0], devices_of(device.split(":")[0])
    if len(found) < spread.size:
        makes_more = "; XLA_FLAGS=--xla_force_host_platform_device_count makes more of a CPU" if platform == "cpu" else ""
        raise CapabilityError(f"{platform} has {len(found)} devices here for a model that {spread.size} share{makes_more}")
    # The compiler places the sums: by default a product over an axis that is shared would be an error.
    axes = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((spread.data, spread.neurons), (DATA, NEURONS), axis_types=axes, devices=found[: spread.size])


def shardings(mesh: Mesh, spread: Spread) -> Params:
    """Where each weight and its moments lie: cut by neurons and, where weights are shared, by width."""
    width = DATA if spread.shares_weights else None
    axes = Params(
        embed=(None, width),  # V D
        encoder=(None, width, NEURONS),  # h D N
        encoder_v=(None, width, NEURONS),  # h D N
        decoder=(NEURONS, width),  # h*N D
        lm_head=(width, None),  # D V
    )
    return Params(*(lying(mesh, *each) for each in axes))


def lying(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """How an array lies on a mesh, whose axes are cut by these of the mesh; all of it everywhere by none."""
    return NamedSharding(mesh, PartitionSpec(*axes))  # type: ignore[no-untyped-call]  # JAX leaves it untyped
