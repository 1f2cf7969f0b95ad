"""Draw a roofline and speed-ups: `python bench/plots.py RESULTS.json [--to FOLDER]`.

RESULTS.json is what `moe_speed.py --benchmark-json` or `pytest bench --benchmark-json` wrote. Two files
come of it, readable on a light and on a dark page: `speedup.svg`, the time of each other layer over ours
by the number of tokens, and `roofline.svg`, our FLOP/s by the FLOPs for each byte of weights that is
read, under the rates of a device copy and of a cuBLAS product in the same run. Needs matplotlib.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

OURS = "triton"
GREY = "#808690"
"""It has a contrast of more than 3.5 with white, and with the dark pages of GitHub."""
COLORS = ("#2f8fd0", "#d9722e", "#3f9f5f", "#b667c9", "#c9a227", "#d0506a", "#4fa7a7")
STYLE = {
    "axes.edgecolor": GREY,
    "axes.facecolor": "none",
    "axes.labelcolor": GREY,
    "axes.titlecolor": GREY,
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
    "ytick.color": GREY,
}
Cells = dict[str, dict[int, dict[str, Any]]]
"""By shape and tokens: the layers' median seconds by name, and ours' `extra_info`."""


def read(path: Path) -> Cells:
    """Read the layers of a file.

    Raises:
        SystemExit: the file is no results, or none of a layer.
    """
    try:
        benchmarks = json.loads(path.read_text("utf-8"))["benchmarks"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} is no file of pytest-benchmark: {error}") from None
    cells: Cells = defaultdict(lambda: defaultdict(lambda: {"seconds": {}, "extra": {}}))
    for b in benchmarks:
        extra = b["extra_info"]
        if "layer" not in extra:
            continue
        cell = cells[extra["shape"]][extra["tokens"]]
        cell["seconds"][extra["layer"]] = b["stats"]["median"]
        if extra["layer"] == OURS:
            cell["extra"] = extra
    found = {shape: {t: c for t, c in by.items() if c["extra"]} for shape, by in cells.items()}
    if not any(found.values()):
        raise SystemExit(f"{path} has no time of the layer {OURS!r}")
    return {shape: by for shape, by in found.items() if by}


def speedups(by: dict[int, dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Return for each other layer (tokens, its time over ours)."""
    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for tokens in sorted(by):
        seconds = by[tokens]["seconds"]
        for layer, time in seconds.items():
            if not layer.startswith(OURS) or layer == "triton, bf16":
                lines[layer].append((tokens, time / seconds[OURS]))
    return lines


def points(by: dict[int, dict[str, Any]]) -> list[tuple[float, float]]:
    """Return (FLOPs for each byte, FLOP/s) of ours."""
    return [
        (
            by[t]["extra"]["flop"] / by[t]["extra"]["bytes"],
            by[t]["extra"]["flop"] / by[t]["seconds"][OURS],
        )
        for t in sorted(by)
    ]


def draw(cells: Cells, folder: Path) -> list[Path]:
    """Write both files; return their paths."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    written = [folder / "speedup.svg", folder / "roofline.svg"]
    with pyplot.rc_context(STYLE):
        wide, axes = pyplot.subplots(
            1, len(cells), figsize=(4 * len(cells), 3.6), sharey=True, squeeze=False
        )
        names = list(dict.fromkeys(name for by in cells.values() for name in speedups(by)))
        for axis, (shape, by) in zip(axes[0], cells.items(), strict=True):
            for name, line in speedups(by).items():
                color = COLORS[names.index(name) % len(COLORS)]
                axis.plot(*zip(*line, strict=True), marker="o", ms=4, color=color, label=name)
            axis.axhline(1, color=GREY, lw=1, ls="--")
            axis.set(title=shape, xlabel="tokens", xscale="log")
            axis.grid(True)
        axes[0][0].set_ylabel("its time over ours")
        handles = {}
        for axis in axes[0]:
            handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        wide.legend(handles.values(), handles, loc="outside lower center", ncols=4)
        wide.tight_layout(rect=(0, 0.1, 1, 1))
        wide.savefig(written[0], metadata={"Date": None})

        figure, axis = pyplot.subplots(figsize=(7, 4.2))
        first = next(c["extra"] for by in cells.values() for c in by.values())
        copy, peak = first["copy_gb_s"] * 1e9, first["cublas_tflops"] * 1e12
        every = [point for by in cells.values() for point in points(by)]
        low, high = min(x for x, _ in every) / 2, max(max(x for x, _ in every) * 2, 2 * peak / copy)
        axis.plot(
            [low, peak / copy, high],
            [low * copy / 1e12, peak / 1e12, peak / 1e12],
            color=GREY,
            label=f"copy {copy / 1e12:.1f} TB/s, cuBLAS bf16 {peak / 1e12:.0f} TFLOP/s",
        )
        for color, (shape, by) in zip(COLORS, cells.items(), strict=False):
            x, y = zip(*points(by), strict=True)
            axis.plot(x, [v / 1e12 for v in y], marker="o", ms=4, color=color, label=shape)
        axis.set(xscale="log", yscale="log", ylabel="TFLOP/s")
        axis.set_xlabel("FLOPs for each byte of codes and block scales of the touched experts")
        axis.grid(True)
        axis.legend()
        figure.tight_layout()
        figure.savefig(written[1], metadata={"Date": None})
        pyplot.close("all")
    return written


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", type=Path, help="JSON of pytest-benchmark")
    parser.add_argument("--to", type=Path, default=Path("."), help="folder of the two files (.)")
    options = parser.parse_args(arguments)
    cells = read(options.results)
    try:
        options.to.mkdir(parents=True, exist_ok=True)
        for path in draw(cells, options.to):
            print(path)
    except ImportError as error:
        raise SystemExit(f"{error}: install nvfp4-moe[bench]") from None
    except OSError as error:
        raise SystemExit(f"{options.to} cannot be written: {error}") from None


if __name__ == "__main__":
    main()
