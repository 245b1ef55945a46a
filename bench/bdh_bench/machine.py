"""The machine of a measurement, and the memory of its processes."""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

SETTINGS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "OPENBLAS_CORETYPE",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "XLA_FLAGS",
    "CUDA_VISIBLE_DEVICES",
    "MLX_ENABLE_TF32",
)
KILOBYTE = 1024


def facts() -> dict[str, str]:
    """What a figure depends on: the machine, its settings, and versions."""
    found = {
        "cpu": cpu_model(),
        "cores": f"{cores()} of {os.cpu_count()}",
        "memory": f"{total_memory() / 2**30:.1f} GiB" if total_memory() else "unknown",
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "numpy": f"{np.__version__} ({blas()})",
        "bdh-spec": metadata.version("bdh-spec"),
    }
    return found | {name: os.environ[name] for name in SETTINGS if name in os.environ}


def cpu_model() -> str:
    """The processor's own name for itself."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def blas() -> str:
    """The library behind NumPy's products."""
    found: Any = np.show_config(mode="dicts")["Build Dependencies"].get("blas", {})
    return f"{found.get('name', 'unknown BLAS')} {found.get('version', '')}".strip()


def total_memory() -> int:
    """Bytes of the machine or of the container, 0 where the system does not tell."""
    return min((*_meminfo("MemTotal"), *_cgroup("memory.max")), default=0)


def available_memory() -> int:
    """Bytes that a new process can have, as far as the system tells."""
    free = [limit - used for limit in _cgroup("memory.max") for used in _cgroup("memory.current")]
    return min((*_meminfo("MemAvailable"), *free), default=_pages())


def _meminfo(name: str) -> Iterator[int]:
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{name}:"):
                yield int(line.split()[1]) * KILOBYTE


def _cgroup(name: str) -> Iterator[int]:
    with suppress(OSError, ValueError):
        yield int((Path("/sys/fs/cgroup") / name).read_text())


def _pages() -> int:
    if hasattr(os, "sysconf") and {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= set(os.sysconf_names):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 2**62


def settle() -> None:
    """Give back what nobody uses, so that what is left is in use."""
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(ctypes.util.find_library("c")).malloc_trim(0)


def resident() -> int:
    """The bytes of this process in memory now, or its most so far where the system does not tell."""
    return _status("VmRSS") or most_so_far()


def forget_peak() -> None:
    """Count the peak of this process from here on, where the system can; else it stays the most since the start."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The most bytes that this process has had since ``forget_peak``."""
    return _status("VmHWM") or most_so_far()


def most_so_far() -> int:
    """The most bytes that this process ever had."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * KILOBYTE


def _status(name: str) -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * KILOBYTE
    return 0
