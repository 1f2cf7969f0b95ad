"""Convert an ordinary checkpoint to a ModelOpt-style NVFP4 one: quantize the weights of its experts.

Gate and up of an expert share one global scale; an expert of zeros has scale 1. Each shard of the
source becomes one shard, under the same name; its other tensors are copied as they are.
"""

# SPDX-License-Identifier: Apache-2.0
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..reference import checks
from ..reference.numerics.subnormals import kept
from ..reference.quantize import dequantize
from ..reference.recipe import BLOCK_SIZE, Recipe, check_recipe
from ..reference.weights.prepare import quantize_weight
from .disk_space import check_room
from .errors import CheckpointError
from .files import local
from .folder import HF_QUANT_CONFIG, INDEX, Folder
from .formats import MODELOPT
from .layer_error import LayerError, merge
from .modelopt_config import configurations, describe
from .other_files import other_files
from .progress import Progress, silent
from .resumable_writer import Workspace
from .source import Matrix, Source, open_source

_VERSION = 3
"""The version of what a conversion writes; a conversion that is resumed must share it."""


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
    which keeps the shards that are finished and leaves the same files to the byte. Memory: one shard of
    the result, and an expert. The destination is complete when it has its index.

    Args:
        source: folder of the checkpoint; formats in `source.py` and `fp8_scales.py`, names in
            `naming.py`. Stacked and fused experts become per-expert tensors, biases too. fp32 weights
            are quantized as they are, FP8 by way of bf16. Scales of FP8 activations are dropped.
        destination: new, empty, or left by an interrupted conversion.
        recipe: of the weights; exact math by default.
        exclude: patterns with wildcards of modules of experts that stay as they are.
        input_scale: write activation scales of 1.0, which ModelOpt checkpoints have and per-token
            serving does not read. They are neutral, not calibrated: no good for static scales.
        device: where to quantize.
        progress: called after each expert's projection.

    Raises:
        CheckpointError: with everything wrong with the source's headers and files, before anything is
            written; with every weight that is NaN or infinite, and every FP8 scale below zero, in a
            shard, before that shard is written;
            a destination that is complete, not ours, too small, or cannot be written to; a pattern of
            `exclude` that matches nothing.
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
    converter = _Converter(plan, recipe, input_scale, where, progress or silent)
    check_room(plan, target)
    identity = _identity(plan, recipe, input_scale)
    inner, outer = describe(plan, recipe)
    described = {**configurations(plan.folder, inner), HF_QUANT_CONFIG: outer}
    rest = other_files(plan.folder, described)
    shards = plan.folder.shards
    work = Workspace(target, identity, [*shards, *rest, *described, INDEX])

    facts = []
    for shard in shards:
        done = work.finished(shard)
        if done is None:
            tensors, done = converter.shard(shard)
            work.write_shard(shard, tensors, plan.folder.file(shard).metadata() or {}, done)
            del tensors
        else:
            converter.skip(shard)
        facts.append(done)
    for name, path in rest.items():
        work.copy(path, name)
    for name, content in described.items():
        work.write_json(name, content)
    work.complete(_index(plan.folder, target))
    found = merge(facts)
    return [found[layer.module] for layer in plan.layers]


class _Converter:
    """Makes the tensors of one shard at a time."""

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        input_scale: bool,
        device: torch.device,
        progress: Progress,
    ):
        self._source, self._recipe, self._input_scale = source, recipe, input_scale
        self._device, self._progress = device, progress
        self._total = sum(map(len, source.matrices.values()))
        self._done = 0

    def shard(self, shard: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the shard's tensors, and the sums of squares of the error by module and projection."""
        folder = self._source.folder
        names = [name for name, file in folder.shard_of.items() if file == shard]
        self._check_values(names)
        kept = _Kept([m for name in names for m in self._source.matrices.get(name, ())])
        tensors: dict[str, torch.Tensor] = {}
        errors: dict[str, LayerError] = {}
        for name in names:
            for matrix in self._source.matrices.get(name, ()):
                layer = errors.setdefault(matrix.module, LayerError(matrix.module))
                made = self._quantize(matrix, layer)
                tensors |= {name: kept.copy(tensor) for name, tensor in made.items()}
                self._step(matrix.target)
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

    def _step(self, what: str) -> None:
        self._done += 1
        self._progress(self._done, self._total, what)

    def _check_values(self, names: list[str]) -> None:
        matrices = [m for name in names for m in self._source.matrices.get(name, ())]
        asked = dict.fromkeys(p for m in matrices for p in self._source.partners(m))
        if bad := [problem for m in asked if (problem := self._source.problem(m)) is not None]:
            raise CheckpointError(self._source.folder.path, bad)

    def _quantize(self, matrix: Matrix, error: LayerError) -> dict[str, torch.Tensor]:
        w = self._source.weight(matrix).to(self._device)
        shared = self._source.shared_amax(matrix)
        amax = torch.tensor(shared, dtype=torch.float32, device=self._device)
        codes, scales, decode = quantize_weight(w, amax, self._recipe)
        exact = w.double()
        difference = dequantize(codes, scales, decode).double() - exact
        squares = (difference.square().sum(), exact.square().sum())
        error.add(matrix.projection, *(float(s) for s in squares))
        made = {
            MODELOPT.codes: codes,
            MODELOPT.block_scales: scales.view(torch.float8_e4m3fn),
            MODELOPT.weight_scale: decode,
        }
        if self._input_scale:
            made[MODELOPT.input_scale] = torch.ones((), dtype=torch.float32, device="cpu")
        return {f"{matrix.target}.{kind}": t for kind, t in made.items()}


class _Kept:
    """The results of a shard, in one piece of memory.

    Between the larger temporaries of the quantizer they would hold the heap's free pieces apart, and
    several times their own size with them.
    """

    _ALIGNMENT = 16

    def __init__(self, matrices: Sequence[Matrix]):
        # A code and a share of a block scale for each element, and two scalars for each matrix.
        sizes = (m.elements // 2 + m.elements // BLOCK_SIZE + 4 * self._ALIGNMENT for m in matrices)
        self._memory = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu")
        self._used = 0

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        part = self._memory[self._used : self._used + tensor.nbytes]
        self._used += -(-tensor.nbytes // self._ALIGNMENT) * self._ALIGNMENT
        return part.view(tensor.dtype).view(tensor.shape).copy_(tensor)


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
