"""The expert weights of an ordinary checkpoint: bf16, fp16, or FP8 with a scale a block of 128x128.

FP8 as DeepSeek-V3 has it (`quantization_config` with `quant_method` fp8 and `weight_block_size`
[128, 128]): `weight` e4m3 [rows, K], `weight_scale_inv` fp32 [rows/128, K/128], rounded up, which
despite its name is the decode scale. Value: e4m3 * scale in fp32, rounded once to bf16, which is then
what is quantized.
"""

# SPDX-License-Identifier: Apache-2.0
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch

from .check import Headers
from .errors import CheckpointError
from .folder import Folder
from .layers import Layer, Projection, count_problem, find_layers
from .places import Place, read_matrix
from .stacks import settle

BLOCK = 128
WEIGHT, BLOCK_SCALE = "weight", "weight_scale_inv"
_ORDINARY = ("BF16", "F16")


@dataclass(frozen=True)
class Matrix:
    """One projection of one expert; `target` is its name in the converted checkpoint."""

    module: str
    expert: int
    projection: Projection
    target: str
    place: Place
    scale: Place | None  # of FP8 blocks
    elements: int


@dataclass
class Source:
    """A checkpoint to convert, its headers checked.

    `matrices` are the weights to quantize, by the tensor that holds them; `scales` the tensors of
    their FP8 scales, which have no place in the result; `excluded` the modules of experts that stay.
    """

    folder: Folder
    layers: list[Layer]
    matrices: dict[str, list[Matrix]] = field(default_factory=dict)
    scales: set[str] = field(default_factory=set)
    excluded: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        # The two that share a scale are asked for in turn, by its maximum and to be quantized.
        self.weight = functools.lru_cache(maxsize=2)(self._weight)
        self._matrix = {
            (m.module, m.expert, m.projection): m for found in self.matrices.values() for m in found
        }
        self.amax = functools.cache(self._amax)

    def partners(self, matrix: Matrix) -> list[Matrix]:
        """The matrices of one scale: gate and up, wherever they lie, or down alone."""
        keys: tuple[Projection, ...] = ("down",) if matrix.projection == "down" else ("gate", "up")
        found = [self._matrix.get((matrix.module, matrix.expert, p)) for p in keys]
        return [m for m in found if m is not None]

    def _weight(self, matrix: Matrix) -> torch.Tensor:
        """[rows, K] bf16 or fp16."""
        w = read_matrix(self.folder, matrix.place)
        return (
            w if matrix.scale is None else dequantize_fp8(w, read_matrix(self.folder, matrix.scale))
        )

    def _amax(self, matrix: Matrix) -> float:
        # A float: small tensors that live on would hold the heap's large free pieces apart.
        return float(self.weight(matrix).abs().amax())

    def shared_amax(self, matrix: Matrix) -> float:
        """The largest magnitude of all that share the scale, which are finite."""
        return max(self.amax(m) for m in self.partners(matrix))


def dequantize_fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """e4m3 [rows, K] and decode scales of 128x128 blocks to bf16 [rows, K], rounded once."""
    rows, columns = weight.shape
    by_row = scale.float().repeat_interleave(BLOCK, 0)[:rows]
    return (weight.float() * by_row.repeat_interleave(BLOCK, 1)[:, :columns]).bfloat16()


def open_source(folder: Folder, exclude: Sequence[str]) -> Source:
    """Find what is to be quantized, and check every header.

    Args:
        exclude: patterns with wildcards of modules of experts (`model.layers.61.mlp.experts`).

    Raises:
        CheckpointError: quantized otherwise, no experts, or the list of what is wrong.
    """
    _check_quantization(folder)
    every = find_layers(folder)
    excluded = [x.module for x in every if any(fnmatchcase(x.module, p) for p in exclude)]
    layers = [layer for layer in every if layer.module not in excluded]
    matrices: dict[str, list[Matrix]] = {}
    problems: list[str] = []
    for layer in layers:
        if problem := count_problem(folder, layer):
            problems.append(problem)
            continue
        settle(folder, layer)
        check = _SourceCheck(folder, layer)
        for matrix in check.run():
            matrices.setdefault(matrix.place.name, []).append(matrix)
        problems += check.problems
    for name in folder.shard_of:
        if folder.info(name) is None and (shard := folder.shard_of[name]) not in folder.broken:
            problems.append(f"{name}: missing: not in {shard}, where the index has it")
    if not layers:
        problems.append("no layers of experts" + (f" outside {excluded}" if excluded else ""))
    if problems or folder.broken:
        raise CheckpointError(folder.path, [*folder.broken.values(), *dict.fromkeys(problems)])
    scales = {m.scale.name for found in matrices.values() for m in found if m.scale is not None}
    return Source(folder, layers, matrices, scales, excluded)


def _check_quantization(folder: Folder) -> None:
    config = folder.config.get("quantization_config")
    if not config and folder.hf_quant_config is None:
        return
    method, block = (config or {}).get("quant_method"), (config or {}).get("weight_block_size")
    if method != "fp8" or block != [BLOCK, BLOCK]:
        raise CheckpointError(
            folder.path,
            [
                f"its quant_method is {method!r}, its weight_block_size {block!r}; a source is not "
                f"quantized, or fp8 by blocks of [{BLOCK}, {BLOCK}]"
            ],
        )


class _SourceCheck(Headers):
    """The matrices of one layer, and what is wrong with their headers."""

    def __init__(self, folder: Folder, layer: Layer):
        super().__init__(folder, layer, range(layer.num_experts), WEIGHT, packed=1)

    def run(self) -> list[Matrix]:
        layer = self.layer
        self.extra((WEIGHT, BLOCK_SCALE))
        for (expert, _, kind), name in layer.names.items():
            if expert is None and kind not in (WEIGHT, BLOCK_SCALE):
                self.add(f"{name}: extra: of stacked tensors only the weights can be taken apart")
        found = []
        for expert in self.experts:
            places = {p: layer.place(expert, p, WEIGHT) for p in layer.projections}
            if not any(places.values()):
                self.add(f"{layer.module}.{expert}: missing")
                continue
            for projection, place in places.items():
                target = layer.module_of(expert, projection)
                if place is None:
                    self.add(f"{target}.{WEIGHT}: missing")
                    continue
                scale = self._scale(expert, projection, place)
                elements = math.prod(self.size(projection))
                found.append(
                    Matrix(layer.module, expert, projection, target, place, scale, elements)
                )
        return found

    def _scale(self, expert: int, projection: Projection, place: Place) -> Place | None:
        """Check a matrix, and find its FP8 scale."""
        rows, columns = self.size(projection)
        whole = self.whole(place, rows, columns)
        scale = self.layer.place(expert, projection, BLOCK_SCALE)
        if scale is None:
            self.fits(place, _ORDINARY, whole)
            return None
        self.fits(place, ("F8_E4M3",), whole)
        if scale.half is not None and rows % BLOCK:
            self.add(
                f"{place.name}: gate and up, of {rows} rows each, share an FP8 block of {BLOCK}"
            )
        blocks = self.whole(scale, -(-rows // BLOCK), -(-columns // BLOCK))
        self.fits(scale, ("F32", "BF16"), blocks)
        return scale
