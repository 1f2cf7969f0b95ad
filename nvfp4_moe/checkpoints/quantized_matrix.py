"""Quantizes one matrix, a piece after the other, into memory that was made for it."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..reference.quantize import dequantize
from ..reference.recipe import BLOCK_SIZE, Recipe
from ..reference.weights.prepare import quantize_weight
from .source import Matrix

_ALIGNMENT = 16
_ON_CPU, _ON_GPU = 1 << 17, 1 << 24
"""Elements of a piece. On a CPU its intermediates, of 4 bytes an element, fit into a core's cache."""


class Quantized(NamedTuple):
    """The memory of a quantized matrix [rows, K], on the CPU."""

    codes: torch.Tensor  # [rows, K/2] uint8
    scales: torch.Tensor  # [rows, K/16] uint8 e4m3
    decode: torch.Tensor  # [] fp32


class Squares(NamedTuple):
    """Sums of squares over a matrix."""

    error: float
    weights: float


def room_for(matrices: Sequence[Matrix]) -> list[Quantized]:
    """Allocate the results of some matrices, in one piece of memory.

    Between the temporaries of the quantizer they would hold the heap's free pieces apart, and several
    times their own size with them.
    """
    sizes = [(m.elements // 2, m.elements // BLOCK_SIZE, 4) for m in matrices]
    padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for of_matrix in sizes for size in of_matrix]
    parts = iter(torch.empty(sum(padded), dtype=torch.uint8, device="cpu").split(padded))
    rooms = []
    for matrix, of_matrix in zip(matrices, sizes, strict=True):
        codes, scales, decode = (next(parts)[:size] for size in of_matrix)
        shape = matrix.rows, -1
        rooms.append(
            Quantized(codes.view(shape), scales.view(shape), decode.view(torch.float32).view(()))
        )
    return rooms


def quantize_into(room: Quantized, w: torch.Tensor, amax: float, recipe: Recipe) -> Squares:
    """Quantize a matrix as `prepare_experts` does, and return the error.

    Args:
        w: [rows, K] bf16, fp16 or fp32, on any device.
        amax: the largest magnitude of all matrices that share the scale.
    """
    shared = torch.tensor(amax, dtype=torch.float32, device=w.device)
    piece = _ON_CPU if w.device.type == "cpu" else _ON_GPU
    rows = max(1, piece // w.shape[1])
    sums = []
    for first in range(0, len(w), rows):
        part = slice(first, first + rows)
        codes, scales, decode = quantize_weight(w[part], shared, recipe)
        room.codes[part].copy_(codes)
        room.scales[part].copy_(scales)
        room.decode.copy_(decode)
        sums.append(_sums(w[part], codes, scales, decode))
    unit = float(room.decode) ** 2
    error, weights = torch.stack(sums).sum(0).tolist()
    return Squares(error * unit, weights * unit)


def _sums(
    w: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, decode: torch.Tensor
) -> torch.Tensor:
    """Return the sums of squares of error and weights, [2] fp64, in units of the squared decode scale.

    In these units no square leaves fp32, whatever the size of the weights.
    """
    exact = w.float() / decode
    error = dequantize(codes, scales, torch.ones_like(decode)).sub_(exact)
    return torch.stack([t.square_().sum(-1).double().sum() for t in (error, exact)])
