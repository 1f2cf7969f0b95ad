"""Quantizes one matrix, a piece after the other, into memory that was made for it."""

# SPDX-License-Identifier: Apache-2.0
from typing import NamedTuple

import torch

from ..reference.quantize import dequantize
from ..reference.recipe import BLOCK_SIZE, Recipe
from ..reference.weights.prepare import quantize_weight
from .source import Matrix

_ALIGNMENT = 16
_ON_CPU, _ON_GPU = 1 << 18, 1 << 24
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


def bytes_for(matrix: Matrix) -> int:
    """Return the bytes of memory that a matrix's result takes."""
    return sum(_padded(size) for size in _sizes(matrix))


def room_at(memory: torch.Tensor, offset: int, matrix: Matrix) -> Quantized:
    """Return the part of a memory, uint8, that takes a matrix's result from an offset on.

    Results lie side by side in one memory: between the temporaries of the quantizer they would hold the
    heap's free pieces apart, and several times their own size with them.
    """
    parts = []
    for size in _sizes(matrix):
        parts.append(memory[offset : offset + size])
        offset += _padded(size)
    codes, scales, decode = parts
    shape = matrix.rows, -1
    return Quantized(codes.view(shape), scales.view(shape), decode.view(torch.float32).view(()))


def _sizes(matrix: Matrix) -> tuple[int, int, int]:
    """Return the bytes of codes, block scales and decode scale."""
    return matrix.elements // 2, matrix.elements // BLOCK_SIZE, 4


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


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
