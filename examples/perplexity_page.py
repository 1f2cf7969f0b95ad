"""The tables and the plot of `docs/perplexity.md`."""

# SPDX-License-Identifier: Apache-2.0
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pages import marks

MARKS = marks("examples/smollm2_perplexity.py")
BASELINE, EXACT, SPLIT = "bf16 model", "fp32 model", "bf16 experts, not quantized"
SHOWN = (0, 1, 5, 10, 15, 20, 25, 28, 29)
"""The layers that the second table and the plot have."""


@dataclass
class Results:
    """The numbers of the page, for each method by its label."""

    losses: dict[str, torch.Tensor] = field(default_factory=dict)  # [N, T - 1], of a token, in nats
    divergences: dict[str, torch.Tensor] = field(default_factory=dict)  # [N, T - 1], to bf16
    same_token: dict[str, float] = field(default_factory=dict)  # share of the tokens
    by_layer: dict[str, list[float]] = field(default_factory=dict)  # error of each layer alone
    spread: list[tuple[float, float]] = field(default_factory=list)  # of row maxima, of each layer
    outliers: list[tuple[float, float]] = field(default_factory=list)  # row maximum / RMS, median
    cut: tuple[float, float] = (0.0, 0.0)  # what the cut changes in fp32: of a layer, of a logit

    def perplexity(self, label: str) -> float:
        """Return e to the mean loss."""
        return self.losses[label].mean().exp().item()

    def increase(self, label: str) -> tuple[float, float]:
        """Return the loss beyond the bf16 model's, in nats a token: its mean and standard error.

        The error is over the texts, whose tokens are not independent.
        """
        by_text = (self.losses[label] - self.losses[BASELINE]).mean(1)
        return by_text.mean().item(), (by_text.std() / math.sqrt(len(by_text))).item()


def decibels(error: float) -> float:
    """Return the signal-to-noise ratio of a relative error."""
    return -20 * math.log10(error)


def tables(results: Results, labels: Sequence[str]) -> str:
    """Write both tables, as Markdown, of these methods."""
    layer, logit = results.cut
    lines = [
        f"In fp32 the cut changes a layer's output by at most {layer:.1e} (relative error of the "
        f"worst layer), and a logit by at most {logit:.1e} of the largest.",
        "",
        "| feed-forward layers | perplexity | loss over bf16's | KL divergence | same token | "
        "SNR of a layer: median, worst |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for label in (EXACT, BASELINE, *labels):
        increase, error = results.increase(label)
        cells = [label, f"{results.perplexity(label):.2f}", f"{increase:+.4f} ± {error:.4f}"]
        cells += [
            f"{results.divergences[label].mean():.4f}",
            f"{100 * results.same_token[label]:.1f} %",
        ]
        if label == BASELINE:
            cells[2:] = ["0", "0", "100 %"]
        ratios = sorted(map(decibels, results.by_layer.get(label, ())))
        middle = ratios[len(ratios) // 2] if ratios else 0.0
        cells += [f"{middle:.1f} dB, {ratios[0]:.1f} dB" if ratios else "-"]
        lines.append(f"| {' | '.join(cells)} |")
    shown = [i for i in SHOWN if i < len(results.spread)]
    lines += ["", f"| layer | {' | '.join(map(str, shown))} |", "| --- |" + " --- |" * len(shown)]
    for what, pairs in (
        ("largest row maximum / smallest", results.spread),
        ("row maximum / RMS, median", results.outliers),
    ):
        for place, name in enumerate(("input", "intermediate")):
            cells = [f"{pairs[i][place]:.0f}" for i in shown]
            lines.append(f"| {what}, {name} | {' | '.join(cells)} |")
    for label in labels:
        cells = [f"{decibels(results.by_layer[label][i]):.1f} dB" for i in shown]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Line:
    """A method in the plot: the loss beyond bf16's, its standard error, and the SNR by layer."""

    increase: float
    error: float
    decibels: dict[int, float]


def lines(results: Results, labels: Iterable[str]) -> dict[str, Line]:
    """Take what the plot shows of these methods."""
    return {
        label: Line(
            *results.increase(label),
            {i: decibels(e) for i, e in enumerate(results.by_layer[label]) if i in SHOWN},
        )
        for label in labels
    }


def plot(lines: Mapping[str, Line], path: Path) -> None:
    """Draw each method's loss and its layers' SNR, readable on a light and on a dark page.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit(f"{error}: install nvfp4-moe[bench]") from None
    from nvfp4_moe.bench.plots import COLORS, GREY, STYLE

    matplotlib.use("svg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.2))
        colors = COLORS[: len(lines)]
        for i, (line, color) in enumerate(zip(lines.values(), colors, strict=True)):
            left.errorbar(line.increase, i, xerr=2 * line.error, fmt="o", color=color, capsize=3)
            right.plot(*zip(*line.decibels.items(), strict=True), marker="o", ms=4, color=color)
        left.set_yticks(range(len(lines)), list(lines))
        left.invert_yaxis()
        left.axvline(0, color=GREY, lw=1, ls="--")
        left.set(xlabel="loss over the bf16 model's, nats a token (± 2 standard errors)")
        right.set(xlabel="layer", ylabel="SNR of the layer's output, dB")
        for axis in (left, right):
            axis.grid(True)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
