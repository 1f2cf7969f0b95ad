"""Two plots, readable on a light and on a dark page: rooflines and speed-ups. They need matplotlib."""

# SPDX-License-Identifier: Apache-2.0
import importlib.util
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..exits import CommandError, Exit
from .clock import shown
from .results import Key, Measurement

GREY = "#808690"
"""It has a contrast of more than 3.5 with white, and with the dark pages of GitHub."""
COLORS = ("#2f8fd0", "#d9722e", "#3f9f5f", "#b667c9", "#b0902a", "#d0506a", "#4a9f9f", "#8a7a6a")
STYLE = {
    "axes.edgecolor": GREY,
    "axes.facecolor": "none",
    "axes.labelcolor": GREY,
    "axes.labelsize": 8,
    "axes.titlecolor": GREY,
    "axes.titlesize": 10,
    "figure.facecolor": "none",
    "grid.alpha": 0.3,
    "grid.color": GREY,
    "legend.framealpha": 0,
    "legend.labelcolor": GREY,
    "savefig.transparent": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "nvfp4-moe",
    "text.color": GREY,
    "xtick.color": GREY,
    "xtick.labelsize": 8,
    "ytick.color": GREY,
    "ytick.labelsize": 8,
}
_COLUMNS = 3
_FLAT = 4
"""The most numbers of tokens that are written side by side."""
_LINEAR = 10
"""An axis of ratios is logarithmic if they differ by a larger factor."""


def check_matplotlib() -> None:
    """Check, before anything is measured, that plots can be drawn.

    Raises:
        CommandError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        told = "--plot needs matplotlib: pip install 'nvfp4-moe[bench]'"
        raise CommandError(told, Exit.NOT_RUN)


def draw(
    measurements: Sequence[Measurement],
    ratios: Mapping[Key, float],
    baselines: Mapping[str, str | None],
    folder: Path,
) -> list[Path]:
    """Write the plots for which there are times, and return their paths.

    `roofline.svg` has the FLOP/s of each backend by the FLOPs for each byte that it has to move, under
    the rates of the run. `speedup.svg` has the time of the baseline over each backend's, by tokens.

    Args:
        measurements: what was measured.
        ratios: of `results.ratios`.
        baselines: the backend that others are compared with, by operation.
        folder: is made if it is not there.
    """
    import matplotlib

    matplotlib.use("svg")
    products = [m for m in measurements if m.flop]
    compared = [m for m in measurements if m.key in ratios and m.tokens]
    others = [m for m in compared if m.backend != baselines[m.operation]]
    figures = {}
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        if products:
            figures[folder / "roofline.svg"] = _rooflines(products)
        if others:
            figures[folder / "speedup.svg"] = _speedups(others, ratios, baselines)
        for path, figure in figures.items():
            figure.savefig(path, metadata={"Date": None})
    return list(figures)


def _rooflines(products: Sequence[Measurement]) -> Any:
    """Draw FLOP/s under the measured rates."""

    def fill(axis: Any, mine: Sequence[Measurement]) -> None:
        _roof(axis, mine)
        axis.set(xscale="log", yscale="log", xlabel="FLOP / byte", ylabel="TFLOP/s")

    return _panels(products, lambda m: (m.flop / m.moved, m.tflops), fill)


def _roof(axis: Any, mine: Sequence[Measurement]) -> None:
    """Draw the measured rates; those of the first run, if a plot is of several."""
    rates = mine[0].rates
    intensities = [m.flop / m.moved for m in mine]
    edge = rates.matmul_tflops * 1e12 / (rates.copy_gb_s * 1e9)
    low, high = min(*intensities, edge) / 2, max(*intensities, edge) * 2
    peak = rates.matmul_tflops
    roof = f"copy {shown(rates.copy_gb_s)} GB/s, {rates.matmul} product {shown(peak)} TFLOP/s"
    axis.plot(
        [low, edge, high],
        [low / edge * peak, peak, peak],
        color=GREY,
        lw=1.5,
        label=roof,
    )


def _speedups(
    others: Sequence[Measurement],
    ratios: Mapping[Key, float],
    baselines: Mapping[str, str | None],
) -> Any:
    """Draw the ratios to the baseline by the number of tokens."""

    def fill(axis: Any, mine: Sequence[Measurement]) -> None:
        found = [ratios[m.key] for m in mine] + [1.0]
        axis.axhline(1, color=GREY, lw=1, ls="--")
        axis.set(xscale="log", xlabel=mine[0].unit)
        axis.set_ylabel(f"speed-up over\n{baselines[mine[0].operation]}")
        counts = sorted({m.tokens for m in mine})
        axis.set_xticks(counts, map(str, counts), rotation=90 if len(counts) > _FLAT else 0)
        if max(found) > _LINEAR * min(found):
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, max(found) * 1.1)

    return _panels(others, lambda m: (m.tokens, ratios[m.key]), fill)


def _panels(
    measurements: Sequence[Measurement],
    point: Callable[[Measurement], tuple[float, float]],
    fill: Callable[[Any, Sequence[Measurement]], None],
) -> Any:
    """Draw a panel for each shape of each operation, with a line for each backend.

    Args:
        measurements: what is drawn.
        point: the place of each.
        fill: draws the rest of a panel, and sets its axes.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogFormatterSciNotation, NullLocator

    panels = _by(measurements, lambda m: f"{m.operation}: {m.shape}")
    columns, rows = min(len(panels), _COLUMNS), math.ceil(len(panels) / _COLUMNS)
    figure = Figure(figsize=(3.6 * columns, 3.0 * rows + 0.7), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    backends = list(dict.fromkeys(m.backend for m in measurements))
    handles: dict[str, Any] = {}
    for axis, (title, mine) in zip(axes, panels.items(), strict=False):
        for backend, line in _by(mine, lambda m: m.backend).items():
            color = COLORS[backends.index(backend) % len(COLORS)]
            places = zip(*sorted(map(point, line)), strict=True)
            axis.plot(*places, marker="o", ms=4, lw=1, color=color, label=backend)
        fill(axis, mine)
        axis.set_title(title)
        axis.grid(True)
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_minor_locator(NullLocator())
            if isinstance(scale.get_major_formatter(), LogFormatterSciNotation):
                scale.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    place = {"loc": "outside lower center", "ncols": min(columns, 3)}
    figure.legend(handles.values(), handles, **place, fontsize=8)
    return figure


def _by(
    measurements: Sequence[Measurement], key: Callable[[Measurement], str]
) -> dict[str, list[Measurement]]:
    """Group, in the order of the first of each group."""
    found: dict[str, list[Measurement]] = defaultdict(list)
    for m in measurements:
        found[key(m)].append(m)
    return found
