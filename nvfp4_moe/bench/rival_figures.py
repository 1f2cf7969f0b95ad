"""Ours beside its rivals: in the run, and beside the figures that they had on an H200 on one day.

The dated figures are whole calls, with what `nvfp4-moe bench --only moe` counts: from fp32 router logits
and bf16 hidden states to bf16 output, on random weights and inputs. Ten calls were in a CUDA graph, two
from 1,024 tokens on; a figure is the median of 5 replays. GPT-OSS had plain SwiGLU and no biases. The
GPU was one NVIDIA H200, with torch 2.11.0+cu130 and Triton 3.6.0.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .results import Measurement
from .rival_layers import HUMMING, QUACK

DATE = "2026-11-29"
DEVICE = "NVIDIA H200"
"""The name of the GPU on which the dated figures were measured."""
OURS = ("triton", "triton, W4A16")
_TOKENS = (1, 8, 32, 128, 1024, 4096, 16384)
_QWEN3, _DEEPSEEK, _GPT_OSS = "Qwen3-30B-A3B", "DeepSeek-V3 rank", "GPT-OSS"


@dataclass(frozen=True)
class Rival:
    """A library that users could take instead."""

    name: str
    backend: str | None  # of this benchmark; None: it has none
    dated: Sequence[Mapping[str, Sequence[float | None]]]
    """Microseconds by shape, for each of `_TOKENS`, in each form that ran; None: not measured."""

    def dated_seconds(self, m: Measurement) -> float | None:
        """Return the smallest dated figure of a cell, if its GPU is the one of the figures."""
        if m.device != DEVICE or m.tokens not in _TOKENS:
            return None
        place = _TOKENS.index(m.tokens)
        found = [form[m.shape][place] for form in self.dated if m.shape in form]
        return min((us * 1e-6 for us in found if us is not None), default=None)


RIVALS = (
    Rival(
        "humming 0.1.19, W4A16",
        HUMMING,
        (
            {  # indexed
                _QWEN3: (28.6, 80.0, 150, 172, 280, 809, 2965),
                _DEEPSEEK: (88.0, 261, 344, 394, 1523, 6106, 22966),
                _GPT_OSS: (50.1, 181, 432, 671, 979, 2290, 7820),
            },
            {  # grouped_contiguous
                _QWEN3: (36.3, 79.4, 141, 168, 311, 790, 2511),
                _DEEPSEEK: (96.3, 255, 348, 414, 1406, 4490, 18842),
                _GPT_OSS: (57.9, 189, 448, 684, 962, 1708, 5897),
            },
        ),
    ),
    Rival(
        "QuACK 0.6.5, bf16",
        QUACK,
        (
            {
                _QWEN3: (None, None, None, 441, 399, 781, 2171),
                _DEEPSEEK: (None, None, None, 808, 1532, 4939, 19059),
            },
        ),
    ),
    Rival(
        "Marlin of SGLang 0.5.23, W4A16",
        None,
        (
            {  # atomic additions, as SGLang calls it
                _QWEN3: (25.9, 74.1, 127, 164, 516, 1502, 5387),
                _DEEPSEEK: (93.6, 265, 327, 549, 2920, 11064, 50489),
                _GPT_OSS: (43.4, 161, 412, 659, 1283, 3846, 14215),
            },
            {  # sums in fp32, as vLLM calls it
                _QWEN3: (32.7, 74.5, 128, 164, 511, 1504, 5480),
                _DEEPSEEK: (94.6, 264, 327, 538, 3032, 11016, 50999),
                _GPT_OSS: (46.9, 162, 411, 658, 1275, 3875, 14178),
            },
        ),
    ),
    Rival(
        "DeepGEMM (sgl-deep-gemm 0.1.3), bf16",
        None,
        (
            {
                _QWEN3: (None, None, None, 434, 542, 897, 2464),
                _DEEPSEEK: (None, None, None, 953, 1671, 4532, 18315),
            },
        ),
    ),
)


@dataclass(frozen=True)
class Comparison:
    """A rival's times in one cell, and ours over the smaller of them."""

    shape: str
    tokens: int
    rival: str
    now: float | None  # seconds, in the run
    dated: float | None  # seconds, on DATE
    ours: Mapping[
        str, float
    ]  # by backend: our time over the smaller of the two; below 1 ours is faster

    @property
    def seconds(self) -> float:
        """The smaller of the two times."""
        return min(s for s in (self.now, self.dated) if s is not None)


def compare(measurements: Sequence[Measurement]) -> list[Comparison]:
    """Return each rival's comparison in each cell in which ours was measured."""
    found = []
    cells: dict[tuple[str, int], dict[str, Measurement]] = {}
    for m in measurements:
        if m.operation == "moe":
            cells.setdefault((m.shape, m.tokens), {})[m.backend] = m
    for (shape, tokens), cell in cells.items():
        ours = [cell[name] for name in OURS if name in cell]
        for rival in RIVALS if ours else ():
            beside = cell.get(rival.backend or "")
            now = None if beside is None else beside.seconds
            dated = rival.dated_seconds(ours[0])
            times = [s for s in (now, dated) if s is not None]
            if times:
                ratios = {m.backend: m.seconds / min(times) for m in ours}
                found.append(Comparison(shape, tokens, rival.name, now, dated, ratios))
    return found


def fastest(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the comparison with the fastest rival of each cell."""
    best: dict[tuple[str, int], Comparison] = {}
    for c in comparisons:
        key = c.shape, c.tokens
        if key not in best or c.seconds < best[key].seconds:
            best[key] = c
    return list(best.values())
