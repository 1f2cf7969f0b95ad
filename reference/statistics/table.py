"""Statistics of quantization as a table of text."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from .. import checks

if TYPE_CHECKING:
    from .counts import QuantizationStatistics

_SHARES = {"zero": "zero blocks", "underfl.": "underflowed", "satur.": "saturated", "4s": "fours"}
_BROKEN = ("nan scales", "nans", "infinities", "unmeasured rows")


def statistics_table(named: "Mapping[str, QuantizationStatistics]") -> str:
    """A line for each: of all its experts together. It waits for the device.

    Shares are of blocks; `least`, `median` and `largest` are row maxima, `spread` the octaves between
    the last two; `SNR` and `worst` (row) are in dB. What is not finite follows in words.
    """
    checks.instance("named", named, Mapping, "a mapping of names to QuantizationStatistics")
    heads = ["", "rows", *_SHARES, "least", "median", "largest", "spread", "SNR", "worst"]
    lines = [heads, *(_line(name, s.total()) for name, s in named.items())]
    cut = [line[: len(heads)] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cut, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0])]
            + [cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=False)]
            + line[len(heads) :]
        ).rstrip()
        for line in lines
    )


def by_expert(statistics: "QuantizationStatistics") -> "dict[str, QuantizationStatistics]":
    """Those experts that have rows, by name, and all together."""
    from .counts import QuantizationStatistics

    s = statistics
    parts = {
        f"expert {e}": QuantizationStatistics(
            s.counts[e : e + 1],
            s.histogram[e : e + 1],
            s.energies[e : e + 1],
            s.extremes[e : e + 1],
        )
        for e, rows in enumerate(s.count("rows").tolist())
        if rows
    }
    return (parts if len(s.counts) > 1 else {}) | {"all": s}


def _line(name: str, s: "QuantizationStatistics") -> list[str]:
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
