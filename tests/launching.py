"""A program on several processes, started as each framework would have it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

BIN = Path(sys.executable).parent


class Said(NamedTuple):
    """What all processes said together."""

    stdout: str
    stderr: str


def launched(framework: str, processes: int, *program: object, devices: int = 1) -> Said:
    """Run a program of Python (a script, or -m and a module, with its words) on so many processes, of so many devices each.

    One launcher starts those of torch and MLX; those of JAX are told of one another, and start by themselves.
    """
    words = list(map(str, program))
    commands = {
        "torch": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(processes), *words],
        "mlx": [str(BIN / "mlx.launch"), "-n", str(processes), *ring(), "--", sys.executable, *words],
        "jax": [sys.executable, *words],
    }
    own = os.environ | {"OMP_NUM_THREADS": "1", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    told = of_one_another(processes) if framework == "jax" and processes > 1 else [{}]
    running = [
        subprocess.Popen(commands[framework], env=own | each, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for each in told
    ]
    said = [process.communicate(timeout=600) for process in running]
    assert [process.returncode for process in running] == [0] * len(running), "\n".join(errors for _, errors in said)
    return Said(*("".join(one) for one in zip(*said, strict=True)))


def of_one_another(processes: int) -> list[dict[str, str]]:
    """What each process of JAX is told."""
    address = f"127.0.0.1:{free_port()}"
    every = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    return [every | {"JAX_PROCESS_ID": str(place)} for place in range(processes)]


def ring() -> list[str]:
    """Free ports for MLX's ring, which takes one after the other from the first."""
    return ["--backend", "ring", "--starting-port", str(min(free_port(), 65000)), "--env", "OMP_NUM_THREADS=1"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
