"""Sums of exact products by steps whose order is given, and how far they are from the true sums.

FlashInfer 0.7.4 defines its batch-invariant products so: a step adds the products of 64 columns of K to
the sum, which begins with +0, and the steps follow each other. With chunks, each of them is such a sum,
and fp32 additions add these in order.

Let D be the sum before a step, S its true value, E a bound of D - S, and M the sum of the magnitudes
of the step's products. Every part of the step lies within B = |S| + E + M, in any order. So the step
errs as any sum of its products does whose parts are within B, and adds nothing to E where no part has
a bit that fp32 lacks: where D is exact and B is at most 2^24 times a power of two that divides all
products so far.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .interval import U

ErrorOfSum = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""Bounds the error of a sum by the largest part [N, M], the nonzero products [N, M] and their number."""


@dataclass(frozen=True)
class Fold:
    """Chunks of K, added in order; each is steps of `width` columns, added in order."""

    width: int = 64
    chunks: int = 1


@dataclass(frozen=True)
class Products:
    """Every x [N, K] times every w [M, K], fp64; x is `centre` give or take `radius`, or exactly it."""

    centre: torch.Tensor
    radius: torch.Tensor | None
    magnitude: torch.Tensor
    w: torch.Tensor
    sizes: torch.Tensor  # |w|

    def columns(self, part: slice) -> "Products":
        radius = None if self.radius is None else self.radius[:, part]
        centre, magnitude = self.centre[:, part], self.magnitude[:, part]
        return Products(centre, radius, magnitude, self.w[:, part], self.sizes[:, part])

    def none(self) -> torch.Tensor:
        """Zeros [N, M]."""
        return self.centre.new_zeros(self.centre.shape[0], self.w.shape[0])

    def sums(self) -> torch.Tensor:
        return self.centre @ self.w.T

    def spread(self) -> torch.Tensor:
        return self.none() if self.radius is None else self.radius @ self.sizes.T

    def magnitudes(self) -> torch.Tensor:
        return self.magnitude @ self.sizes.T

    def count(self) -> torch.Tensor:
        """Bound the number of nonzero products [N, M]."""
        rows, columns = (self.magnitude != 0).sum(1), (self.w != 0).sum(1)
        return torch.minimum(rows[:, None], columns[None, :])

    def unit(self) -> torch.Tensor:
        """Return a power of two [N, M] that divides every product; 0 for intervals, which have none."""
        if self.radius is not None:
            return self.none()
        return unit_of(self.centre.float())[:, None] * unit_of(self.w.float())[None, :]


def chunks_of(n: int, k: int) -> int:
    """Return how many chunks FlashInfer 0.7.4 makes of K for b [K, N]: never by M.

    `gemm/batch_invariant/schedule.py:51`, of NVFP4 on sm_100 and sm_103.
    """
    if n == 0 or -(-n // 32) >= 256:
        return 1
    most, chunks = min(k // (16 * n), 128), 1
    while 2 * chunks <= most and k % (128 * chunks) == 0 and k // (2 * chunks) >= 256:
        chunks *= 2
    return chunks


def error_of_fold(fold: Fold, p: Products, error: ErrorOfSum) -> torch.Tensor:
    """Bound [N, M] the difference of the fold from the fp64 sum of the products.

    Args:
        error: of a sum in any order; it is asked about each step.
    """
    k = p.w.shape[1]
    size, unit = p.magnitudes(), p.unit()
    slack = torch.where(size <= unit * 2.0**53, 0.0, size * k * 2.0**-52)  # of the sums in fp64
    total, spread, wrong = p.none(), p.none(), p.none()
    length = -(-k // fold.chunks)
    for start in range(0, k, length):
        chunk = p.columns(slice(start, min(start + length, k)))
        one, wide, off = _error_of_chunk(fold.width, chunk, slack, error)
        total, spread, wrong = total + one, spread + wide, wrong + off
        part = total.abs() + spread + wrong + slack
        if start > 0:  # +0 and the first chunk's sum are exact
            exact = (wrong == 0) & (part <= unit * 2.0**24)
            wrong = wrong + torch.where(exact, 0.0, part * U * 1.001)
    return wrong + slack


def _error_of_chunk(
    width: int, p: Products, slack: torch.Tensor, error: ErrorOfSum
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the sum of a chunk, by how much its true value may differ, and its error."""
    total, spread, wrong = p.none(), p.none(), p.none()
    unit = torch.full_like(total, torch.inf)
    for start in range(0, p.w.shape[1], width):
        step = p.columns(slice(start, start + width))
        unit = torch.minimum(unit, step.unit())
        part = total.abs() + spread + wrong + slack + step.magnitudes()
        exact = (wrong == 0) & (part <= unit * 2.0**24)
        wrong = wrong + torch.where(exact, 0.0, error(part, step.count(), step.w.shape[1]))
        total, spread = total + step.sums(), spread + step.spread()
    return total, spread, wrong


def unit_of(x: torch.Tensor) -> torch.Tensor:
    """Return the power of two, fp64, that divides every fp32 number of a row; infinite for zeros."""
    a = x.abs()
    bits = a.view(torch.int32)
    # Without its lowest set bit a number loses its unit, if that bit is one of the significand.
    rest = (bits & (bits - 1)).view(torch.float32)
    unit = torch.where(bits & 0x7FFFFF == 0, a, a - rest)
    return torch.where(a == 0, torch.inf, unit).amin(-1).double()
