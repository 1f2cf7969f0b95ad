"""The environment of a result: versions, commit, contract, GPUs, driver, environment variables."""

# SPDX-License-Identifier: Apache-2.0
import ctypes
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .kernels import environment
from .reference.fingerprint import fingerprint

PACKAGES = ("nvfp4-moe", "torch", "triton", "flashinfer-python", "nvidia-cutlass-dsl")


def machine() -> dict:
    """Return the versions, contract, GPUs, driver and environment that a result depends on."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in PACKAGES},
        "commit": _commit(),
        "contract": fingerprint(),
        "gpus": [_gpu(i) for i in range(count)],
        "driver": _driver(),
        "environment": environment.snapshot(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of a checkout, and if its files were changed; None without a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=, changed"],
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _driver() -> str | None:
    """Return the version of NVIDIA's driver from its library; None without one."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        version = ctypes.create_string_buffer(80)
        failed = library.nvmlInit_v2() or library.nvmlSystemGetDriverVersion(version, 80)
    except (OSError, AttributeError):
        return None
    return None if failed else version.value.decode()


def _gpu(index: int) -> str:
    p = torch.cuda.get_device_properties(index)
    memory = f"{p.total_memory / 2**30:.0f} GiB"
    return f"{p.name}, sm_{p.major}{p.minor}, {memory}, CUDA {torch.version.cuda}"
