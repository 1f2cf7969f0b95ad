"""Tables of text."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence


def aligned(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Write lines of cells under their heads: names to the left, numbers to the right.

    Cells that have no head follow at the end of their line.
    """
    lines = [heads, *lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=False)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0])]
            + [cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=False)]
            + list(line[len(heads) :])
        ).rstrip()
        for line in lines
    )
