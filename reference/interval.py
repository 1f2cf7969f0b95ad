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
    """All values from `low` to `high`, fp64 tensors of one shape; one tensor is both ends of a point."""

    low: torch.Tensor
    high: torch.Tensor

    @staticmethod
    def point(x: torch.Tensor) -> "Interval":
        x = x.double()
        return Interval(x, x)

    @property
    def is_point(self) -> bool:
        """Whether the ends are one tensor; where they only have the same values, it is False."""
        return self.low is self.high

    def widened(self, by: torch.Tensor | float) -> "Interval":
        return Interval(self.low - by, self.high + by)

    def map(self, f: Callable[[torch.Tensor], torch.Tensor]) -> "Interval":
        """Of a nondecreasing f."""
        low = f(self.low)
        return Interval(low, low if self.is_point else f(self.high))

    def __mul__(self, other: "Interval") -> "Interval":
        if self.is_point:
            self, other = other, self
        a, b = self.low * other.low, self.high * other.low
        low, high = torch.minimum(a, b), torch.maximum(a, b)
        if not other.is_point:
            a, b = self.low * other.high, self.high * other.high
            low = torch.minimum(low, torch.minimum(a, b))
            high = torch.maximum(high, torch.maximum(a, b))
        return Interval(low, high)

    def __add__(self, other: "Interval") -> "Interval":
        return Interval(self.low + other.low, self.high + other.high)

    def __getitem__(self, index: object) -> "Interval":
        return self.map(lambda end: end[index])  # type: ignore[index]

    @property
    def magnitude(self) -> torch.Tensor:
        return self.low.abs() if self.is_point else torch.maximum(self.low.abs(), self.high.abs())

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


def hull(a: Interval, b: Interval) -> Interval:
    """The smallest interval that holds both."""
    return Interval(torch.minimum(a.low, b.low), torch.maximum(a.high, b.high))


def unless(unknown: torch.Tensor, i: Interval) -> Interval:
    """Infinite where unknown, and where an end is NaN."""
    return Interval(
        torch.where(unknown | i.low.isnan(), -torch.inf, i.low),
        torch.where(unknown | i.high.isnan(), torch.inf, i.high),
    )


def sum_of_products(x: Interval, w: torch.Tensor, accumulation: Accumulation) -> Interval:
    """[N, M]: x [N, K] times w [M, K] transposed; w and, where it is a point, x are fp32 numbers."""
    k, w64 = w.shape[1], w.double()
    points = x.is_point or bool((x.low == x.high).all())
    if points:
        x = Interval.point(x.low)
    magnitude, sizes = x.magnitude, w64.abs()
    centre = x.low if points else (x.low + x.high) / 2
    radius = None if points else (x.high - x.low) / 2
    size = magnitude @ sizes.T
    low = high = centre @ w64.T
    if radius is not None:
        spread = radius @ sizes.T
        low, high = low - spread, high + spread
    largest = torch.maximum(size + high, size - low) / 2
    if accumulation.chunk is not None:
        ranges = _largest_of_ranges(centre, radius, magnitude, w64, sizes, accumulation.chunk)
        largest = torch.minimum(largest, ranges)
    terms = torch.minimum((magnitude != 0).sum(1)[:, None], (w != 0).sum(1)[None, :])
    error = accumulation.error(largest, terms, k) + size * k * 2.0**-52  # these sums are fp64
    if points:  # of an interval's inner values nothing is known: they have no common divisor
        unit = _unit(x.low.float())[:, None] * _unit(w)[None, :]
        error = torch.where(largest <= unit * 2**24, 0.0, error)
    return Interval(low - error, high + error)


def _largest_of_ranges(
    centre: torch.Tensor,
    radius: torch.Tensor | None,
    magnitude: torch.Tensor,
    w: torch.Tensor,
    sizes: torch.Tensor,
    chunk: int,
) -> torch.Tensor:
    """A bound of the magnitude of every contiguous range of chunks, and of what is within one."""
    total = centre.new_zeros(centre.shape[0], w.shape[0])
    least, most, spread, inside = total, total, total, total
    for k in range(0, w.shape[1], chunk):
        part = slice(k, k + chunk)
        total = total + centre[:, part] @ w[:, part].T
        if radius is not None:
            spread = spread + radius[:, part] @ sizes[:, part].T
        inside = torch.maximum(inside, magnitude[:, part] @ sizes[:, part].T)
        least, most = torch.minimum(least, total), torch.maximum(most, total)
    return most - least + spread + inside


def _unit(x: torch.Tensor) -> torch.Tensor:
    """The power of two that every fp32 number of a row is a multiple of, fp64; infinite for zeros."""
    a = x.abs()
    bits = a.view(torch.int32)
    # Without its lowest set bit a number loses its unit, if that bit is one of the significand.
    rest = (bits & (bits - 1)).view(torch.float32)
    unit = torch.where(bits & 0x7FFFFF == 0, a, a - rest)
    return torch.where(a == 0, torch.inf, unit).amin(-1).double()


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
