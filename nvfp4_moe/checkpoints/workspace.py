"""A folder while a checkpoint is written into it: nothing half written, and resumed where it stopped.

Every file is written under a temporary name, synced and renamed. Beside each finished shard lies a
record in `.nvfp4-moe-convert/`: the identity of the conversion (sources and settings) and the SHA-256
of the shard. A shard is taken as finished only if both still hold. The index comes last: a folder
with one is complete, and is not written to again.
"""

# SPDX-License-Identifier: Apache-2.0
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .errors import CheckpointError
from .files import SUFFIX
from .folder import INDEX

RECORDS = ".nvfp4-moe-convert"
_PART = ".part"


class Workspace:
    """Writes one checkpoint.

    Args:
        identity: of what is written; shards recorded under another are written again.

    Raises:
        CheckpointError: the folder is complete, or has files that no conversion left there.
    """

    def __init__(self, path: Path, identity: str, shards: Sequence[str]):
        self.path, self._identity = path, identity
        self._records = path / RECORDS
        if (path / INDEX).exists():
            raise CheckpointError(path, [f"it is complete: it has {INDEX}; give another folder"])
        resumes = self._records.is_dir()
        if path.exists() and not resumes and (not path.is_dir() or any(path.iterdir())):
            raise CheckpointError(
                path, ["it is neither empty nor an unfinished conversion; give another folder"]
            )
        self._records.mkdir(parents=True, exist_ok=True)
        for stale in path.glob(f"*{SUFFIX}"):
            if stale.name not in shards:
                stale.unlink()

    def finished(self, shard: str) -> dict[str, Any] | None:
        """The facts recorded with a shard that need not be written again."""
        path, record = self.path / shard, self._record(shard)
        try:
            found = json.loads(record.read_text("utf-8"))
            whole = found["identity"] == self._identity and found["sha256"] == sha256(path)
            return found["facts"] if whole else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write_shard(
        self,
        shard: str,
        tensors: dict[str, torch.Tensor],
        metadata: dict[str, str],
        facts: dict[str, Any],
    ) -> None:
        """Write a shard, then its record with the facts."""
        path = self.path / shard
        self._record(shard).unlink(missing_ok=True)
        replace(path, lambda part: save_file(tensors, part, metadata))
        record = {"identity": self._identity, "sha256": sha256(path), "facts": facts}
        self._write_json(self._record(shard), record)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        self._write_json(self.path / name, content)

    def copy(self, source: Path, name: str) -> None:
        """Copy a file, to a path below the folder."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        replace(target, lambda part: shutil.copyfile(source, part))

    def complete(self, index: dict[str, Any]) -> None:
        """Write the index, after everything else; then drop the records."""
        self.write_json(INDEX, index)
        shutil.rmtree(self._records)

    def _record(self, shard: str) -> Path:
        return self._records / f"{shard}.json"

    def _write_json(self, path: Path, content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=2) + "\n"
        replace(path, lambda part: part.write_text(text, "utf-8"))


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file under a temporary name; sync it, and give it its own."""
    part = path.with_name(path.name + _PART)
    write(part)
    _sync(part)
    os.replace(part, path)
    _sync(path.parent)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
