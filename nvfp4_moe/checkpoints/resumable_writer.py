"""A folder while a checkpoint is written into it: nothing half written, and resumed where it stopped.

Every file is written under a temporary name, synced and renamed. A record in the folder holds the
identity of the conversion (sources and settings), the names of all files that it writes, and of each
finished shard the SHA-256. A shard is taken as finished only if that and the identity still hold. The
index is written after everything else, and the record is removed after that: a folder with an index and
no record is complete, and is not written to again. So a process may end before or in any operation:

    nothing, or the temporary name alone    begun anew
    a record                                resumed; an index beside it is removed first
    an index, no record                     complete
"""

# SPDX-License-Identifier: Apache-2.0
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from .. import strict_json
from .errors import CheckpointError
from .files import local, refusal
from .folder import INDEX
from .json_documents import RECORD as SCHEMA

RECORD = ".nvfp4-moe-convert.json"
PART = ".nvfp4-moe-convert.part"
"""Hidden, since hidden files of a source are not copied: no source has a file of these names."""
_PIECE = 1 << 24
"""Bytes that are hashed at a time. After each piece the thread waits for Python's lock."""


class Workspace:
    """Writes one checkpoint.

    Args:
        identity: of what is written; shards recorded under another are written again.
        names: of all files that will be written, below the folder.

    Raises:
        CheckpointError: the folder is complete, has files that no conversion left there, or cannot be
            written to. So does every method that writes.
    """

    def __init__(self, path: Path, identity: str, names: Sequence[str]):
        self.path = path
        before = _record(path)
        shards = before["shards"] if before and before["identity"] == identity else {}
        self._content: dict[str, Any] = {
            "identity": identity,
            "names": sorted(names),
            "shards": dict(shards),
        }
        with self._writing(""):
            _make_folder(path)
            if before is not None:
                _remove(path / INDEX)
                self._tidy(before["names"])
            self._write_record()

    def finished(self, shard: str) -> dict[str, Any] | None:
        """Return the facts recorded with a shard that need not be written again."""
        found = self._content["shards"].get(shard)
        try:
            whole = found is not None and found["sha256"] == sha256(self._place(shard))
        except OSError:
            return None
        return found["facts"] if whole else None

    def write_shard(
        self,
        shard: str,
        tensors: dict[str, torch.Tensor],
        metadata: dict[str, str],
        facts: dict[str, Any],
    ) -> None:
        """Write a shard, then record it with the facts."""
        with self._writing(shard):
            _replace(self._place(shard), lambda part: save_file(tensors, part, metadata))
            digest = sha256(self._place(shard))
            self._content["shards"][shard] = {"sha256": digest, "facts": facts}
            self._write_record()

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=2) + "\n"
        with self._writing(name):
            _replace(self._place(name), lambda part: part.write_text(text, "utf-8", newline="\n"))

    def copy(self, source: Path, name: str) -> None:
        """Copy a file, to a path below the folder."""
        with self._writing(name):
            _make_folder(self._place(name).parent)
            _replace(self._place(name), lambda part: shutil.copyfile(source, part))

    def complete(self, index: dict[str, Any]) -> None:
        """Write the index, after everything else; then remove the record."""
        self.write_json(INDEX, index)
        with self._writing(INDEX):
            _remove(self.path / RECORD)

    def _tidy(self, before: Sequence[str]) -> None:
        """Remove what an earlier process left: files that are not written again, and temporary ones."""
        for name in before:
            place = self._place(name)
            _remove(place.with_name(PART))
            if name not in self._content["names"]:
                _remove(place)

    def _place(self, name: str) -> Path:
        return self.path / local(name)

    def _write_record(self) -> None:
        text = json.dumps(self._content) + "\n"
        _replace(self.path / RECORD, lambda part: part.write_text(text, "utf-8"))

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """Turn what the system refuses into the one error."""
        try:
            yield
        except (OSError, SafetensorError) as e:
            reason = (isinstance(e, OSError) and e.strerror) or e
            what = f"{name}: it" if name else "it"
            problem = f"{what} cannot be written: {reason}; called again, the conversion is resumed"
            raise CheckpointError(self.path, [problem]) from e


def _record(path: Path) -> dict[str, Any] | None:
    """Return the record of an unfinished conversion; None if there is nothing.

    Raises:
        CheckpointError: the folder is no place for a conversion.
    """
    try:
        found = set(os.listdir(path)) if os.path.lexists(path) else set()
        reason = refusal(path, path / RECORD) if RECORD in found else None
        content = (path / RECORD).read_bytes() if RECORD in found and reason is None else b""
    except OSError as e:
        raise CheckpointError(path, [f"it cannot be written to: {e.strerror}"]) from None
    if RECORD not in found:
        if INDEX in found:
            raise CheckpointError(path, [f"it is complete: it has {INDEX}; give another folder"])
        if found - {PART}:
            raise CheckpointError(
                path, ["it is neither empty nor an unfinished conversion; give another folder"]
            )
        return None
    try:
        record = strict_json.parse(content)
        problems = list(SCHEMA.problems("", record))
    except ValueError as e:
        problems = [reason or str(e)]
    if problems:
        raise CheckpointError(
            path, [f"{RECORD} is damaged: {p}; give another folder" for p in problems]
        )
    return record


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file under the temporary name; sync it, and give it its own."""
    part = path.with_name(PART)
    write(part)
    _sync(part)
    os.replace(part, path)
    _sync(path.parent)


def _remove(path: Path) -> None:
    if os.path.lexists(path):
        os.unlink(path)
        _sync(path.parent)


def _make_folder(path: Path) -> None:
    os.makedirs(path, exist_ok=True)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    piece = memoryview(bytearray(_PIECE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
    return digest.hexdigest()


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
