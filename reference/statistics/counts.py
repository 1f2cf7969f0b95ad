"""Statistics of quantized rows, counted by expert, as sums that can be added up.

A row is counted for every expert it is given to. Everything is a tensor on the rows' device and nothing
waits for it, so that statistics can be taken while serving, or in a CUDA graph. Of two sets of rows, the
sums of both together are those of each added (`extremes`: the larger), so that calls, layers and
ranks add up; every share, median and ratio is derived from the sums at the end. Counts and extremes
add up exactly; energies are sums in fp64, whose last bits depend on the order.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .. import checks
from .table import aligned

COUNTS = (
    "rows",
    "blocks",
    "zero blocks",  # of nothing but zeros
    "underflowed",  # not zero, but block scale or row scale is: all of it decodes to 0
    "saturated",  # the scale is larger than any that rounds to 448
    "fours",  # 4over6 kept the candidate of 4
    "nan scales",  # scale byte 0x7f, which reaches every output of the row
    "nans",  # elements
    "infinities",  # elements
    "unmeasured rows",  # not finite, before or after: left out of the energies
)
"""Columns of `QuantizationStatistics.counts`."""
BINS = 128
"""Bins of the row maxima: four an octave, from 2^-16 to 2^16; the outermost hold those beyond."""

FIRST_BIN = (127 - 16) << 2
"""The number of the first bin: the upper bits of 2^-16 in fp32, exponent and two significand bits."""

_SHARES = {"zero": "zero blocks", "underfl.": "underflowed", "satur.": "saturated", "4s": "fours"}
_BROKEN = ("nan scales", "nans", "infinities", "unmeasured rows")


@dataclass(frozen=True)
class QuantizationStatistics:
    """Sums over the rows of each of E experts. Figures are [E], on the device; none waits for it."""

    counts: torch.Tensor  # [E, 10] int64, columns `COUNTS`
    histogram: torch.Tensor  # [E, 128] int64: row maxima (`BINS`) that are finite and not 0
    energies: torch.Tensor  # [E, 2] fp64: sums of x^2, and of (x - decoded)^2
    extremes: torch.Tensor  # [E, 3] fp64: largest row maximum, - the least, a row's noise / signal

    @classmethod
    def empty(
        cls, num_experts: int, device: torch.device | str | None = None
    ) -> "QuantizationStatistics":
        """Return the statistics of no rows."""

        def zeros(columns: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(num_experts, columns, dtype=dtype, device=device)

        return cls(
            zeros(len(COUNTS), torch.int64),
            zeros(BINS, torch.int64),
            zeros(2, torch.float64),
            zeros(3, torch.float64).fill_(-torch.inf),
        )

    def __add__(self, other: "QuantizationStatistics") -> "QuantizationStatistics":
        """Return the statistics of the rows of both.

        Raises:
            ValueError: the other has another number of experts.
        """
        return self.clone().add_(other)

    def add_(self, other: "QuantizationStatistics") -> "QuantizationStatistics":
        """Add into these tensors in place: a captured CUDA graph adds to them at every replay."""
        if not isinstance(other, QuantizationStatistics):
            raise TypeError(f"other is {type(other).__name__}; it must be QuantizationStatistics")
        if other.counts.shape != self.counts.shape:
            raise ValueError(
                f"other has {other.counts.shape[0]} experts; it must have {self.counts.shape[0]}"
            )
        self.counts.add_(other.counts)
        self.histogram.add_(other.histogram)
        self.energies.add_(other.energies)
        torch.maximum(self.extremes, other.extremes, out=self.extremes)
        return self

    def clone(self) -> "QuantizationStatistics":
        return QuantizationStatistics(
            self.counts.clone(),
            self.histogram.clone(),
            self.energies.clone(),
            self.extremes.clone(),
        )

    def total(self) -> "QuantizationStatistics":
        """Sum over the experts, so that E is 1. A row counts once for each of its experts."""
        if not self.counts.shape[0]:
            return QuantizationStatistics.empty(1, self.counts.device)
        return QuantizationStatistics(
            self.counts.sum(0, keepdim=True),
            self.histogram.sum(0, keepdim=True),
            self.energies.sum(0, keepdim=True),
            self.extremes.amax(0, keepdim=True),
        )

    def count(self, name: str) -> torch.Tensor:
        """Return one of `COUNTS`, [E]."""
        if name not in COUNTS:
            raise ValueError(f"name is {name!r}; it must be one of {', '.join(COUNTS)}")
        return self.counts[:, COUNTS.index(name)]

    def share(self, name: str) -> torch.Tensor:
        """Return a count of blocks over all blocks; NaN where there are none."""
        return self.count(name) / self.count("blocks")

    def snr(self) -> torch.Tensor:
        """Return the SNR in dB, 10 log10(sum x^2 / sum (x - decoded)^2); NaN without a signal."""
        signal, noise = self.energies.unbind(1)
        return 10 * torch.log10(signal / noise)

    def worst_snr(self) -> torch.Tensor:
        """Return the signal-to-noise ratio of the worst single row, in dB."""
        return -10 * torch.log10(self.extremes[:, 2])

    def largest(self) -> torch.Tensor:
        """Return the largest row maximum; NaN where every row is zero or not finite."""
        return self._finite(self.extremes[:, 0])

    def least(self) -> torch.Tensor:
        """Return the least row maximum above 0."""
        return self._finite(-self.extremes[:, 1])

    def median(self) -> torch.Tensor:
        """Return the lower median of the row maxima: the middle of its bin, at most 12.5 % off.

        In the outermost bins, too, it is never outside `least` ... `largest`.
        """
        up_to = self.histogram.cumsum(1)
        half = (up_to[:, -1:] + 1) // 2
        place = (up_to < half).sum(1).int() + FIRST_BIN
        middle = (place << 21 | 1 << 20).view(torch.float32).double()
        return torch.minimum(torch.maximum(middle, self.least()), self.largest())

    def spread(self) -> torch.Tensor:
        """Return log2(largest / median): the octaves that one scale for all rows costs the median."""
        return torch.log2(self.largest() / self.median())

    @staticmethod
    def _finite(extreme: torch.Tensor) -> torch.Tensor:
        return torch.where(extreme.isfinite(), extreme, torch.nan)

    def __str__(self) -> str:
        """Write a table: a line for each expert with rows, and one for all. It waits for the device."""
        return statistics_table(self.by_expert())

    def by_expert(self) -> "dict[str, QuantizationStatistics]":
        """Return the experts that have rows, by name, and `all` together. It waits for the device."""
        parts = {
            f"expert {e}": QuantizationStatistics(
                self.counts[e : e + 1],
                self.histogram[e : e + 1],
                self.energies[e : e + 1],
                self.extremes[e : e + 1],
            )
            for e, rows in enumerate(self.count("rows").tolist())
            if rows
        }
        return (parts if len(self.counts) > 1 else {}) | {"all": self}


def statistics_table(named: Mapping[str, QuantizationStatistics]) -> str:
    """Write a table with a line for each name, over all its experts. It waits for the device.

    Shares are of blocks. `least`, `median` and `largest` are row maxima, `spread` the octaves between
    the last two. `SNR` and `worst` (row) are in dB. Counts of NaN, infinities and unmeasured rows follow
    in words where they are not 0.
    """
    checks.instance("named", named, Mapping, "a mapping of names to QuantizationStatistics")
    heads = ["", "rows", *_SHARES, "least", "median", "largest", "spread", "SNR", "worst"]
    return aligned(heads, [_line(name, s.total()) for name, s in named.items()])


def _line(name: str, s: QuantizationStatistics) -> list[str]:
    def number(value: torch.Tensor, form: str) -> str:
        return "-" if value.isnan() else format(value.item(), form)

    return [
        name,
        str(s.count("rows").item()),
        *(number(s.share(count), ".2%") for count in _SHARES.values()),
        *(number(value, ".4g") for value in (s.least(), s.median(), s.largest())),
        *(number(value, ".2f") for value in (s.spread(), s.snr(), s.worst_snr())),
        *(f"{n} {what}" for what in _BROKEN if (n := s.count(what).item())),
    ]
