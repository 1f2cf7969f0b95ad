"""Speed of a reload on this GPU: `python bench/reload_speed.py [--json FILE]`.

Needs PyTorch and Triton, no installation and no network. bf16 weights of a layer into its NVFP4
experts, in place, inside a CUDA graph: bytes moved (the weights twice, since the maxima come first, once
with the maxima given; codes and block scales) over time, as a share of the rate of a device copy (read
and written) in the same run. Every cell's bits are compared with experts prepared anew.
"""

# SPDX-License-Identifier: Apache-2.0
import time
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from measure import DEVICE, arguments, save, start

from nvfp4_moe.bench.clock import copy_rate, microseconds
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe
from nvfp4_moe.reference.weights.experts import Experts
from nvfp4_moe.reference.weights.prepare import prepare_experts

SHAPES = {  # experts, H, I
    "Qwen3-30B-A3B": (128, 2048, 768),
    "DeepSeek-V3, 32 of 256 experts": (32, 7168, 2048),
    "GPT-OSS-120B": (128, 2880, 2880),
}
RECIPES = (Recipe("exact"), Recipe("exact", NVFP44Over6Config(256, "MSE")))
WEIGHTS = ("gemm1_weights", "gemm1_weights_scale", "gemm2_weights", "gemm2_weights_scale")
SCALARS = ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar")


def weights(experts: int, hidden: int, intermediate: int) -> tuple[torch.Tensor, torch.Tensor]:
    size = 2.0 ** torch.arange(experts, device=DEVICE).remainder(7)[:, None, None]
    sizes = (experts, 2 * intermediate, hidden), (experts, hidden, intermediate)
    w13, w2 = (torch.randn(s, device=DEVICE, dtype=torch.bfloat16) * size.bfloat16() for s in sizes)
    return w13, w2


def room_for(w13: torch.Tensor, w2: torch.Tensor) -> Experts:
    """Experts of these sizes: the first, over and over."""
    one = prepare_experts(w13[:1], w2[:1])
    tensors = {f.name: getattr(one, f.name) for f in fields(one)}
    repeated: dict[str, Any] = {
        name: t.repeat(w13.shape[0], *[1] * (t.dim() - 1))
        for name, t in tensors.items()
        if isinstance(t, torch.Tensor)
    }
    return replace(one, **repeated)


def check(experts: Experts, w13: torch.Tensor, w2: torch.Tensor, recipe: Recipe) -> None:
    """A few experts, since the reference needs memory."""
    for e in (0, 1, experts.num_local - 1):
        want = prepare_experts(w13[e : e + 1], w2[e : e + 1], recipe=recipe)
        for name in WEIGHTS + SCALARS:
            got = getattr(experts, name)[e : e + 1]
            if not torch.equal(got.view(torch.uint8), getattr(want, name).view(torch.uint8)):
                raise SystemExit(f"wrong bits: {name} of expert {e}, {recipe}")


def waiting(call: Callable[[], object]) -> float:
    """Microseconds of a call that waits for the GPU."""
    call()
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e6


def measure(name: str, copy: float) -> list[dict]:
    w13, w2 = weights(*SHAPES[name])
    experts = room_for(w13, w2)
    amax = w13.abs().amax((1, 2)).float(), w2.abs().amax((1, 2)).float()
    written = sum(getattr(experts, name).nbytes for name in WEIGHTS)
    read = w13.nbytes + w2.nbytes
    cells = []
    for recipe in RECIPES:
        for n, calls in ((w13.shape[0], 3), (1, 20)):
            for given in (None, tuple(a[:n] for a in amax)):

                def call(n=n, given=given, recipe=recipe):
                    experts.load_(w13[:n], w2[:n], amax=given, recipe=recipe)

                moved = (read * (1 if given else 2) + written) * n / w13.shape[0]
                us = microseconds(call, calls)
                check(experts, w13, w2, recipe)
                share = moved / us / 1e3 / copy
                what = f"{n} experts" if n > 1 else "1 expert"
                what += ", maxima given" if given else ""
                print(f"{name:<32}{recipe!s:<30}{what:<28}{us:>9.0f} us{share:>8.2f}", flush=True)
                cells.append(
                    {"layer": name, "recipe": str(recipe), "what": what, "us": us, "share": share}
                )
    us = waiting(experts.checksum)
    print(f"{name:<32}{'':<30}{'checksum':<28}{us:>9.0f} us", flush=True)
    return [*cells, {"layer": name, "what": "checksum", "us": us}]


def main() -> None:
    options, where = start(arguments(__doc__))
    copy = copy_rate(DEVICE)
    print(f"device copy: {copy:.0f} GB/s; share of it in the last column")
    cells = [cell for name in SHAPES for cell in measure(name, copy)]
    save(options.json, {"where": where, "copy": copy, "cells": cells})


if __name__ == "__main__":
    main()
