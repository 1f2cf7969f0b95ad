"""Intervals of numbers; their ends also represent overflow of fp32 and NaN."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..numerics.subnormals import kept

U = 2.0**-24
"""Unit roundoff of fp32."""
LARGEST = torch.finfo(torch.float32).max
SMALLEST = torch.finfo(torch.float32).smallest_normal


@dataclass(frozen=True)
class Interval:
    """The values that a number may have: fp64 tensors of one shape. A point has one tensor as both ends.

        low <= high    a number from low to high; an end that is infinite is one of its values
        -inf, inf      anything, NaN too: nothing is claimed
        NaN, NaN       NaN, and nothing else

    An operation is invalid (0 * inf, inf - inf) where an end of its result is NaN. Where only some of
    the values make it so, nothing is claimed.
    """

    low: torch.Tensor
    high: torch.Tensor

    @staticmethod
    def point(x: torch.Tensor) -> "Interval":
        x = x.double()
        return Interval(x, x)

    @property
    def is_point(self) -> bool:
        """True if the ends are one tensor; False for two tensors of equal values."""
        return self.low is self.high

    @property
    def nan(self) -> torch.Tensor:
        """Mark the elements that are certainly NaN."""
        return self.low.isnan()

    @property
    def unknown(self) -> torch.Tensor:
        """Mark the elements of which nothing is claimed."""
        return (self.low == -torch.inf) & (self.high == torch.inf)

    @property
    def single(self) -> torch.Tensor:
        """Mark the elements that have exactly one value; NaN is one."""
        return (self.low == self.high) | self.nan

    def widened(self, by: torch.Tensor | float) -> "Interval":
        """Multiply by a finite number."""
        return Interval(self.low - by, self.high + by)

    def relatively(self, error: torch.Tensor | float) -> "Interval":
        """Widen by the relative `error`, less than 1; infinite ends stay."""
        low, high = (end.abs().nan_to_num(posinf=0.0) * error for end in (self.low, self.high))
        return Interval(self.low - low, self.high + high)

    def map(self, f: Callable[[torch.Tensor], torch.Tensor]) -> "Interval":
        """Apply f to both ends; f is nondecreasing, or only moves elements."""
        low = f(self.low)
        return Interval(low, low if self.is_point else f(self.high))

    def rising(self, f: Callable[[torch.Tensor], torch.Tensor]) -> "Interval":
        """Apply a nondecreasing f, which lets a NaN through."""
        return self.map(f) if self.is_point else unless(self.unknown, self.map(f))

    def __neg__(self) -> "Interval":
        low = -self.high
        return Interval(low, low if self.is_point else -self.low)

    def __mul__(self, other: "Interval") -> "Interval":
        if self.is_point and other.is_point:
            return Interval.point(self.low * other.low)
        if self.is_point:
            self, other = other, self
        low = high = self.low * other.low
        corners = [(self.high, other.low)]
        if not other.is_point:
            corners += [(self.low, other.high), (self.high, other.high)]
        for a, b in corners:
            corner = a * b
            low, high = torch.minimum(low, corner), torch.maximum(high, corner)
        surely = self.nan | other.nan | (self.single & other.single)
        return unless(low.isnan() & ~surely, Interval(low, high))

    def __add__(self, other: "Interval") -> "Interval":
        if self.is_point and other.is_point:
            return Interval.point(self.low + other.low)
        return valid(Interval(self.low + other.low, self.high + other.high))

    def __getitem__(self, index: object) -> "Interval":
        return self.map(lambda end: end[index])  # type: ignore[index]

    @property
    def magnitude(self) -> torch.Tensor:
        return self.low.abs() if self.is_point else torch.maximum(self.low.abs(), self.high.abs())

    @property
    def mignitude(self) -> torch.Tensor:
        """Return the smallest magnitude; 0 for NaN."""
        same_sign = (self.low > 0) | (self.high < 0)
        return torch.where(same_sign, torch.minimum(self.low.abs(), self.high.abs()), 0.0)

    @kept
    def contains(self, x: torch.Tensor) -> torch.Tensor:
        """Mark the elements of which x may be the value."""
        x = x.double()
        return ((x >= self.low) & (x <= self.high)) | self.unknown | (self.nan & x.isnan())


def choose(condition: torch.Tensor, a: Interval, b: Interval) -> Interval:
    """Return a where the condition holds, else b."""
    return Interval(torch.where(condition, a.low, b.low), torch.where(condition, a.high, b.high))


def hull(a: Interval, b: Interval) -> Interval:
    """Return the smallest interval that holds both."""
    both = Interval(torch.minimum(a.low, b.low), torch.maximum(a.high, b.high))
    return unless(a.nan != b.nan, both)


def unless(unknown: torch.Tensor, i: Interval) -> Interval:
    """Claim nothing where `unknown` is true."""
    return Interval(
        torch.where(unknown, -torch.inf, i.low), torch.where(unknown, torch.inf, i.high)
    )


def fp32_range(i: Interval) -> Interval:
    """Bound the numbers in fp32: those beyond its largest become infinite."""
    return Interval(
        torch.where(i.low > LARGEST, torch.inf, i.low),
        torch.where(i.high < -LARGEST, -torch.inf, i.high),
    )


def valid(i: Interval) -> Interval:
    """Claim nothing where exactly one end is NaN."""
    return unless(i.low.isnan() != i.high.isnan(), i)


def rounded(dtype: torch.dtype, x: Interval) -> Interval:
    """Bound the fp32 numbers in x after rounding to `dtype`, to nearest even."""

    def towards(end: torch.Tensor, direction: float) -> torch.Tensor:
        near = end.float()
        beyond = near < end if direction > 0 else near > end
        target = torch.full_like(near, direction)
        return torch.where(beyond, torch.nextafter(near, target), near)

    low, high = towards(x.low, torch.inf), towards(x.high, -torch.inf)
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    return Interval(low.to(dtype).double(), high.to(dtype).double())
