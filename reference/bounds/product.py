"""Products of fp32 numbers in any association: point 2 of `moe.py`.

A product of n factors is n - 1 products of some of them, each rounded. Let `peak` be the product of the
magnitudes above 1, and `trough` of those below: no part is larger or, but for zero, smaller. Then

- no part leaves fp32's normal range: each rounds by 2^-24 of itself at most, and not where one of its
  two factors is a power of two;
- a part may be below 2^-126: it is flushed, or rounds to a multiple of 2^-149, and is wrong by less
  than 2^-126. The other factors make that less than 2^-126 `peak` of the result, n - 1 times;
- a part may be above fp32's largest: it is infinite, and so is the result, with the sign of the true
  one: the interval reaches from the true value to infinity. But where another factor is zero, or a part
  of the others underflows to zero, or something was added on the way, the result may be NaN: nothing is
  claimed.

Numbers beyond fp32 are kept as such until the end: another association may not have them on the way.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass

import torch

from .interval import LARGEST, SMALLEST, Interval, U, choose, fp32_range, unless

_WIDER = 1 + 2.0**-16  # more than what all roundings of a peak or a trough come to


@dataclass(frozen=True)
class Product:
    """A product of some factors, for rows [N, M]."""

    value: Interval  # rounded by 2^-24, never out of fp32's range
    peak: torch.Tensor  # at least 1
    trough: torch.Tensor  # at most 1; 0 where a factor may be as small as it likes
    parts: int  # how many products were taken

    @staticmethod
    def of(x: Interval) -> "Product":
        """Start with one factor, an fp32 number."""
        trough = torch.where((x.low == 0) & (x.high == 0), 1.0, x.mignitude).clamp(max=1.0)
        return Product(x, x.magnitude.clamp(min=1.0), trough, 0)

    def times(self, factor: Interval | torch.Tensor, error: float = 0.0) -> "Product":
        """Multiply by one more factor.

        Args:
            error: by how much the product is rounded at most, relatively, where the factor is no
                tensor; a given factor rounds unless it is a power of two.
        """
        if isinstance(factor, torch.Tensor):
            rounds = torch.frexp(factor)[0].abs() != 0.5
            factor, by = Interval.point(factor), rounds.double() * U * 1.001
        else:
            by = torch.as_tensor(error, dtype=torch.float64, device=factor.low.device)
        one = Product.of(factor)
        return Product(
            (self.value * factor).relatively(by),
            self.peak * one.peak,
            self.trough * one.trough,
            self.parts + 1,
        )

    def plus(self, bias: torch.Tensor) -> "Product":
        """Add a bias, an fp32 number; a closed epilogue may scale both first, and add them then."""
        size = bias.double().abs()
        total = self.value + Interval.point(bias)
        total = total.widened(2 * U * (self.value.magnitude + size).nan_to_num(posinf=0.0))
        total = choose(bias == 0, self.value, total)
        return Product(
            total,
            torch.maximum(self.peak + size, total.magnitude.clamp(min=1.0)),
            torch.where(bias == 0, self.trough, 0.0),
            self.parts + 1,
        )

    def __getitem__(self, index: object) -> "Product":
        peak, trough = (t[index] for t in (self.peak, self.trough))  # type: ignore[index]
        return Product(self.value[index], peak, trough, self.parts)

    def result(self) -> Interval:
        """Return the product as an fp32 number."""
        under = self.trough < SMALLEST * _WIDER
        lost = torch.where(under, self.peak.clamp(max=LARGEST) * (self.parts + 1) * SMALLEST, 0.0)
        value = self.value.widened(lost)
        over = self.peak * _WIDER > LARGEST
        low = torch.where(over & (value.low < 0), -torch.inf, value.low)
        high = torch.where(over & (value.high > 0), torch.inf, value.high)
        either = (value.low <= 0) & (value.high >= 0) | under
        return unless(over & either & ~value.nan, fp32_range(Interval(low, high)))
