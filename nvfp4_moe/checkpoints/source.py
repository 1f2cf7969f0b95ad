"""The expert weights of an ordinary checkpoint: bf16, fp16, fp32, or FP8 with decode scales.

fp32 weights are quantized as they are, not rounded to bf16 before. FP8 (`fp8_scales.py`) becomes bf16,
which then is quantized. Stacked and fused experts are taken apart, transposed and interleaved ones too.
"""

# SPDX-License-Identifier: Apache-2.0
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch

from .check import Headers
from .errors import CheckpointError
from .folder import Folder
from .formats import BIAS, MIXED, MODELOPT
from .fp8_scales import BLOCK, KINDS, check_scale, dequantize_fp8, find_scale, read_scale
from .groups import read_groups
from .layers import Layer, Projection, count_problem, find_layers
from .locations import Place, read_matrix, read_vector
from .model_config import model_config
from .stacks import settle

WEIGHT, INPUT_SCALE = "weight", "input_scale"
_ORDINARY = ("BF16", "F16", "F32")
_UNREADABLE = ("F6_E2M3", "F6_E3M2")
_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "modelopt_mixed")


@dataclass(frozen=True)
class Matrix:
    """One projection of one expert; `target` is its name in the converted checkpoint."""

    module: str
    expert: int
    projection: Projection
    target: str
    place: Place
    scale: Place | None  # of FP8
    rows: int
    columns: int

    @property
    def elements(self) -> int:
        return self.rows * self.columns


class Values(NamedTuple):
    """The values of a matrix, and what was found in them."""

    weight: torch.Tensor  # [rows, columns] bf16, fp16 or fp32
    amax: float
    problem: str | None


@dataclass
class Source:
    """A checkpoint to convert, its headers checked.

    `matrices` are the weights to quantize, by the tensor that holds them; `biases`, by tensor, the parts
    of stacked or fused ones with their targets; `scales` the tensors of FP8 scales, of weights and of
    activations, which have no place in the result; `excluded` the modules of experts that stay.
    """

    folder: Folder
    layers: list[Layer]
    matrices: dict[str, list[Matrix]] = field(default_factory=dict)
    biases: dict[str, list[tuple[str, Place]]] = field(default_factory=dict)
    scales: set[str] = field(default_factory=set)
    excluded: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._matrix = {
            (m.module, m.expert, m.projection): m for found in self.matrices.values() for m in found
        }

    @property
    def elements(self) -> int:
        """The number of weights to quantize."""
        return sum(m.elements for found in self.matrices.values() for m in found)

    def partners(self, matrix: Matrix) -> list[Matrix]:
        """Return the matrices that share one scale: gate and up, or down alone."""
        keys: tuple[Projection, ...] = ("down",) if matrix.projection == "down" else ("gate", "up")
        found = [self._matrix.get((matrix.module, matrix.expert, p)) for p in keys]
        return [m for m in found if m is not None]

    def replaces(self, name: str) -> bool:
        """True if the result has something else in the place of a tensor."""
        return name in self.matrices or name in self.biases or name in self.scales

    def taken_apart(self, name: str) -> dict[str, torch.Tensor]:
        """Read the biases that a stacked or fused tensor holds, by their names in the result."""
        return {
            f"{target}.{BIAS}": read_vector(self.folder, place).clone()
            for target, place in self.biases.get(name, ())
        }

    def read(self, matrix: Matrix, device: torch.device) -> Values:
        """Read a matrix to a device. Its problem is NaN, infinity, or an FP8 scale below zero."""
        w = read_matrix(self.folder, matrix.place)
        problem = None
        if matrix.scale is not None:
            block = _block_of(self.folder)
            scale = read_scale(self.folder, matrix.scale, matrix.rows, matrix.columns, block)
            if (least := float(scale.amin())) < 0:
                problem = f"{matrix.scale}: it has {least}; a decode scale must be 0 or above"
            w = dequantize_fp8(w, scale)
        w = w.to(device)
        amax = max(abs(float(extreme)) for extreme in w.aminmax())
        if not math.isfinite(amax):
            problem = f"{matrix.place}: it has NaN or infinite values"
        return Values(w, amax, problem)


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
    found = Source(folder, [layer for layer in every if layer.module not in excluded])
    problems = [
        f"exclude has {pattern!r}, which matches no module of experts; it must match one, as "
        f"{' or '.join(x.module for x in every[:1]) or 'none is here'}"
        for pattern in exclude
        if not any(fnmatchcase(x.module, pattern) for x in every)
    ]
    for layer in found.layers:
        if problem := count_problem(folder, layer):
            problems.append(problem)
            continue
        settle(folder, layer)
        check = _SourceCheck(folder, layer, found)
        check.run()
        problems += check.problems
    for name in folder.shard_of:
        if folder.info(name) is None and (shard := folder.shard_of[name]) not in folder.broken:
            problems.append(f"{name}: missing: not in {shard}, where the index has it")
    problems += _names_taken(found)
    if not found.layers:
        problems.append("no layers of experts" + (f" outside {excluded}" if excluded else ""))
    elif not found.matrices and not problems:
        problems.append("no weights of experts to quantize")
    if problems or folder.broken:
        raise CheckpointError(folder.path, [*folder.broken.values(), *dict.fromkeys(problems)])
    return Source(folder, found.layers, found.matrices, found.biases, found.scales, excluded)


