"""A Hugging Face checkpoint folder: its JSON files, and its tensors, memory-mapped.

The tensors lie in safetensors shards that `model.safetensors.index.json` names (`weight_map`: tensor
to file), or, without an index, in every `*.safetensors` file of the folder. A shard is opened when a
tensor in it is asked for, and read a slice at a time. Nothing in a folder is trusted: which files are
opened `files.py` says, which JSON is read `strict_json.py`, and which types it must have
`json_documents.py`.
"""

# SPDX-License-Identifier: Apache-2.0
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .. import strict_json
from ..host import READING
from . import json_documents
from .errors import CheckpointError
from .files import SUFFIX, is_shard_name, local, name_of, refusal
from .mistral import MISTRAL, mistral_config
from .schema import Schema, shown

CONFIG = "config.json"
HF_QUANT_CONFIG = "hf_quant_config.json"
INDEX = "model.safetensors.index.json"
_LONGEST_NAME = 500


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry in a shard's header; `dtype` is safetensors' name (BF16, F8_E4M3, U8)."""

    dtype: str
    shape: tuple[int, ...]


class Folder:
    """Reads one checkpoint.

    `config`, `hf_quant_config` (None without the file) and `index` (None) are JSON objects with the
    types of `json_documents.py`. `shard_of` maps every tensor to its file; `broken` maps the files that
    could not be opened, so far, to the reason.

    Raises:
        CheckpointError: no such folder, no safetensors files in it, or everything that is wrong in
            its JSON files.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.broken: dict[str, str] = {}
        self._files: dict[str, Any] = {}
        self._infos: dict[str, dict[str, TensorInfo | None]] = {}
        try:
            found = self.path.is_dir()
        except OSError as e:
            raise CheckpointError(self.path, [f"it cannot be opened: {e.strerror}"]) from None
        if not found:
            raise CheckpointError(self.path, ["there is no such folder"])
        problems: list[str] = []
        config = self._json(CONFIG, json_documents.CONFIG, problems)
        params = None if config else self._json(MISTRAL, json_documents.PARAMS, problems)
        self.config = config or mistral_config(params or {})
        self.hf_quant_config = self._json(HF_QUANT_CONFIG, json_documents.HF_QUANT_CONFIG, problems)
        self.index = self._json(INDEX, json_documents.INDEX, problems)
        if problems:
            raise CheckpointError(self.path, problems)
        self.shard_of: dict[str, str] = (
            self._from_files() if self.index is None else self.index["weight_map"]
        )
        self.shards = sorted(set(self.shard_of.values()) | set(self.broken))
        if not self.shards:
            raise CheckpointError(self.path, [f"no {INDEX} and no *{SUFFIX} file"])
        if long := [name for name in self.shard_of if len(name) > _LONGEST_NAME]:
            raise CheckpointError(
                self.path,
                [
                    f"{self.shard_of[name]}: the name {shown(name)} is too long; a tensor's may have "
                    f"{_LONGEST_NAME} characters"
                    for name in long
                ],
            )

    def json(self, name: str, schema: Schema) -> dict[str, Any] | None:
        """Read a JSON file's object and check its types; None if there is no such file.

        Raises:
            CheckpointError: everything that is wrong in it.
        """
        problems: list[str] = []
        found = self._json(name, schema, problems)
        if problems:
            raise CheckpointError(self.path, problems)
        return found

    def file_path(self, name: str) -> Path:
        """Return the path of a file of the folder, if it may be opened.

        Raises:
            OSError: there is none, it cannot be reached, or it may not be opened, with the reason.
        """
        path = self.path / local(name)
        if reason := refusal(self.path, path):
            raise OSError(reason)
        return path

    def _json(self, name: str, schema: Schema, problems: list[str]) -> dict[str, Any] | None:
        if not os.path.lexists(self.path / name):
            return None
        try:
            with self.file_path(name).open("rb") as file:
                found = strict_json.parse(file.read(strict_json.MOST_BYTES + 1))
        except OSError as e:
            problems.append(f"{name}: cannot be read: {e.strerror or e}")
        except ValueError as e:
            problems.append(f"{name}: not JSON that is read: {e}")
        else:
            wrong = list(schema.problems("", found))
            problems += [f"{name}: {problem}" for problem in wrong]
            return None if wrong else found
        return None

    def info(self, name: str) -> TensorInfo | None:
        """Return a tensor's dtype and shape; None if its shard lacks it or is in `broken`."""
        shard = self.shard_of.get(name)
        file = None if shard is None else self.file(shard)
        if file is None or shard is None:
            return None
        known = self._infos[shard]
        if name in known and known[name] is None:
            piece = file.get_slice(name)
            known[name] = TensorInfo(piece.get_dtype(), tuple(piece.get_shape()))
        return known.get(name)

    def file(self, shard: str) -> Any:
        """Open a shard; None, and an entry in `broken`, if that fails."""
        if shard not in self._files and shard not in self.broken:
            try:
                file = safe_open(self.file_path(shard), framework="pt")
                self._infos[shard] = dict.fromkeys(file.keys())
                self._files[shard] = file
            except (SafetensorError, OSError) as e:
                self.broken[shard] = f"{shard}: cannot be read: {e}"
        return self._files.get(shard)

    def tensor(self, name: str) -> torch.Tensor:
        """Read a whole tensor.

        Raises:
            CheckpointError: PyTorch has no such dtype.
        """
        try:
            with READING:
                return self.file(self.shard_of[name]).get_tensor(name)
        except SafetensorError as e:
            raise CheckpointError(self.path, [f"{name}: cannot be read: {e}"]) from None

    def slice(self, name: str) -> Any:
        """Return a slice object of a tensor: indexing reads the part that is asked for."""
        return self.file(self.shard_of[name]).get_slice(name)

    def _from_files(self) -> dict[str, str]:
        found: dict[str, str] = {}
        names = {name_of(path.name) for path in self.path.iterdir()}
        for shard in sorted(name for name in names if name is not None and is_shard_name(name)):
            for tensor in self._infos[shard] if self.file(shard) else ():
                if (other := found.setdefault(tensor, shard)) != shard:
                    self.broken[shard] = f"{shard}: it has {tensor}, which {other} has too"
        return found
