"""Finds and reads an expert's matrix, vector or scalar in the tensors of a checkpoint."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from typing import Any

import torch

from ..host import READING
from .folder import Folder


@dataclass(frozen=True)
class Place:
    """A whole tensor, or an expert's part of a stacked one; of these all rows, or gate's or up's.

    Attributes:
        half: 0, gate, or 1, up, where they are fused: the first or the second half of the rows.
        flat: how many experts share the first dimension, one after the other; 0 where it counts them.
        transposed: a matrix is stored [columns, rows].
        interleaved: fused rows are gate, up, gate, up, ...
    """

    name: str
    expert: int | None = None
    half: int | None = None
    flat: int = 0
    transposed: bool = False
    interleaved: bool = False

    def __str__(self) -> str:
        part = "" if self.expert is None else f"[{self.expert}]"
        return self.name + part + ("" if self.half is None else (" (gate)", " (up)")[self.half])


def read_matrix(folder: Folder, place: Place) -> torch.Tensor:
    """Read the matrix [rows, columns] at a place."""
    piece = folder.slice(place.name)
    if place.transposed:
        with READING:
            matrix = piece[:] if place.expert is None else piece[place.expert]
        return matrix.T[rows_of(place, matrix.shape[1])].contiguous()
    return _part(piece, piece.get_shape(), place, dimension=-2)


def read_vector(folder: Folder, place: Place) -> torch.Tensor:
    """Read the vector [rows] at a place."""
    piece = folder.slice(place.name)
    return _part(piece, piece.get_shape(), place, dimension=-1)


def read_scalar(folder: Folder, place: Place) -> torch.Tensor:
    """Read the scalar at a place: one value may stand for all experts, and for gate and up."""
    value = folder.tensor(place.name)
    if place.expert is not None and value.numel() > 1:
        value = value[place.expert]
    value = value.reshape(-1)
    return value[place.half] if place.half is not None and len(value) == 2 else value[0]


def _part(piece: Any, shape: list[int], place: Place, dimension: int) -> torch.Tensor:
    """Read the expert's part of a slice of safetensors, and from that the rows of a half."""
    if place.flat and place.expert is not None:
        count = shape[0] // place.flat
        index: Any = rows_of(place, count, place.expert * count)
    else:
        rows = rows_of(place, shape[dimension])
        index = rows if place.expert is None else (place.expert, rows)
    with READING:
        return piece[index]


def rows_of(place: Place, count: int, first: int = 0) -> slice:
    """Return the rows of a place among `count` rows from `first` on."""
    if place.half is None:
        return slice(first, first + count)
    if place.interleaved:
        return slice(first + place.half, first + count, 2)
    half = count // 2
    return slice(first + place.half * half, first + (place.half + 1) * half)
