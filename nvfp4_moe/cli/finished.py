"""Processes of an earlier `blackwell` whose results hold: the same work by the same code and machine."""

# SPDX-License-Identifier: Apache-2.0
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..machine import machine

_NAME = "finished.json"
_PACKAGE = Path(__file__).resolve().parent.parent


def key(arguments: Sequence[str], variables: Mapping[str, str]) -> str:
    """Return a hash of all that a process's result depends on.

    Args:
        arguments: of its command.
        variables: of its environment, beside those that it inherits.
    """
    facts = {"arguments": list(arguments), "variables": dict(variables), **_here()}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def note(folder: Path, key: str) -> None:
    """Note in a process's folder that it ended, and found nothing wrong."""
    (folder / _NAME).write_text(json.dumps({"key": key}) + "\n", "utf-8")


def forget(folder: Path) -> None:
    """Remove the note of an earlier run."""
    (folder / _NAME).unlink(missing_ok=True)


def is_noted(folder: Path, key: str) -> bool:
    """Return True if the folder has the note of a process with this key."""
    try:
        found = json.loads((folder / _NAME).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("key") == key


@functools.cache
def _here() -> dict[str, object]:
    return {"machine": machine(), "sources": _sources()}


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
