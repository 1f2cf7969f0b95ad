"""Intervals, and the sums of exact products that any order may compute; `bounds.py` has the argument."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

U = 2.0**-24
"""Unit roundoff of fp32."""


@dataclass(frozen=True)
class Accumulation:
    """How far a sum of exact products may be from the true one, in units of B.

    `per_term` for each nonzero term, `per_step` for each `step` of terms. With `chunk` the sum is a
    tree over contiguous ranges of whole chunks of that many terms, each of which may have any order.
    """

    name: str
    per_term: float
    per_step: float
    step: int
    source: str
    chunk: int | None = None

    def error(self, largest: torch.Tensor, terms: torch.Tensor | int, k: int) -> torch.Tensor:
        """An upper bound; `largest` is B, `terms` how many of the K products are not zero."""
        # 1.001 for the second order: the rounded partial sums exceed B by less than K * U.
        return largest * (terms * self.per_term + -(-k // self.step) * self.per_step) * 1.001


FP32 = Accumulation("fp32", U, 0.0, 1, "IEEE 754: round to nearest, any tree of additions")
ANY_ORDER = Accumulation(
    "any order",
    U,
    3 * U,
    8,
    "steps of at least 8 products, aligned to the largest term with one more bit than fp32 has, dropped "
    "below, the result truncated to fp32; covers FP32. `nvfp4_moe.sums` asks a backend",
)
CONTIGUOUS = replace(
    ANY_ORDER,
    name="contiguous",
    source=ANY_ORDER.source
    + "; tiles of at most 256 of K, ascending or split, as our kernels' are; "
    "within a tile those decode every second or fourth column first",
    chunk=256,
)


@dataclass(frozen=True)
class Interval:
    """All values from `low` to `high`, fp64 tensors of one shape."""

    low: torch.Tensor
    high: torch.Tensor

    @staticmethod
    def point(x: torch.Tensor) -> "Interval":
        return Interval(x.double(), x.double())

    def widened(self, by: torch.Tensor | float) -> "Interval":
        return Interval(self.low - by, self.high + by)

    def map(self, f: Callable[[torch.Tensor], torch.Tensor]) -> "Interval":
        """Of a nondecreasing f."""
        return Interval(f(self.low), f(self.high))

    def __mul__(self, other: "Interval") -> "Interval":
        corners = torch.stack(
            [a * b for a in (self.low, self.high) for b in (other.low, other.high)]
        )
        return Interval(corners.amin(0), corners.amax(0))

    def __add__(self, other: "Interval") -> "Interval":
        return Interval(self.low + other.low, self.high + other.high)

    def __getitem__(self, index: object) -> "Interval":
        return Interval(self.low[index], self.high[index])  # type: ignore[index]

    @property
    def magnitude(self) -> torch.Tensor:
        return torch.maximum(self.low.abs(), self.high.abs())

    @property
    def mignitude(self) -> torch.Tensor:
        """The smallest magnitude."""
        same_sign = (self.low > 0) | (self.high < 0)
        return torch.where(same_sign, torch.minimum(self.low.abs(), self.high.abs()), 0.0)

    def contains(self, x: torch.Tensor) -> torch.Tensor:
        """Elementwise; an infinite interval contains everything, NaN too."""
        x = x.double()
        return ((x >= self.low) & (x <= self.high)) | (self.low.isinf() & self.high.isinf())


def choose(condition: torch.Tensor, a: Interval, b: Interval) -> Interval:
    """a where the condition holds, else b."""
    return Interval(torch.where(condition, a.low, b.low), torch.where(condition, a.high, b.high))


def unless(unknown: torch.Tensor, i: Interval) -> Interval:
    """Infinite where unknown, and where an end is NaN."""
    return Interval(
        torch.where(unknown | i.low.isnan(), -torch.inf, i.low),
        torch.where(unknown | i.high.isnan(), torch.inf, i.high),
    )


def sum_of_products(x: Interval, w: torch.Tensor, accumulation: Accumulation) -> Interval:
    """[N, M]: x [N, K] times w [M, K] transposed."""
    k, w64 = w.shape[1], w.double()
    points = bool((x.low == x.high).all())
    centre = x.low if points else (x.low + x.high) / 2
    size = x.magnitude @ w64.abs().T
    low = high = centre @ w64.T
    if not points:
        radius = (x.high - x.low) / 2 @ w64.abs().T
        low, high = low - radius, high + radius
    largest = torch.maximum(size + high, size - low) / 2
    if accumulation.chunk is not None:
        largest = torch.minimum(largest, _largest_of_ranges(x, w64, accumulation.chunk))
    terms = torch.minimum(((x.low != 0) | (x.high != 0)).sum(1)[:, None], (w != 0).sum(1)[None, :])
    error = accumulation.error(largest, terms, k)
    # Of an interval's inner values nothing is known, so only points have a common divisor.
    unit = _unit(x.low)[:, None] * _unit(w64)[None, :]
    exact = largest <= unit * 2**24 if points else torch.zeros_like(error, dtype=torch.bool)
    error = torch.where(exact, 0.0, error + size * k * 2.0**-52)  # and of these sums, in fp64
    return Interval(low - error, high + error)


def _largest_of_ranges(x: Interval, w: torch.Tensor, chunk: int) -> torch.Tensor:
    """A bound of the magnitude of every contiguous range of chunks, and of what is within one."""
    centre, radius = (x.low + x.high) / 2, (x.high - x.low) / 2
    total = centre.new_zeros(centre.shape[0], w.shape[0])
    least, most, spread, inside = total, total, total, total
    for k in range(0, w.shape[1], chunk):
        part = w[:, k : k + chunk]
        total = total + centre[:, k : k + chunk] @ part.T
        spread = spread + radius[:, k : k + chunk] @ part.abs().T
        inside = torch.maximum(inside, x.magnitude[:, k : k + chunk] @ part.abs().T)
        least, most = torch.minimum(least, total), torch.maximum(most, total)
    return most - least + spread + inside


def _unit(x: torch.Tensor) -> torch.Tensor:
    """The power of two that every element of a row is a multiple of; infinite for a row of zeros."""
    mantissa, exponent = torch.frexp(x)
    whole = (mantissa.abs() * 2.0**53).long()
    bit = (whole & -whole).double()
    unit = torch.ldexp(bit, exponent - 53)
    return torch.where(x == 0, torch.inf, unit).amin(-1)


def _inexact(scale: torch.Tensor) -> torch.Tensor:
    """How often a product with each scale rounds: 0 for powers of two."""
    return (torch.frexp(scale)[0].abs() != 0.5).double()


def times(x: Interval, scale: torch.Tensor) -> Interval:
    """x times an fp32 factor, rounded unless that is a power of two."""
    product = x * Interval.point(scale)
    return product.widened(product.magnitude * _inexact(scale) * U * 1.001)


def plus_bias(x: Interval, bias: torch.Tensor) -> Interval:
    """x plus an fp32 bias; a closed epilogue may scale both first, and add then."""
    size = x.magnitude + bias.double().abs()
    return (x + Interval.point(bias)).widened(2 * U * size)


def rounded(dtype: torch.dtype, x: Interval) -> Interval:
    """Of fp32 numbers in x, rounded to nearest even."""

    def towards(end: torch.Tensor, direction: float) -> torch.Tensor:
        near = end.float()
        beyond = near < end if direction > 0 else near > end
        target = torch.full_like(near, direction)
        return torch.where(beyond, torch.nextafter(near, target), near)

    low, high = towards(x.low, torch.inf), towards(x.high, -torch.inf)
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    return Interval(low.to(dtype).double(), high.to(dtype).double())
