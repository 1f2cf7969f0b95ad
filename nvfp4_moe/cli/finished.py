"""Processes of an earlier `blackwell` whose results hold: the same work by the same code and machine."""

# SPDX-License-Identifier: Apache-2.0
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path

from ..machine import machine

_NAME = "finished.json"
_REPORT = "report.json"
_PREFIXES = (
    "CUBLAS", "CUDA", "CUDNN", "CUTE", "CUTLASS", "FLASHINFER", "NCCL", "NVCC", "NVFP4_MOE", "NVIDIA",
    "PYTORCH", "SGLANG", "TLLM", "TORCH", "TRITON", "TRTLLM",
)  # fmt: skip
"""The beginnings of the names of variables that kernels, compilers and this library read."""
_PACKAGE = Path(__file__).resolve().parent.parent


def key(arguments: Sequence[str], variables: Mapping[str, str]) -> str:
    """Return a hash of all that a process's result depends on.

    Args:
        arguments: of its command.
        variables: of its environment; those of other programs are left out.
    """
    read = {name: value for name, value in variables.items() if name.startswith(_PREFIXES)}
    facts = {"arguments": list(arguments), "variables": read, **_here()}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def note(folder: Path, key: str) -> None:
    """Note in a process's folder that it ended, found nothing wrong, and wrote the report there."""
    noted = {"key": key, "report": _hash_of_report(folder)}
    (folder / _NAME).write_text(json.dumps(noted) + "\n", "utf-8")


def forget(folder: Path) -> None:
    """Remove the note of an earlier run."""
    (folder / _NAME).unlink(missing_ok=True)


def is_noted(folder: Path, key: str) -> bool:
    """Return True if the folder has the note of a process with this key, and its report."""
    try:
        found = json.loads((folder / _NAME).read_text("utf-8"))
        return bool(found == {"key": key, "report": _hash_of_report(folder)})
    except (OSError, ValueError):
        return False


@functools.cache
def _here() -> dict[str, object]:
    return {"machine": machine(), "packages": _packages(), "sources": _sources()}


def _hash_of_report(folder: Path) -> str:
    return hashlib.sha256((folder / _REPORT).read_bytes()).hexdigest()


def _packages() -> list[str]:
    """Return every installed package with its version: libraries of kernels are among them."""
    return sorted({f"{d.name} {d.version}" for d in distributions()})


def _sources() -> str:
    """Return a hash of every file of the package: a changed checkout keeps its commit."""
    digest = hashlib.sha256()
    for folder, folders, names in os.walk(_PACKAGE, followlinks=True):
        folders[:] = sorted(f for f in folders if f != "__pycache__")
        for name in sorted(names):
            path = Path(folder, name)
            digest.update(f"{path.relative_to(_PACKAGE)}\n".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
