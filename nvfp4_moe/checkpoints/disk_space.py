"""Checks that the disk has room for a conversion's result, before anything is written."""

# SPDX-License-Identifier: Apache-2.0
import re
import shutil
from pathlib import Path

from ..reference.recipe import BLOCK_SIZE
from .errors import CheckpointError
from .files import local
from .source import Source


def check_room(source: Source, target: Path) -> None:
    """Check that the shards that the folder lacks fit on its disk.

    Args:
        target: of the conversion; it need not be there.

    Raises:
        CheckpointError: they do not.
    """
    places = [target / local(shard) for shard in source.folder.shards]
    there = sum(place.stat().st_size for place in places if place.is_file())
    needed = result_bytes(source) - there
    disk = next(part for part in (target, *target.absolute().parents) if part.is_dir())
    free = shutil.disk_usage(disk).free
    if free < needed:
        raise CheckpointError(
            target, [f"its disk must have {needed / 1e9:.3f} GB free, and has {free / 1e9:.3f} GB"]
        )


def result_bytes(source: Source) -> int:
    """Return the bytes of the shards that a conversion writes, without the scales of single tensors."""
    folder = source.folder
    total = sum(folder.file_path(shard).stat().st_size for shard in folder.shards)
    for name, matrices in source.matrices.items():
        info = source.folder.info(name)
        assert info is not None
        elements = sum(m.elements for m in matrices)
        bits = int(re.findall(r"\d+", info.dtype)[0])  # of BF16, F16, F8_E4M3
        total += elements // 2 + elements // BLOCK_SIZE - elements * bits // 8
    return total
