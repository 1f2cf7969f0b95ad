"""Time of `fake_quantized_moe` and its backward: `python bench/training_speed.py [--json FILE]`.

Experts that are loaded already and bf16 or fp32 weights, all of whose gradients are wanted, x's and the
routing weights' too. Times are medians between two CUDA events, in ms, outside CUDA graphs. "Alone" the
GPU has nothing else to do, and waits for the host. "Ahead" it is busy with other work while the host
launches a step, as in the middle of a model. "Peak" is what a forward with its backward
allocates at most beside its arguments. `--profile` lists the kernels of a backward, the longest first.
"""

# SPDX-License-Identifier: Apache-2.0
import statistics
from typing import Any

import torch
from measure import DEVICE, arguments, count, save, start

from nvfp4_moe import fake_quantized_moe
from nvfp4_moe.bench.moe import SHAPES, Shape, inputs, random_bf16_weights, random_experts

ROUNDS = 20
AHEAD = 20_000_000
"""Cycles, about 10 ms: more than a host needs for the launches of a step."""
MODES = [
    (mode, backward)
    for mode in ("bf16", "per-token")
    for backward in ("dequantized", "high_precision")
]


class Layer:
    """A layer's leaves and options."""

    def __init__(self, s: Shape, tokens: int, mode: str, backward: str, dtype: torch.dtype) -> None:
        x, logits = inputs(s, tokens, DEVICE)
        weights, ids = logits.softmax(1).topk(s.top_k)
        w = random_bf16_weights(s, DEVICE)
        leaves = (x, w.w13.to(dtype), w.w2.to(dtype), weights.bfloat16())
        self.leaves = [t.requires_grad_() for t in leaves]
        self.ids, self.grad = ids.int(), torch.randn_like(x)
        self.options: dict[str, Any] = {
            "activation_mode": mode,
            "backward": backward,
            "experts": random_experts(s, DEVICE),
        }

    def forward(self) -> torch.Tensor:
        x, w13, w2, weights = self.leaves
        return fake_quantized_moe(x, w13, w2, (self.ids, weights), **self.options)

    def backward(self, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(y, self.leaves, self.grad)


def times(layer: Layer, cycles: int) -> tuple[float, float]:
    """Return the median milliseconds of a forward and of its backward.

    Args:
        cycles: of the GPU, for which it does nothing while the host launches the step.
    """
    found: list[tuple[float, float]] = []
    for i in range(ROUNDS + 3):
        begin, between, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda._sleep(cycles)
        begin.record()
        y = layer.forward()
        between.record()
        layer.backward(y)
        end.record()
        end.synchronize()
        if i >= 3:  # compiled, and warm
            found.append((begin.elapsed_time(between), between.elapsed_time(end)))
    forward, backward = zip(*found, strict=True)
    return statistics.median(forward), statistics.median(backward)


def peak(layer: Layer) -> float:
    """Return the GiB that a forward and its backward need beside the arguments."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layer.backward(layer.forward())
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def profile(layer: Layer) -> str:
    """Return a table of the kernels of one backward."""
    y = layer.forward()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        layer.backward(y)
        torch.cuda.synchronize()
    return seen.key_averages().table(
        sort_by="cuda_time_total", row_limit=25, max_name_column_width=70
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=count, default=4096, help="rows of x; default: 4096")
    parser.add_argument("--profile", action="store_true", help="list the kernels of a backward")
    options, where = start(parser)
    s, cells = SHAPES[0], []
    print(f"{s.name}, T = {options.tokens}")
    print(f"{'':38}{'alone':>18}{'ahead':>18}")
    times_of = f"{'forward':>9}{'backward':>9}" * 2
    print(f"{'activations':<12}{'backward':<16}{'weights':<10}{times_of}{'peak':>7}")
    for dtype in (torch.bfloat16, torch.float32):
        for mode, backward in MODES:
            layer = Layer(s, options.tokens, mode, backward, dtype)
            alone, ahead = times(layer, 0), times(layer, AHEAD)
            gib, name = peak(layer), str(dtype).removeprefix("torch.")
            shown = "".join(f"{ms:>9.2f}" for ms in (*alone, *ahead))
            print(f"{mode:<12}{backward:<16}{name:<10}{shown}{gib:>7.1f}")
            cells.append(
                {
                    "activation_mode": mode,
                    "backward": backward,
                    "weights": name,
                    "alone_ms": alone,
                    "ahead_ms": ahead,
                    "peak_gib": gib,
                }
            )
            if options.profile and dtype == torch.bfloat16:
                print(profile(layer))
            del layer
    save(options.json, where | {"layer": s.name, "tokens": options.tokens, "cells": cells})


if __name__ == "__main__":
    main()
