"""Cost of the canary on this GPU: `python bench/canary_cost.py [--json FILE]`.

A decode step is the experts of 48 layers of Qwen3-30B-A3B in one CUDA graph, without attention, so that
the share of the canary is larger than in a model. The same step with the canary at N = 1000 beside it.
"""

# SPDX-License-Identifier: Apache-2.0
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from measure import arguments, save, start

from nvfp4_moe import fused_moe, prepare_experts
from nvfp4_moe.canary import Canary
from nvfp4_moe.canary.judge import judge
from nvfp4_moe.canary.sample import taken_now
from nvfp4_moe.kernels.moe.api import layer_call

LAYERS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 48, 128, 8, 2048, 768
EVERY, ROUNDS, REPLAYS = 1000, 9, 300


def timed(call: Callable[[], object], times: int) -> float:
    """Microseconds of a call, `times` of them after one another."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / times


def main() -> None:
    options, where = start(arguments(__doc__ or ""))
    torch.manual_seed(0)
    made: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    w13 = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, **made) / 50
    w2 = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, **made) / 50
    one = prepare_experts(w13, w2)
    layers = [replace(one) for _ in range(LAYERS)]
    results: dict[str, object] = {**where, "every": EVERY}
    for tokens in (1, 32, 128):
        x = torch.randn(tokens, HIDDEN, **made)
        routes = []
        for _ in layers:
            logits = torch.randn(tokens, EXPERTS, dtype=torch.float32, device="cuda")
            weights, ids = logits.softmax(1).topk(TOP_K)
            routes.append((ids.int(), weights))
        canary = Canary(EVERY)

        def step(layer_of, x=x, routes=routes):
            for experts, routing in zip(layers, routes, strict=True):
                layer_of(x, experts, routing)

        graphs = {}
        for name, layer_of in (("without", fused_moe), ("with", canary.fused_moe)):
            step(layer_of)
            torch.cuda.synchronize()
            graphs[name] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[name]):
                step(layer_of)
        canary._queue.queue.clear()  # the first calls; what is measured is the steady state
        for graph in graphs.values():
            timed(graph.replay, 50)
        pairs = [
            {name: timed(graph.replay, REPLAYS) for name, graph in graphs.items()}
            for _ in range(ROUNDS)
        ]
        each = {name: statistics.median(p[name] for p in pairs) for name in graphs}
        shares = [p["with"] / p["without"] - 1 for p in pairs]
        cell = {
            "microseconds": each,
            "share": statistics.median(shares),
            "shares": [min(shares), max(shares)],
        }
        calls, _ = {}, [step(f) for f in (fused_moe, canary.fused_moe)]
        for name, layer_of in (("without", fused_moe), ("with", canary.fused_moe)):
            took = []
            for _ in range(5):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                step(layer_of)
                took.append((time.perf_counter() - begin) * 1e6 / LAYERS)
            calls[name] = statistics.median(took)
        cell["host microseconds of a call outside a graph"] = calls
        results[f"{tokens} tokens"] = cell
        print(f"{tokens} tokens:", cell, flush=True)
    x, routing = torch.randn(128, HIDDEN, **made), routes[0]
    call, _ = layer_call(x, one, routing)
    sample = taken_now("layer", call, "triton", fused_moe(x, one, routing), 0, 1)
    begin = time.perf_counter()
    alarm = judge(sample)
    results["seconds of the judge for one sample"] = time.perf_counter() - begin
    results["alarm"] = None if alarm is None else str(alarm)
    print(f"judge {results['seconds of the judge for one sample']:.2f} s, alarm {alarm}")
    results["counts"] = vars(canary.counts)
    print("counts", canary.counts)
    save(options.json, results)


if __name__ == "__main__":
    main()
