"""Speed of the fused mixture of experts on this GPU: `python bench/moe_speed.py [--json FILE]`.

Whole calls, bf16 hidden states and router logits to bf16 output, inside CUDA graphs. Beside them, in
the same run: the layer in bf16, made of `torch._grouped_mm` and as Triton kernels whose tiles are tuned
for each cell (`nvfp4_moe/bench/bf16_layer.py`), a device copy and a cuBLAS product. "Once" is a tuned
bf16 Triton layer without routing that was measured once, elsewhere, on an H100. The floor is the time of
reading the codes and block scales of the experts that were touched, at the copy's rate. "Workspace" is
the peak of what a call allocates beyond its output, as a share of `workspace_bound`, without weights
decoded ahead, which have a column of their own. Every shape's output is first compared with the
reference at a few tokens, every bf16 Triton layer's with fp32. `--shape` and `--tokens` measure a part,
`--tune` autotunes ours before; what was tuned here earlier is used in any case. `nvfp4-moe bench --only
moe` keeps times in a file, compares and draws them.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
from collections.abc import Callable
from dataclasses import astuple
from itertools import groupby
from typing import Any

import torch
from measure import DEVICE, arguments, count, save, start

import nvfp4_moe
from nvfp4_moe import Experts
from nvfp4_moe.bench import bf16_layer
from nvfp4_moe.bench.bf16_weights import Weights
from nvfp4_moe.bench.case import WrongResult
from nvfp4_moe.bench.clock import copy_rate, matmul_rate, microseconds, peak_bytes
from nvfp4_moe.bench.moe import (
    SHAPES,
    TOKENS,
    Shape,
    check,
    check_bf16,
    experts_of_local_slots,
    flop,
    grouped_mm_layer,
    inputs,
    random_bf16_weights,
    random_experts,
    weight_bytes,
)
from nvfp4_moe.kernels.moe import launch
from nvfp4_moe.kernels.moe.tile_table import gemm_config, local_slots, ring_serves
from nvfp4_moe.kernels.triton_target import arch, native_mma

TUNED_ONCE = {
    "Qwen3-30B-A3B": (40, 170, 374, 426, 511, 857, 2734),
    "DeepSeek-V3 rank": (250, 0, 942, 1015, 1703, 5615),
}
"""Microseconds of a tuned bf16 Triton layer on an H100, for `TOKENS`; 0: not measured."""
COLUMNS = (
    ("T", 6), ("local slots", 11), ("ours", 9), ("of floor", 9), ("TFLOP/s", 8), ("invariant", 10),
    ("W4A16", 9), ("workspace", 10), ("decoded MiB", 12), ("grouped_mm", 11), ("speedup", 8),
    ("bf16 Triton", 12), ("speedup", 8), ("once", 7), ("speedup", 8),
)  # fmt: skip


def workspace_bound(s: Shape, tokens: int, tile: int) -> int:
    """Bytes: a tile's padding for each expert, and of each slot what the two GEMMs read and write.

    bf16 [rows] and [I], the second's codes, block scales and token scale, and bf16 [H].
    """
    slots = tokens * s.top_k + s.experts * (tile - 1)
    i = s.intermediate
    return slots * (2 * s.rows + 2 * i + i // 2 + i // 16 + 4 + 2 * s.hidden)


def workspace(s: Shape, tokens: int, experts: Experts, call: Callable[[], torch.Tensor]) -> dict:
    """Peak bytes of a call, beyond its output, against the bound; weights decoded ahead apart."""
    matrices = (experts.gemm1_weights, experts.gemm2_weights)
    configs = [
        gemm_config(
            local_slots(tokens * s.top_k, experts, s.routed),
            s.experts,
            w.shape[2] * 2,
            native=native_mma(arch(w.device)),
        )
        for w in matrices
    ]
    decoded = []
    for w, config in zip(matrices, configs, strict=True):
        expert = w[0].numel() * 4  # bf16 of two codes a byte
        at_once = max(1, min(s.experts, launch._DECODED_BYTES // expert))
        decoded.append(at_once * expert if config.decoded and not ring_serves(experts) else 0)
    # Everything that the call keeps is allocated during the second GEMM, which has the peak.
    used = peak_bytes(call) - decoded[1]
    bound = workspace_bound(s, tokens, configs[0].bn)
    return {
        "workspace_bytes": used,
        "workspace_bound_bytes": bound,
        "workspace": used / bound,
        "decoded_bytes": max(decoded),
    }


def measure(s: Shape, tokens: int, experts: Experts, w: Weights, copy: float) -> dict:
    x, logits = inputs(s, tokens, DEVICE)
    calls = 10 if tokens < 1024 else 2
    slots = experts_of_local_slots(s, logits)
    slots_here = slots.numel()

    def ours(**options: Any) -> torch.Tensor:
        return nvfp4_moe.fused_moe(
            x, experts, (logits, s.routing), backend="triton", fast_math=True, **options
        )

    def us(call: Callable[[], object]) -> float:
        return microseconds(call, calls, 5)

    done = {"flop": flop(s, slots), "bytes": weight_bytes(s, slots)}
    cell: dict[str, Any] = {"shape": s.name, "tokens": tokens, "local_slots": slots_here}
    cell["us"] = us(ours)
    cell["floor_us"] = done["bytes"] / copy / 1e3
    cell["invariant_us"] = us(lambda: ours(batch_invariant=True))
    cell["w4a16_us"] = us(lambda: ours(activation="bf16"))
    cell["grouped_mm_us"] = us(lambda: grouped_mm_layer(x, logits, w, s.top_k, slots_here))
    tiles = bf16_layer.tune(x, logits, w, s.top_k, calls)
    check_bf16(s, bf16_layer.layer(x, logits, w, s.top_k, tiles), x, logits, w)
    cell["bf16_triton_us"] = us(lambda: bf16_layer.layer(x, logits, w, s.top_k, tiles))
    cell["bf16_triton_tiles"] = [astuple(t) for t in tiles]
    once = dict(zip(TOKENS, TUNED_ONCE.get(s.name, ()), strict=False))
    cell["tuned_once_us"] = once.get(tokens) or None
    cell["tflops"] = done["flop"] / cell["us"] / 1e6
    return cell | done | workspace(s, tokens, experts, ours)


def heading() -> str:
    return "".join(f"{name:>{width}}" for name, width in COLUMNS)


def line(c: dict) -> str:
    """A cell under `heading`."""
    once = c["tuned_once_us"]
    values = (
        c["tokens"], c["local_slots"], f"{c['us']:.0f}", f"{c['floor_us'] / c['us']:.2f}",
        f"{c['tflops']:.0f}", f"{c['invariant_us']:.0f}", f"{c['w4a16_us']:.0f}",
        f"{c['workspace']:.2f}", f"{c['decoded_bytes'] / 2**20:.0f}",
        f"{c['grouped_mm_us']:.0f}", f"{c['grouped_mm_us'] / c['us']:.2f}",
        f"{c['bf16_triton_us']:.0f}", f"{c['bf16_triton_us'] / c['us']:.2f}",
        once or "-", f"{once / c['us']:.2f}" if once else "-",
    )  # fmt: skip
    return "".join(f"{v:>{width}}" for v, (_, width) in zip(values, COLUMNS, strict=True))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shape", choices=[s.name for s in SHAPES], help="this one only")
    parser.add_argument("--tokens", type=count, help="this number only")
    parser.add_argument("--tune", action="store_true", help="autotune ours before")
    options, where = start(parser)
    copy, cublas = copy_rate(DEVICE), matmul_rate(DEVICE)
    print(f"device copy {copy:.0f} GB/s, cuBLAS bf16 {cublas:.0f} TFLOP/s")
    try:
        cells = run(options, copy)
    except WrongResult as wrong:
        raise SystemExit(str(wrong)) from None
    save(options.json, {**where, "copy": copy, "cells": cells})


def run(options: argparse.Namespace, copy: float) -> list[dict]:
    """Measure and print the cells that are asked for."""
    cells: list[dict] = []
    wanted = [s for s in SHAPES if options.shape in (None, s.name)]
    for _, same_weights in groupby(wanted, lambda s: s.weights_key):
        cells += run_shapes(list(same_weights), options, copy)
    return cells


def run_shapes(shapes: list[Shape], options: argparse.Namespace, copy: float) -> list[dict]:
    """Measure and print the cells of shapes that have the same weights."""
    cells: list[dict] = []
    experts, w = random_experts(shapes[0], DEVICE), random_bf16_weights(shapes[0], DEVICE)
    for s in shapes:
        check(s, experts, backend="triton")
        counts = [options.tokens] if options.tokens else TOKENS
        if options.tune:
            for tuning in nvfp4_moe.autotune_fused_moe(
                experts, counts, s.top_k, num_experts=s.routed
            ):
                print(f"\n{s.name}, {tuning}", flush=True)
        ranks = f" of {s.routed}" if s.ranks > 1 else ""
        print(
            f"\n{s.name}: H {s.hidden}, I {s.intermediate}, E {s.experts}{ranks}, K {s.top_k}; us"
        )
        print(heading())
        for tokens in counts:
            cells.append(measure(s, tokens, experts, w, copy))
            print(line(cells[-1]), flush=True)
    return cells


if __name__ == "__main__":
    main()
