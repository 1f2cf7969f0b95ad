"""A Hugging Face checkpoint folder: its JSON files, and its tensors, memory-mapped.

The tensors lie in safetensors shards that `model.safetensors.index.json` names (`weight_map`: tensor
to file), or, without an index, in every `*.safetensors` file of the folder. A shard is opened when a
tensor in it is asked for, and read a slice at a time.
"""

# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..host import READING
from .errors import CheckpointError
from .mistral import MISTRAL, mistral_config

INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class TensorInfo:
    """What a shard's header says of a tensor; `dtype` is safetensors' name (BF16, F8_E4M3, U8)."""

    dtype: str
    shape: tuple[int, ...]


class Folder:
    """Reads one checkpoint.

    `shard_of` maps every tensor to its file; `broken` maps the files that could not be opened, so
    far, to the reason.

    Raises:
        CheckpointError: no such folder, no safetensors files in it, or unreadable JSON.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.broken: dict[str, str] = {}
        self._files: dict[str, Any] = {}
        self._infos: dict[str, dict[str, TensorInfo | None]] = {}
        if not self.path.is_dir():
            raise CheckpointError(self.path, ["there is no such folder"])
        self.config = self.json("config.json") or mistral_config(self.json(MISTRAL) or {})
        self.index = self.json(INDEX)
        self.shard_of = self._from_files() if self.index is None else self._from_index(self.index)
        self.shards = sorted(set(self.shard_of.values()) | set(self.broken))
        if not self.shards:
            raise CheckpointError(self.path, [f"no {INDEX} and no *{SUFFIX} file"])

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file's object; None where there is no such file."""
        path = self.path / name
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text())
        except ValueError as e:
            raise CheckpointError(self.path, [f"{name}: not JSON: {e}"]) from None
        if not isinstance(found, dict):
            raise CheckpointError(self.path, [f"{name}: not a JSON object"])
        return found

    def info(self, name: str) -> TensorInfo | None:
        """A tensor's dtype and shape; None if its shard lacks it or is in `broken`."""
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
        """The open shard; None, and an entry in `broken`, if it cannot be opened."""
        if shard not in self._files and shard not in self.broken:
            try:
                file = safe_open(self.path / shard, framework="pt")
                self._infos[shard] = dict.fromkeys(file.keys())
                self._files[shard] = file
            except (SafetensorError, OSError) as e:
                self.broken[shard] = f"{shard}: cannot be read: {e}"
        return self._files.get(shard)

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        with READING:
            return self.file(self.shard_of[name]).get_tensor(name)

    def slice(self, name: str) -> Any:
        """A tensor to be read in part: indexing reads what is asked for."""
        return self.file(self.shard_of[name]).get_slice(name)

    def _from_index(self, index: dict[str, Any]) -> dict[str, str]:
        places = index.get("weight_map")
        if not isinstance(places, dict) or not places:
            raise CheckpointError(self.path, [f"{INDEX}: it has no weight_map"])
        wrong = sorted(
            {str(f) for f in places.values() if not (isinstance(f, str) and _is_plain(f))}
        )
        if wrong:
            raise CheckpointError(
                self.path, [f"{INDEX}: {f!r} is not the name of a *{SUFFIX} file" for f in wrong]
            )
        return places

    def _from_files(self) -> dict[str, str]:
        names = sorted(p.name for p in self.path.glob(f"*{SUFFIX}") if _is_plain(p.name))
        return {tensor: name for name in names if self.file(name) for tensor in self._infos[name]}


def _is_plain(name: str) -> bool:
    return name.endswith(SUFFIX) and Path(name).name == name and not name.startswith(".")
