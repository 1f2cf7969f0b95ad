"""The tables of `embeddings.md`."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from pages import marks

MARKS = marks("examples/embeddings.py")
BASELINE, SPLIT = "bf16 model", "bf16 experts, not quantized"


@dataclass
class Results:
    """The numbers of the page, for each method by its label."""

    to_bf16: dict[str, torch.Tensor] = field(default_factory=dict)  # [N], of a sentence
    to_fp32: dict[str, torch.Tensor] = field(default_factory=dict)
    same_nearest: dict[str, float] = field(default_factory=dict)  # share of the sentences
    by_layer: dict[str, list[float]] = field(default_factory=dict)  # of each layer alone
    spread: list[tuple[float, float]] = field(default_factory=list)  # of row maxima, of each layer


def tables(results: Results, labels: Sequence[str]) -> str:
    """Both tables, as Markdown, of these methods."""
    lines = [
        "| feed-forward layers | median | 90 % | worst | to fp32, median | same nearest sentence |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| {BASELINE} | 0 | 0 | 0 | {results.to_fp32[BASELINE].median():.2e} | 100 % |",
    ]
    for label in labels:
        error = results.to_bf16[label]
        lines.append(
            f"| {label} | {error.median():.2e} | {error.quantile(0.9):.2e} | {error.max():.2e} | "
            f"{results.to_fp32[label].median():.2e} | {100 * results.same_nearest[label]:.0f} % |"
        )
    numbers = " | ".join(str(layer) for layer in range(len(results.spread)))
    lines += ["", f"| layer | {numbers} |", "| --- |" + " --- |" * len(results.spread)]
    for name, spread in zip(
        ("input", "intermediate"), zip(*results.spread, strict=True), strict=True
    ):
        cells = " | ".join(f"{value:.0f}" for value in spread)
        lines.append(f"| largest row maximum / smallest, {name} | {cells} |")
    for label in labels:
        cells = " | ".join(f"{100 * value:.2f} %" for value in results.by_layer[label])
        lines.append(f"| {label} | {cells} |")
    return "\n".join(lines)
