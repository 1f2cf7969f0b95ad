"""The report page's drawings, as inline SVG: where outputs lie, and where differences do."""

# SPDX-License-Identifier: Apache-2.0
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from .markup import Markup, element

MOST = 32
"""Squares that a map has along an axis, as many as a 128x4 tile; of more each sums several."""

_SIDE = 224  # pixels of the longer side of a map
_SHADES = 8
_LEFT, _TOP = 44, 18  # room for the labels
_BAR, _HEIGHT = 26, 96  # of the histogram


def histogram(bins: Sequence[int]) -> Markup:
    """Draw how many outputs lie in each of equal parts of their interval, whose ends are 0 and 1."""
    total, top = sum(bins), max(bins, default=0)
    if not top:
        return element("p", "No output has an interval of more than one value.")
    right, bottom = _LEFT + _BAR * len(bins), _TOP + _HEIGHT
    title = f"Where {total:,} outputs lie in their intervals"
    ends = ((_LEFT, "0"), ((_LEFT + right) / 2, "0.5"), (right, "1"))
    drawing = _drawing(
        title,
        (right + 12, bottom + 38),
        element("path", d=f"M{_LEFT} {_TOP}H{right}M{_LEFT} {bottom}H{right}", class_="axis"),
        element("g", *(_bar(i, len(bins), n, top) for i, n in enumerate(bins)), class_="bars"),
        _text(_LEFT - 6, _TOP + 4, f"{top:,}", "end"),
        _text(_LEFT - 6, bottom + 4, "0", "end"),
        *(_text(x, bottom + 15, number) for x, number in ends),
        _text((_LEFT + right) / 2, bottom + 31, "place in the interval"),
        _upright(_TOP + _HEIGHT / 2, "outputs"),
    )
    caption = f"{title}: of those that hold more than one value; 0 and 1 are the ends"
    return element("figure", element("figcaption", caption), drawing)


def heat(counts: dict[str, Any]) -> Markup:
    """A `report.Heat`: which tiles differ, and where within a tile."""
    return element(
        "figure",
        element("figcaption", f"Where differences lie in the {counts['what']}"),
        element(
            "div",
            _map("Which tiles differ", counts["tiles"], ("tile row", "tile column")),
            _map(
                "Where within a tile",
                counts["within"],
                ("row in the tile", "column in the tile"),
            ),
            class_="maps",
        ),
    )


def pool(counts: Sequence[Sequence[int]], most: int) -> tuple[list[list[int]], tuple[int, int]]:
    """Sums over rectangles, at most `most` along each axis, and a rectangle's rows and columns."""
    down, across = -(-len(counts) // most), -(-len(counts[0]) // most)
    sums = []
    for i in range(0, len(counts), down):
        columns = [sum(column) for column in zip(*counts[i : i + down], strict=True)]
        sums.append([sum(columns[j : j + across]) for j in range(0, len(columns), across)])
    return sums, (down, across)


def _map(title: str, counts: Sequence[Sequence[int]], axes: tuple[str, str]) -> Markup:
    """A square for each count that is not 0, the darker the larger."""
    if not any(map(any, counts)):
        return element("p", element("b", title), " ", element("span", "none"))
    sums, steps = pool(counts, MOST)
    side = min(16, _SIDE // max(len(sums), len(sums[0])))
    height, width, top = side * len(sums), side * len(sums[0]), max(map(max, sums))
    tall, wide = max(height, 76), max(width, 100)  # room for the names of the axes
    drawing = _drawing(
        f"{title}: {sum(map(sum, counts)):,} differences",
        (_LEFT + wide + 8, _TOP + tall + 22),
        element(
            "g",
            element("path", d=f"M0 0h{len(sums[0])}v{len(sums)}H0z", class_="none"),
            *_squares(sums, top, steps),
            class_="map",
            transform=f"translate({_LEFT} {_TOP}) scale({side})",
        ),
        *_ends(len(counts), [(_LEFT - 6, _TOP + y, "end") for y in (8, max(height, 20))]),
        *_ends(len(counts[0]), [(_LEFT, _TOP - 5, "start"), (_LEFT + width, _TOP - 5, "end")]),
        _text(_LEFT, _TOP + height + 15, axes[1], "start"),
        _upright(_TOP + tall / 2, axes[0]),
    )
    scale = f"{len(counts)} x {len(counts[0])}, darkest {top:,}"
    if steps != (1, 1):
        scale += f"; a square sums {steps[0]} x {steps[1]} tiles"
    return element("div", element("p", element("b", title), " ", element("span", scale)), drawing)


def _squares(sums: list[list[int]], top: int, steps: tuple[int, int]) -> list[Markup]:
    """By shade, which halves the page; a title says the indices along both axes and the count."""
    shades: dict[int, list[Markup]] = defaultdict(list)
    for i, row in enumerate(sums):
        for j, count in enumerate(row):
            if count:
                title = element("title", f"{_span(i, steps[0])}, {_span(j, steps[1])}: {count:,}")
                square = element("path", title, d=f"M{j} {i}h1v1h-1")
                shades[math.ceil(_SHADES * (count / top) ** 0.5)].append(square)
    return [
        element("g", *squares, fill_opacity=f"{0.2 + 0.8 * shade / _SHADES:.2g}")
        for shade, squares in shades.items()
    ]


def _span(index: int, step: int) -> str:
    first = index * step
    return f"{first}" if step == 1 else f"{first}-{first + step - 1}"


def _bar(index: int, count: int, value: int, top: int) -> Markup:
    height = math.ceil(_HEIGHT * value / top)
    told = f"{index / count:.2g} to {(index + 1) / count:.2g}: {value:,}"
    place = f"M{_LEFT + index * _BAR + 1} {_TOP + _HEIGHT}v{-height}h{_BAR - 2}v{height}"
    return element("path", element("title", told), d=place)


def _drawing(label: str, size: tuple[int, int], *content: Markup) -> Markup:
    width, height = size
    return element(
        "svg",
        element("title", label),
        *content,
        role="img",
        viewBox=f"0 0 {width} {height}",
        width=width,
    )


def _ends(length: int, places: Sequence[tuple[float, float, str]]) -> list[Markup]:
    """The first and the last index of an axis; once if they are the same."""
    numbers = sorted({0, length - 1})
    return [_text(x, y, str(n), anchor) for n, (x, y, anchor) in zip(numbers, places, strict=False)]


def _text(x: float, y: float, text: str, anchor: str | None = None) -> Markup:
    return element("text", text, x=f"{x:g}", y=f"{y:g}", text_anchor=anchor)


def _upright(center: float, text: str) -> Markup:
    """The name of the axis that goes down, at the left edge."""
    return element("text", text, transform=f"translate(10 {center:g}) rotate(-90)")
