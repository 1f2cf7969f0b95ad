"""Distributions one below the other on a logarithmic axis, as an SVG for light and dark grounds."""

# SPDX-License-Identifier: Apache-2.0
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from nvfp4_moe.report.markup import Markup, element

BINS_A_DECADE = 40
LEFT, WIDTH, _TOP, _ROW, _RIGHT = 284, 400, 20, 36, 76
_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1c1f23; }
.muted { fill: #59616a; } .grid { stroke: #dcddd8; } .shape { fill: #2f7688; }
.middle { stroke: #b3261e; stroke-width: 2; } .range { stroke: #2f7688; }
@media (prefers-color-scheme: dark) {
  text { fill: #e4e6e3; } .muted { fill: #a0a7ae; } .grid { stroke: #31353a; }
  .shape { fill: #62aebf; } .middle { stroke: #ff7a6e; } .range { stroke: #62aebf; }
}
"""


def strips(title: str, axis: str, rows: Mapping[str, Sequence[float]]) -> Markup:
    """A strip for each row: how many values lie where, their range, and the median with its number.

    Args:
        axis: what is measured, below the axis.
        rows: by label; positive values.
    """
    marks = ticks(min(map(min, rows.values())), max(map(max, rows.values())))
    low, high = math.log10(marks[0]), math.log10(marks[-1])
    bottom = _TOP + _ROW * len(rows)

    def place(logarithm: float) -> float:
        return LEFT + WIDTH * (logarithm - low) / (high - low)

    drawn = [
        part
        for i, (label, values) in enumerate(rows.items())
        for part in _strip(label, [math.log10(v) for v in values], _TOP + _ROW * (i + 0.5), place)
    ]
    return element(
        "svg",
        element("title", title),
        element("style", Markup(_STYLE)),
        *(
            element("path", d=f"M{place(math.log10(m)):.1f} {_TOP}V{bottom}", class_="grid")
            for m in marks
        ),
        *drawn,
        *(_text(place(math.log10(m)), bottom + 16, f"{m:g}", "middle", "muted") for m in marks),
        _text(LEFT + WIDTH + 10, _TOP - 6, "median", "start", "muted"),
        _text(LEFT + WIDTH / 2, bottom + 34, axis, "middle", "muted"),
        xmlns="http://www.w3.org/2000/svg",
        role="img",
        viewBox=f"0 0 {LEFT + WIDTH + _RIGHT} {bottom + 44}",
        width=LEFT + WIDTH + _RIGHT,
    )


def _strip(
    label: str, logarithms: Sequence[float], y: float, place: Callable[[float], float]
) -> Iterator[Markup]:
    """The label, the range, a symmetric histogram around it, and the median."""
    ordered = sorted(logarithms)
    counts = histogram(ordered)
    half, top = 0.42 * _ROW, max(counts.values())
    step = 1 / BINS_A_DECADE
    bars = "".join(
        f"M{place(b * step):.1f} {y - half * n / top:.1f}H{place((b + 1) * step):.1f}"
        f"v{2 * half * n / top:.1f}H{place(b * step):.1f}Z"
        for b, n in counts.items()
    )
    middle = place(median(ordered))
    yield _text(LEFT - 12, y + 4, label, "end")
    yield element(
        "path", d=f"M{place(ordered[0]):.1f} {y:.1f}H{place(ordered[-1]):.1f}", class_="range"
    )
    yield element("path", d=bars, class_="shape")
    yield element("path", d=f"M{middle:.1f} {y - half:.1f}v{2 * half:.1f}", class_="middle")
    yield _text(LEFT + WIDTH + 10, y + 4, f"{10 ** median(ordered):#.3g}", "start")


def ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each decade, from the last not above `low` to the first not below `high`."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [float(f"{step}e{decade}") for decade in decades for step in (1, 2, 5)]
    first = max(i for i, tick in enumerate(every) if tick <= low)
    last = min(i for i, tick in enumerate(every) if tick >= high)
    return every[first : last + 1]


def histogram(logarithms: Sequence[float]) -> dict[int, int]:
    """Count the values in each bin of 1 / BINS_A_DECADE, by the bin's number, ascending."""
    bins = [math.floor(x * BINS_A_DECADE) for x in logarithms]
    return {b: bins.count(b) for b in sorted(set(bins))}


def median(ordered: Sequence[float]) -> float:
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def _text(x: float, y: float, text: str, anchor: str, kind: str | None = None) -> Markup:
    return element("text", text, x=f"{x:.6g}", y=f"{y:g}", text_anchor=anchor, class_=kind)
