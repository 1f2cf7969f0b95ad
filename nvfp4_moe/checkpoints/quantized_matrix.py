"""Quantizes matrices, a piece after the other, into memory that was made for them."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator, Sequence
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


def quantize_into(
    rooms: Sequence[Quantized], weights: Sequence[torch.Tensor], amax: float, recipe: Recipe
) -> list[Squares]:
    """Quantize matrices that share a scale as `prepare_experts` does, and return the error of each.

    Args:
        weights: [rows, K] bf16, fp16 or fp32 each, on one device.
        amax: the largest magnitude of all matrices that share the scale.
    """
    shared = torch.tensor(amax, dtype=torch.float32, device=weights[0].device)
    sums: list[list[torch.Tensor]] = [[] for _ in weights]
    for w, parts in _pieces(weights):
        codes, scales, decode = quantize_weight(w, shared, recipe)
        squares = _squares(w, codes, scales, decode)
        first = 0
        for number, rows in parts:
            here = slice(first, first := first + rows.stop - rows.start)
            room = rooms[number]
            room.codes[rows].copy_(codes[here])
            room.scales[rows].copy_(scales[here])
            room.decode.copy_(decode)
            sums[number].append(squares[:, here].sum(1))
    found = []
    for room, of_matrix in zip(rooms, sums, strict=True):
        unit = float(room.decode) ** 2
        error, signal = torch.stack(of_matrix).sum(0).tolist()
        found.append(Squares(error * unit, signal * unit))
    return found


def _pieces(
    weights: Sequence[torch.Tensor],
) -> Iterator[tuple[torch.Tensor, list[tuple[int, slice]]]]:
    """Yield rows to quantize at a time, and from which rows of which matrices they are.

    Matrices that fit into one piece are joined: on a GPU an operation's time is that of its launch.
    """
    piece = _ON_CPU if weights[0].device.type == "cpu" else _ON_GPU
    alike = len({(w.dtype, w.shape[1]) for w in weights}) == 1
    if alike and len(weights) > 1 and sum(w.numel() for w in weights) <= piece:
        yield torch.cat(list(weights)), [(i, slice(0, len(w))) for i, w in enumerate(weights)]
        return
    for i, w in enumerate(weights):
        rows = max(1, piece // w.shape[1])
        for first in range(0, len(w), rows):
            part = slice(first, min(first + rows, len(w)))
            yield w[part], [(i, part)]


def _squares(
    w: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, decode: torch.Tensor
) -> torch.Tensor:
    """Return each row's sums of squares of error and weights, [2, rows] fp64.

    They are in units of the squared decode scale. In these units no square leaves fp32, whatever the
    size of the weights.
    """
    exact = w.float() / decode
    error = dequantize(codes, scales, torch.ones_like(decode)).sub_(exact)
    return torch.stack([t.square_().sum(-1).double() for t in (error, exact)])
