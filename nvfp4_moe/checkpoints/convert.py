"""Convert an ordinary checkpoint to a ModelOpt-style NVFP4 one: quantize the weights of its experts.

Gate and up of an expert share one global scale; an expert of zeros has scale 1. Each shard of the
source becomes one shard, under the same name; its other tensors are copied as they are.
"""

# SPDX-License-Identifier: Apache-2.0
import hashlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..reference import checks
from ..reference.numerics.subnormals import kept
from ..reference.recipe import Recipe, check_recipe
from .background import Background
from .disk_space import check_room
from .errors import CheckpointError
from .files import local
from .folder import HF_QUANT_CONFIG, INDEX, Folder
from .formats import MODELOPT
from .layer_error import LayerError, merge
from .modelopt_config import configurations, describe
from .other_files import other_files
from .progress import Progress, silent
from .quantized_matrix import bytes_for
from .quantizer import Found, Group, Quantizer
from .resumable_writer import Workspace
from .source import Matrix, Source, open_source
from .workers import Workers, places_of, start_workers

_VERSION = 4
"""The version of what a conversion writes; a conversion that is resumed must share it."""
_SLOTS = 2
"""Shards in memory: one is quantized while the one before is written."""


@kept
def convert(
    source: Path | str,
    destination: Path | str,
    *,
    recipe: Recipe | None = None,
    exclude: Sequence[str] = (),
    input_scale: bool = True,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> list[LayerError]:
    """Quantize the experts of a bf16, fp16, fp32 or FP8 checkpoint to NVFP4.

    Contract: `load_experts` of the result gives bitwise the `Experts` of `prepare_experts` with the
    same recipe; so does a conversion that was interrupted, in whatever operation, and called again,
    which keeps the shards that are finished and leaves the same files to the byte. Memory: two shards of
    the result, of which one is quantized and one is written, and for each worker an expert's weights.
    The destination is complete when it has its index.

    Args:
        source: folder of the checkpoint; formats in `source.py` and `fp8_scales.py`, names in
            `naming.py`. Stacked and fused experts become per-expert tensors, biases too. fp32 weights
            are quantized as they are, FP8 by way of bf16. Scales of FP8 activations are dropped.
        destination: new, empty, or left by an interrupted conversion.
        recipe: of the weights; exact math by default.
        exclude: patterns with wildcards of modules of experts that stay as they are.
        input_scale: write activation scales of 1.0, which ModelOpt checkpoints have and per-token
            serving does not read. They are neutral, not calibrated: no good for static scales.
        device: where to quantize: "cpu" in as many forked processes as torch uses threads (in threads
            where the system is not Linux), "cuda" with every GPU, or one GPU, as "cuda:1".
        progress: called when all is checked, with no step done, and after each expert's projection, in
            the thread of the caller.

    Raises:
        CheckpointError: with everything wrong with the source's headers and files, before anything is
            written; with every weight that is NaN or infinite, and every FP8 scale below zero, in a
            shard, before that shard is written;
            a destination that is complete, not ours, too small, or cannot be written to; a pattern of
            `exclude` that matches nothing; a forked process that was ended.
        ValueError, TypeError: another argument, named.
    """
    checks.path("source", source)
    checks.path("destination", destination)
    check_recipe(recipe)
    checks.strings("exclude", exclude, "a list of patterns, as ['model.layers.61.*']")
    checks.flag("input_scale", input_scale)
    where = checks.device("device", device)
    checks.function("progress", progress, optional=True)
    recipe = recipe or Recipe("exact")
    given, target = Path(source), Path(destination)
    if Path(os.path.realpath(target)).is_relative_to(os.path.realpath(given)):
        raise CheckpointError(target, [f"it is inside the source {given}; give another folder"])
    plan = open_source(Folder(given), exclude)
    check_room(plan, target)
    identity = _identity(plan, recipe, input_scale)
    inner, outer = describe(plan, recipe)
    described = {**configurations(plan.folder, inner), HF_QUANT_CONFIG: outer}
    rest = other_files(plan.folder, described)
    shards = plan.folder.shards
    work = Workspace(target, identity, [*shards, *rest, *described, INDEX])

    facts: dict[str, dict[str, Any]] = {}
    quantizer = Quantizer(plan, recipe, _SLOTS * _largest(plan))
    with start_workers(places_of(where), quantizer) as workers, Background() as writer:
        converter = _Converter(plan, input_scale, quantizer, workers, progress or silent)
        converter.begin()
        for shard in shards:
            if (found := work.finished(shard)) is not None:
                converter.skip(shard)
                facts[shard] = found
        for shard in shards:
            if shard not in facts:
                tensors, facts[shard] = converter.shard(shard)
                metadata = plan.folder.file(shard).metadata() or {}
                writer.start(work.write_shard, shard, tensors, metadata, facts[shard])
                del tensors
    for name, path in rest.items():
        work.copy(path, name)
    for name, content in described.items():
        work.write_json(name, content)
    work.complete(_index(plan.folder, target))
    errors = merge(facts[shard] for shard in shards)
    return [errors[layer.module] for layer in plan.layers]


@kept
def estimate_seconds(source: Source, recipe: Recipe, device: torch.device) -> float:
    """Estimate how long quantizing a source takes, by a trial: a few experts of its first shard.

    Nothing is written, and the estimate leaves writing out.
    """
    places = places_of(device)
    chosen = _first_matrices(source, 2 * len(places))
    quantizer = Quantizer(source, recipe, sum(map(bytes_for, chosen)))
    with start_workers(places, quantizer) as workers:
        converter = _Converter(source, False, quantizer, workers, silent)
        return converter.trial(chosen, len(places))


class _Converter:
    """Makes the tensors of one shard at a time."""

    def __init__(
        self,
        source: Source,
        input_scale: bool,
        quantizer: Quantizer,
        workers: Workers,
        progress: Progress,
    ):
        self._source, self._input_scale = source, input_scale
        self._quantizer, self._workers, self._progress = quantizer, workers, progress
        self._total = sum(map(len, source.matrices.values()))
        self._done = self._slot = 0

    def begin(self) -> None:
        self._progress(0, self._total, "")

    def shard(self, shard: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the shard's tensors, and the sums of squares of the error by module and projection.

        The call after the next overwrites the tensors.
        """
        folder = self._source.folder
        names = [name for name, file in folder.shard_of.items() if file == shard]
        matrices = [m for name in names for m in self._source.matrices.get(name, ())]
        offsets = _offsets(matrices, self._slot * self._quantizer.size // _SLOTS)
        self._slot = (self._slot + 1) % _SLOTS
        errors: dict[str, LayerError] = {}
        problems: list[str] = []
        for found in self._quantize(self._groups(offsets)):
            problems += found.problems
            for matrix, sums in found.squares.items():
                layer = errors.setdefault(matrix.module, LayerError(matrix.module))
                layer.add(matrix.projection, *sums)
                self._done += 1
                self._progress(self._done, self._total, matrix.target)
        if problems:
            raise CheckpointError(folder.path, problems)
        tensors = {n: t for matrix in matrices for n, t in self._named(matrix, offsets[matrix])}
        for name in names:
            tensors |= self._source.taken_apart(name)
            if not self._source.replaces(name):
                tensors[name] = folder.tensor(name)
        return tensors, {module: layer.sums for module, layer in errors.items()}

    def skip(self, shard: str) -> None:
        """Count the matrices of a shard that was finished before."""
        for name, matrices in self._source.matrices.items():
            if self._source.folder.shard_of[name] == shard:
                self._done += len(matrices)
        self._progress(self._done, self._total, f"{shard} was finished before")

    def trial(self, chosen: list[Matrix], count: int) -> float:
        """Quantize as many groups of some matrices, twice; returns the seconds that all would take."""
        groups = self._groups(_offsets(chosen, 0))
        some = list(itertools.islice(itertools.cycle(groups), count))
        for _ in range(2):  # the first time also reads, and starts the threads
            start = time.monotonic()
            list(self._quantize(some))
        seconds = time.monotonic() - start
        tried = sum(m.elements for group in some for m in group.offsets)
        return seconds * self._source.elements / tried

    def _groups(self, offsets: dict[Matrix, int]) -> list[Group]:
        """Put the matrices of a shard that share a scale together."""
        groups: dict[Matrix, Group] = {}
        for matrix, offset in offsets.items():
            partners = self._source.partners(matrix)
            group = groups.setdefault(partners[0], Group(partners, {}))
            group.offsets[matrix] = offset
        return list(groups.values())

    def _quantize(self, groups: list[Group]) -> Iterator[Found]:
        try:
            yield from self._workers.map(groups)
        except ChildProcessError as e:
            problem = f"{e}; called again, the conversion is resumed"
            raise CheckpointError(self._source.folder.path, [problem]) from e

    def _named(self, matrix: Matrix, offset: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield a matrix's tensors with their names in the result."""
        room = self._quantizer.room(matrix, offset)
        yield f"{matrix.target}.{MODELOPT.codes}", room.codes
        yield f"{matrix.target}.{MODELOPT.block_scales}", room.scales.view(torch.float8_e4m3fn)
        yield f"{matrix.target}.{MODELOPT.weight_scale}", room.decode
        if self._input_scale:
            one = torch.ones((), dtype=torch.float32, device="cpu")
            yield f"{matrix.target}.{MODELOPT.input_scale}", one


def _offsets(matrices: Sequence[Matrix], first: int) -> dict[Matrix, int]:
    """Return the offset of each matrix's result in memory, in bytes, one after the other."""
    sizes = map(bytes_for, matrices)
    return dict(zip(matrices, itertools.accumulate(sizes, initial=first), strict=False))


def _largest(source: Source) -> int:
    """Return the bytes of the results of the shard that has most of them."""
    sizes: Counter[str] = Counter()
    for name, matrices in source.matrices.items():
        sizes[source.folder.shard_of[name]] += sum(map(bytes_for, matrices))
    return max(sizes.values())


def _first_matrices(source: Source, count: int) -> list[Matrix]:
    """Choose about as many matrices of the first shard that has some."""
    first = next(iter(source.matrices))
    shard = source.folder.shard_of[first]
    chosen: list[Matrix] = []
    for name, matrices in source.matrices.items():
        if source.folder.shard_of[name] == shard and len(chosen) < count:
            chosen += matrices[:count]
    return chosen


def _identity(source: Source, recipe: Recipe, input_scale: bool) -> str:
    """Hash a conversion: its settings, and the names, sizes and times of the source's files."""
    folder = source.folder
    stats = {shard: folder.file_path(shard).stat() for shard in folder.shards}
    content = {
        "version": _VERSION,
        "recipe": recipe.code,
        "input_scale": input_scale,
        "excluded": source.excluded,
        "shards": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "tensors": folder.shard_of,
        "config": [folder.config, folder.hf_quant_config],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _index(source: Folder, target: Path) -> dict[str, Any]:
    """Return the index of the shards that were written."""
    places: dict[str, str] = {}
    size = 0
    for shard in source.shards:
        with (target / local(shard)).open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                places[name] = shard
                size += entry["data_offsets"][1] - entry["data_offsets"][0]
    metadata = dict((source.index or {}).get("metadata") or {}) | {"total_size": size}
    return {"metadata": metadata, "weight_map": dict(sorted(places.items()))}
