"""The files of a checkpoint beside its weights: tokenizer, code, generation settings."""

# SPDX-License-Identifier: Apache-2.0
import os
from collections.abc import Collection
from pathlib import Path

from .errors import CheckpointError
from .files import SUFFIX, name_of, refusal
from .folder import Folder

_WEIGHTS = (SUFFIX, ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
_INDEX = ".index.json"


def other_files(folder: Folder, made: Collection[str]) -> dict[str, Path]:
    """Return the path of each file by its name below the folder, without hidden files and folders.

    Args:
        made: names of files that are made, not copied.

    Raises:
        CheckpointError: a file that may not be opened, or whose name is not UTF-8.
    """
    found: dict[str, Path] = {}
    problems: list[str] = []
    pending = [folder.path]
    while pending:
        for entry in sorted(pending.pop().iterdir()):
            name = name_of(entry.relative_to(folder.path))
            if entry.name.startswith(".") or name in made:
                continue
            if entry.is_dir() and not entry.is_symlink():
                pending.append(entry)
            elif not entry.name.endswith((*_WEIGHTS, _INDEX)):
                try:
                    reason = refusal(folder.path, entry)
                except OSError as e:
                    reason = f"it cannot be read: {e.strerror}"
                if name is None:
                    problems.append(f"{os.fsencode(entry.name)!r}: its name is not UTF-8")
                elif reason is not None:
                    problems.append(f"{name}: {reason}")
                else:
                    found[name] = entry
    if problems:
        raise CheckpointError(folder.path, problems)
    return dict(sorted(found.items()))
