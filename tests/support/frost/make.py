"""Compile FlashInfer 0.7.4's Frost W4A16 kernels for sm_90a, without a GPU and without nvcc.

    make frost-kernels

The folder in the argument receives `NAME.cubin` and `NAME.ptx` of every shape, and `index.json`: the
shape, the entries and the grids, which `frost.run` reads.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import offline_cutlass
import torch
from flashinfer.fused_moe import api
from flashinfer.fused_moe.backends.frost_low_latency.fma import fp4_weight_only

COLUMNS = 4
"""Output columns of a warp in either GEMM: the tactic ("ffma", 4, 4)."""
SHAPES = {
    "relu2": (api.ReLU2(), 2, 256, 128, 4, 2),
    "swiglu": (api.SwiGLU(), 2, 256, 128, 4, 2),
    "large": (api.SwiGLU(), 8, 2048, 768, 16, 8),
}
"""Activation, tokens, hidden size, intermediate size, experts, top-k."""


def layer(activation: Any, tokens: int, hidden: int, inner: int, experts: int, top_k: int) -> Any:
    """Return what FlashInfer compiles for this shape."""
    branches = 2 if activation.is_gated else 1

    def codes(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.uint8, device="cpu")

    def rows(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16, device="cpu")

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.float32, device="cpu")

    inputs = [
        rows(tokens, hidden),
        codes(experts, branches * inner, hidden // 2),
        codes(experts, branches * inner, hidden // 16),
        ones(experts, branches),
        codes(experts, hidden, inner // 2),
        codes(experts, hidden, inner // 16),
        ones(experts),
        torch.zeros(tokens, top_k, dtype=torch.int32, device="cpu"),
        ones(tokens, top_k),
        rows(tokens * top_k, inner),
        rows(tokens * top_k, hidden),
        rows(tokens, hidden),
        False,  # the routing weights stay fp32
    ]
    config = SimpleNamespace(
        quant=SimpleNamespace(weight=api.QuantFormat.NVFP4),
        finalize=SimpleNamespace(do_finalize=True),
        routing=SimpleNamespace(top_k=top_k),
        activation=activation,
    )
    tactic = ("ffma", COLUMNS, COLUMNS)
    return offline_cutlass.compiled(fp4_weight_only.execute, inputs, config, tactic)


def main() -> None:
    """Compile every shape into the folder that the argument names."""
    parser = argparse.ArgumentParser(description="Compile FlashInfer's Frost kernels for sm_90a.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    offline_cutlass.pretend_hopper()
    index = []
    for name, (activation, tokens, hidden, inner, experts, top_k) in SHAPES.items():
        kernels = layer(activation, tokens, hidden, inner, experts, top_k)
        entries = offline_cutlass.write(kernels, folder / f"{name}.cubin")
        index.append(
            {
                **{"name": name, "gated": activation.is_gated, "tokens": tokens, "hidden": hidden},
                **{"inner": inner, "experts": experts, "top_k": top_k},
                "fc1": next(entry for entry in entries if "fc1" in entry),
                "fc2": next(entry for entry in entries if "fc2" in entry),
                "grid1": tokens * top_k * inner // (8 * COLUMNS),
                "grid2": tokens * hidden // COLUMNS,
            }
        )
    (folder / "index.json").write_text(json.dumps(index, indent=1))


if __name__ == "__main__":
    main()
