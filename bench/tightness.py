"""Measure how tight the proved intervals are, and where Triton's outputs lie in them.

Run `python bench/tightness.py`.

For the benchmark's layers and every configuration of the table, judged with sums in any order, and with
sums of contiguous ranges. Half-widths are in units of the row's rms; "one value" is the share of
intervals that hold a single bf16 number, of outputs and of FC2's rows given the intermediate. The last
column is the cost of the intervals in times the reference's own.
"""

# SPDX-License-Identifier: Apache-2.0
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import DEVICE, arguments, save, start

from nvfp4_moe.bench.moe import SHAPES, random_experts
from nvfp4_moe.kernels.moe import launch
from nvfp4_moe.kernels.moe.call import KernelCall
from nvfp4_moe.kernels.moe.tile_table import gemm_config
from nvfp4_moe.reference.bounds.accumulation import ANY_ORDER, CONTIGUOUS
from nvfp4_moe.reference.bounds.moe import fused_moe_bounds
from nvfp4_moe.reference.moe import layer as reference
from nvfp4_moe.reference.moe.hidden_states import quantize_activations
from nvfp4_moe.reference.recipe import Recipe

TOKENS = (1, 64, 512)


def configurations(tokens: int, top_k: int, local: int, columns: int) -> list[Any]:
    """Those that the table would choose for some count of tokens, the actual one first."""
    chosen = gemm_config(tokens * top_k, local, columns)
    others = {
        gemm_config(slots, 8, width) for slots in range(1, 16384, 7) for width in (768, 2048, 7168)
    }
    return [chosen, *sorted(others - {chosen}, key=str)]


def seconds(call: Callable[[], Any]) -> float:
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    options, where = start(arguments(__doc__))
    print("half-width: median, 99 %; one value: outputs, rows; outside: of all configurations\n")
    places: Counter[int] = Counter()
    found = []
    for s in SHAPES:
        if s.ranks > 1:
            continue
        experts, top_k = random_experts(s, DEVICE), s.top_k
        for tokens in TOKENS:
            g = torch.Generator(DEVICE).manual_seed(tokens)
            x = torch.randn(tokens, experts.padded_hidden_size, device=DEVICE, generator=g)
            x[:, s.hidden :] = 0
            activations = quantize_activations(x.bfloat16(), Recipe())
            scores = torch.rand(tokens, s.experts, device=DEVICE, generator=g)
            weights, ids = (t[:, :top_k].contiguous() for t in scores.sort(1, descending=True))
            given = (activations, experts, ids.int(), weights.bfloat16())
            want = reference.fused_moe(*given, keep_steps=True)
            outputs = [
                launch.fused_moe(
                    KernelCall(activations, experts, s.experts), *given[2:], config=config
                )[0]
                for config in configurations(tokens, top_k, s.experts, s.rows)
            ]
            for accumulation in (ANY_ORDER, CONTIGUOUS):
                bounds = fused_moe_bounds(*given, accumulation=accumulation)
                second = fused_moe_bounds(
                    *given,
                    accumulation=accumulation,
                    intermediate=want.steps["intermediate"].float(),
                )
                low, high = bounds.output.low, bounds.output.high
                half = (high - low) / 2 / want.output.double().square().mean(1, keepdim=True).sqrt()
                outside = sum(int((~bounds.output.contains(o)).sum()) for o in outputs)
                some = half.flatten()[:: max(half.numel() // 10**6, 1)]
                row = {
                    "layer": s.name,
                    "T": tokens,
                    "sums": accumulation.name,
                    "median": some.median().item(),
                    "p99": some.quantile(0.99).item(),
                    "outputs": (low == high).double().mean().item(),
                    "rows": (second.rows.low == second.rows.high).double().mean().item(),
                    "configurations": len(outputs),
                    "outside": outside,
                    "equal": (outputs[0] == want.output).double().mean().item(),
                }
                if accumulation is CONTIGUOUS:
                    wide = (high > low) & low.isfinite() & high.isfinite()
                    place = (outputs[0].double() - low)[wide] / (high - low)[wide]
                    places.update((place * 10).long().clamp(0, 9).tolist())
                cost = ""
                if tokens == 64:
                    times = seconds(partial(fused_moe_bounds, *given, accumulation=accumulation))
                    row["cost"] = times / seconds(partial(reference.fused_moe, *given))
                    cost = f"{row['cost']:6.1f} x"
                found.append(row)
                print(
                    f"{s.name:<24}T {tokens:>4}  {accumulation.name:<11}{row['median']:9.5f}"
                    f"{row['p99']:9.5f}{row['outputs']:8.1%}{row['rows']:8.1%}"
                    f"  {outside} outside of {len(outputs)} x {outputs[0].numel()}"
                    f"  equal to the reference {row['equal']:.2%}{cost}",
                    flush=True,
                )
    total = sum(places.values())
    print("\nwhere outputs lie in intervals of more than one value (contiguous), tenths:")
    print("  " + "  ".join(f"{places[i] / max(total, 1):.3f}" for i in range(10)) + f"  of {total}")
    save(options.json, where | {"cells": found})


if __name__ == "__main__":
    main()
