"""Quantizes groups of matrices, in threads or in forked processes, into one piece of memory."""

# SPDX-License-Identifier: Apache-2.0
import mmap
from typing import NamedTuple

import torch

from ..reference.recipe import Recipe
from .quantized_matrix import Quantized, Squares, quantize_into, room_at
from .source import Matrix, Source


class Group(NamedTuple):
    """Matrices that share a scale, and the places in the memory of those that are in the shard."""

    partners: list[Matrix]
    offsets: dict[Matrix, int]  # in bytes


class Found(NamedTuple):
    """The outcome of a group: problems of its values, or the sums of squares of its matrices."""

    problems: list[str]
    squares: dict[Matrix, Squares]


class Quantizer:
    """Quantizes one group a call. A process that is forked later writes to the same memory.

    Args:
        size: the bytes of the memory.
    """

    def __init__(self, source: Source, recipe: Recipe, size: int):
        self._source, self._recipe, self.size = source, recipe, size
        # An anonymous mapping is shared with forked processes, and needs no file or its limits.
        self._memory = torch.frombuffer(mmap.mmap(-1, max(1, size)), dtype=torch.uint8)

    def room(self, matrix: Matrix, offset: int) -> Quantized:
        """Return the memory of a matrix's result, at an offset in bytes."""
        return room_at(self._memory, offset, matrix)

    def __call__(self, device: torch.device, group: Group) -> Found:
        read = {m: self._source.read(m, device) for m in group.partners}
        if problems := [values.problem for values in read.values() if values.problem is not None]:
            return Found(problems, {})
        amax = max(values.amax for values in read.values())
        rooms = [self.room(matrix, offset) for matrix, offset in group.offsets.items()]
        weights = [read[matrix].weight for matrix in group.offsets]
        squares = quantize_into(rooms, weights, amax, self._recipe)
        return Found([], dict(zip(group.offsets, squares, strict=True)))
