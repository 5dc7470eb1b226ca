"""What the measurements ran on."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from typing import Any


_PACKAGES = ("tts_jax", "jax", "jaxlib", "diffrax", "numba", "llvmlite", "torch", "numpy")
_PACKAGES += ("scipy", "scikit-sundae")


def cores() -> int:
    """The number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1


def processor() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> list[str]:
    """JAX's devices, asked in another process: this one stays off the GPU."""
    code = "import jax; print(*sorted({d.device_kind for d in jax.local_devices()}), sep='\\n')"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return asked.stdout.strip().splitlines()


def describe(backend: str) -> dict[str, Any]:
    """The machine, its load now, and the versions of what is compared."""
    return {
        "processor": processor(),
        "cores": cores(),
        "load": _load(),
        "backend": backend,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in _PACKAGES},
        "date": datetime.date.today().isoformat(),
    }
