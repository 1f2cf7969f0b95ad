"""The table of `nvfp4-moe doctor`: what a machine has, and the command that mends what is missing."""

# SPDX-License-Identifier: Apache-2.0
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .options import FLASHINFER_VERSIONS

LIBRARIES = ("typer", "rich")
"""The packages that only the command line uses."""
SERVERS = ("sglang", "vllm", "transformers")
"""The packages that the library plugs into."""
_NVCC = "/usr/local/cuda/bin/nvcc"
_MENDS = {
    "triton": "pip install triton",
    "flashinfer-python": "pip install 'flashinfer-python>=0.7'",
    "nvidia-cutlass-dsl": "pip install 'nvidia-cutlass-dsl>=4.8'",
    "typer": "pip install typer",
    "rich": "pip install rich",
}


def system() -> dict[str, str | None]:
    """Return the operating system, the release of nvcc, and the versions of servers and libraries."""
    found = {"system": f"{platform.system()} {platform.release()} {platform.machine()}"}
    packages = {name: _version(name) for name in (*SERVERS, *LIBRARIES)}
    return found | {"nvcc": _nvcc()} | packages


def rows(examined: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return (thing, what is here, the command that mends it) for what `doctor.examine` found."""
    here, versions, driver = examined["system"], examined["versions"], examined["driver"]
    gpus, mends = examined["gpus"], dict(_MENDS)
    no_gpu = not gpus and driver is None
    if no_gpu:  # FlashInfer would find nothing to run on
        del mends["flashinfer-python"], mends["nvidia-cutlass-dsl"]
    torch_mend = ""
    if not gpus and driver is not None:
        torch_mend = "pip install --force-reinstall torch, of a CUDA that the driver supports"
    needs_nvcc = bool(gpus) and versions["flashinfer-python"] is not None and here["nvcc"] is None
    found = [
        ("operating system", here["system"], ""),
        ("Python", versions["python"], ""),
        ("nvfp4-moe", _own(examined), ""),
        ("contract", examined["contract"], ""),
        *(("GPU", gpu, "") for gpu in gpus or ["none"]),
        ("NVIDIA driver", driver or "none", ""),
        ("nvcc", here["nvcc"] or "none", _toolkit() if needs_nvcc else ""),
        ("torch", versions["torch"] or "unknown", torch_mend),
    ]
    for name in ("triton", "flashinfer-python", "nvidia-cutlass-dsl"):
        found.append((name, *_package(versions[name], mends.get(name, ""))))
    if versions["flashinfer-python"] is not None:
        said = examined["flashinfer"]["version"]
        mend = (
            f"pip install flashinfer-python=={FLASHINFER_VERSIONS[-1]}"
            if "not described" in said
            else ""
        )
        found.append(("FlashInfer's functions", said, mend))
    for name in LIBRARIES:
        found.append((name, *_package(here[name], mends[name])))
    for name in SERVERS:
        found.append((name, *_package(here[name], "")))
    for name, key in (("rcp.approx", "rcp_table"), ("routing's functions", "routing_functions")):
        if examined[key] is not None:
            found.append((name, examined[key], ""))
    return [*found, *((f"sums of {b}", how, "") for b, how in examined["sums"].items())]


def _own(examined: dict[str, Any]) -> str:
    given = examined["versions"]["nvfp4-moe"] or "not installed"
    return f"{given}, commit {examined['commit']}" if examined["commit"] else given


def _package(found: str | None, mend: str) -> tuple[str, str]:
    return (found, "") if found is not None else ("not installed", mend)


def _toolkit() -> str:
    return "install the CUDA toolkit, with nvcc on the path: FlashInfer compiles with it"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _nvcc() -> str | None:
    """Return the release of CUDA's compiler; None without one."""
    try:
        said = subprocess.run(
            [shutil.which("nvcc") or _NVCC, "--version"],
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=20,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    release = re.search(r"release ([\d.]+)", said)
    return release[1] if release else None