def source_quantization(folder: Folder) -> Mapping[str, Any]:
    """Return the checkpoint's description of its own quantization, empty for an ordinary one."""
    config = model_config(folder).get("quantization_config")
    if config:
        return config
    return (folder.hf_quant_config or {}).get("quantization") or {}


def _block_of(folder: Folder) -> tuple[int, int]:
    """Return the rows and columns of the blocks of FP8 scales."""
    block = source_quantization(folder).get("weight_block_size")
    return (block[0], block[1]) if block and len(block) == 2 else BLOCK


def _names_taken(source: Source) -> Iterator[str]:
    """Find names that the conversion would give twice, and tensors that it cannot copy."""
    matrices = [m for of_tensor in source.matrices.values() for m in of_tensor]
    made = Counter(f"{m.target}.{kind}" for m in matrices for kind in MODELOPT.kinds)
    made.update(f"{target}.{BIAS}" for of in source.biases.values() for target, _ in of)
    for name, count in made.items():
        if count > 1:
            yield f"{name}: {count} tensors of the source would become one of this name"
    for name in source.folder.shard_of:
        info = source.folder.info(name)
        if source.replaces(name) or info is None:
            continue
        if name in made:
            yield f"{name}: extra: the conversion makes a tensor of this name"
        if info.dtype in _UNREADABLE:
            yield f"{name}: its dtype is {info.dtype}, which PyTorch cannot read"


def _check_quantization(folder: Folder) -> None:
    """Refuse what is no FP8, by its name; of FP8 the tensors themselves say the rest."""
    config = source_quantization(folder)
    if not config:
        return
    method = config.get("quant_method") or ("modelopt" if "quant_algo" in config else None)
    layers = (config.get("quantized_layers") or {}).values()
    told = [config.get("quant_algo"), *(layer.get("quant_algo") for layer in layers)]
    others = [str(algorithm) for algorithm in told if algorithm and not _is_fp8(str(algorithm))]
    others += [f"{g.name} of {g.described}" for g in read_groups(config) if not g.is_fp8]
    others += [form for form in [str(config.get("format"))] if "nvfp4" in form]
    if str(method).lower() not in _METHODS or others:
        already = any("nvfp4" in other.lower() for other in others)
        more = f", with {', '.join(dict.fromkeys(others))}" if others else ""
        raise CheckpointError(
            folder.path,
            [
                f"its quant_method is {method!r}{more}; a source is not quantized, or FP8 (fp8, "
                "fbgemm_fp8, compressed-tensors or modelopt): convert the checkpoint that it was made "
                "from" + (", or load it as it is" if already else "")
            ],
        )


def _is_fp8(algorithm: str) -> bool:
    """True if ModelOpt calls FP8 so, or leaves the algorithm to each layer."""
    return algorithm.upper().startswith(("FP8", "MXFP8", MIXED))


class _SourceCheck(Headers):
    """Collects the matrices of one layer in a source, and what is wrong with their headers."""

    def __init__(self, folder: Folder, layer: Layer, source: Source):
        super().__init__(folder, layer, range(layer.num_experts), WEIGHT, packed=1)
        self._source, self._block = source, _block_of(folder)

    def run(self) -> None:
        layer, source = self.layer, self._source
        self.extra((WEIGHT, *KINDS, BIAS))
        for (_, _, kind), name in layer.names.items():
            if kind in (*KINDS, INPUT_SCALE):
                source.scales.add(name)
            elif kind not in (WEIGHT, BIAS):
                self.add(
                    f"{name}: extra: the kinds of a source are {WEIGHT}, {BIAS} and FP8's scales"
                )
        if (packed := self._packed()) is not None:
            self.add(packed)
            return
        for expert in self.experts:
            places = {p: layer.place(expert, p, WEIGHT) for p in layer.projections}
            if not any(places.values()):
                self.add(f"{layer.module}.{expert}: missing")
                continue
            for projection, place in places.items():
                self._matrix(expert, projection, place)

    def _packed(self) -> str | None:
        """Say that the weights are packed codes of four bits, where they are."""
        place = self.layer.place(0, "down", WEIGHT)
        info = None if place is None else self.folder.info(place.name)
        if place is None or info is None or info.dtype not in ("U8", "I8", "I32"):
            return None
        return (
            f"{self.layer.module}: its weights are packed, as MXFP4, NVFP4 and INT4 are: {place.name} "
            f"is {info.dtype} {list(info.shape)}; convert the checkpoint that it was made from"
        )

    def _matrix(self, expert: int, projection: Projection, place: Place | None) -> None:
        target = self.layer.module_of(expert, projection)
        if place is None:
            self.add(f"{target}.{WEIGHT}: missing")
            return
        rows, columns = self.size(projection)
        scale = find_scale(self.layer, expert, projection)
        whole = self.whole(place, rows, columns)
        if scale is None:
            self.fits(place, _ORDINARY, whole)
        else:
            self.fits(place, ("F8_E4M3",), whole)
            check_scale(self, scale, rows, columns, self._block)
        matrix = Matrix(self.layer.module, expert, projection, target, place, scale, rows, columns)
        self._source.matrices.setdefault(place.name, []).append(matrix)
        if self.layer.has_bias(projection):
            self._bias(expert, projection, rows, target)

    def _bias(self, expert: int, projection: Projection, rows: int, target: str) -> None:
        place = self.layer.place(expert, projection, BIAS)
        if place is None:
            self.add(f"{target}.{BIAS}: missing")
            return
        self.fits(place, _ORDINARY, self.vector(place, rows))
        self._source.biases.setdefault(place.name, []).append((target, place))
