"""Time of each kernel of a mixture of experts on this GPU: `python bench/moe_profile.py [--json FILE]`.

Whole calls of the layers in W4A4 and W4A16, one in a CUDA graph, under torch's profiler. A line is a
kernel of the call, in the order of launches: its median time and its share of the call's. "Gap" is the
time from the end of the kernel before, below 0 where a kernel starts while that one ends. The floor of a
GEMM is the larger of the time of its weights at the copy's rate, and of its products at the rate of a
cuBLAS bf16 product, both measured in the same run. The call's own time, which stands above its kernels,
is of such a graph without the profiler. `--shape` and `--tokens` measure a part.
"""

# SPDX-License-Identifier: Apache-2.0
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from measure import DEVICE, arguments, count, save, start
from torch.profiler import ProfilerActivity, profile

from nvfp4_moe import Experts, fused_moe
from nvfp4_moe.bench.clock import Rates, captured, microseconds, rates
from nvfp4_moe.bench.moe import (
    NVFP4,
    SHAPES,
    TOKENS,
    Shape,
    experts_of_local_slots,
    inputs,
    random_experts,
)
from nvfp4_moe.kernels.moe.call import Mode

MODES: tuple[Mode, ...] = ("per-token", "bf16")
REPLAYS = 20
GEMM = "expert_gemm_kernel"


@dataclass(frozen=True)
class Kernel:
    """One launch of a call, in microseconds; `gap` is None for the first."""

    name: str
    us: float
    gap: float | None
    floor: float | None = None


def in_order(events: Sequence[tuple[str, float, float]], calls: int) -> list[Kernel]:
    """Return the kernels of one call, each with the median time of all calls.

    Args:
        events: name, begin and end in microseconds of every launch of `calls` equal calls.
        calls: how many there were.

    Raises:
        ValueError: the launches are not those of so many equal calls.
    """
    ordered = sorted(events, key=lambda e: e[1])
    each, left = divmod(len(ordered), calls)
    if not each or left:
        raise ValueError(f"{len(ordered)} launches are not those of {calls} equal calls")
    kernels = []
    for i in range(each):
        mine = ordered[i::each]
        if len({name for name, _, _ in mine}) > 1:
            raise ValueError(f"launch {i} has several names: {sorted({e[0] for e in mine})}")
        gaps = [b[1] - a[2] for a, b in zip(ordered[i - 1 :: each], mine, strict=True)] if i else []
        kernels.append(
            Kernel(
                mine[0][0],
                statistics.median(end - begin for _, begin, end in mine),
                statistics.median(gaps) if gaps else None,
            )
        )
    return kernels


def profiled(call: Callable[[], object]) -> list[Kernel]:
    """Return the kernels of a call, from replays of a CUDA graph that holds it once."""
    graph = captured(call, 1)
    graph.replay()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
    events = [
        (e.name, e.time_range.start, e.time_range.end)
        for e in profiler.events()
        if e.device_type == torch.autograd.DeviceType.CUDA
    ]
    return in_order(events, REPLAYS)


def gemm_floors(s: Shape, slots: torch.Tensor, at: Rates) -> list[float]:
    """Return the least microseconds of both GEMMs; `slots` are the experts of local slots."""
    touched = slots.unique().numel()
    return [
        at.least_seconds(2 * weights * slots.numel(), weights * touched * NVFP4) * 1e6
        for weights in (s.rows * s.hidden, s.intermediate * s.hidden)
    ]


def measure(s: Shape, tokens: int, experts: Experts, mode: Mode, at: Rates) -> dict[str, Any]:
    """Return the call's time and its kernels, and print them."""
    x, logits = inputs(s, tokens, DEVICE)

    def call() -> torch.Tensor:
        return fused_moe(
            x, experts, (logits, s.routing), activation=mode, backend="triton", fast_math=True
        )

    us = microseconds(call, 1)
    floors = iter(gemm_floors(s, experts_of_local_slots(s, logits), at))
    kernels = [
        replace(k, floor=next(floors, None)) if GEMM in k.name else k for k in profiled(call)
    ]
    print(f"\n{s.name}, T = {tokens}, {mode}: {us:.1f} us")
    for k in kernels:
        gap = "" if k.gap is None else f"{k.gap:+.1f}"
        floor = "" if k.floor is None else f"  floor {k.floor:.1f}, {k.floor / k.us:.2f} of it"
        print(f"{k.us:>10.1f}{k.us / us:>6.2f}{gap:>8}  {k.name}{floor}", flush=True)
    return {
        "shape": s.name,
        "tokens": tokens,
        "activation": mode,
        "us": us,
        "kernels": [asdict(k) for k in kernels],
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shape", choices=[s.name for s in SHAPES], help="this one only")
    parser.add_argument("--tokens", type=count, action="append", help="these numbers only")
    options, where = start(parser)
    at = rates(DEVICE)
    print(at)
    print(f"{'us':>10}{'share':>6}{'gap':>8}  kernel")
    cells = []
    for s in SHAPES:
        if options.shape not in (None, s.name):
            continue
        experts = random_experts(s, DEVICE)
        for tokens in options.tokens or TOKENS:
            cells += [measure(s, tokens, experts, mode, at) for mode in MODES]
        del experts
    save(options.json, where | {"rates": asdict(at), "cells": cells})


if __name__ == "__main__":
    main()
