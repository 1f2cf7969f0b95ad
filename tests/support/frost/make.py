"""Compile FlashInfer 0.7.4's Frost W4A16 kernels for sm_90a, without a GPU and without nvcc.

    make frost-kernels

FlashInfer's `execute` compiles with nvidia-cutlass-dsl (4.8.1 was used). It asks torch for a GPU; three
functions of torch answer in a GPU's place. The kernels are kept, and nothing is launched. The folder in
the argument receives `NAME.cubin` and `NAME.ptx` of every shape, and `index.json`: the shape, the
entries and the grids, which `frost.run` reads.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cutlass.cute as cute
import flashinfer
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


class _Compiled(BaseException):
    """Ends FlashInfer's `execute` before it launches."""

    def __init__(self, kernels: Any):
        self.kernels = kernels


def pretend_hopper() -> None:
    """Let torch and CuTe DSL answer for an sm_90 GPU; compilation ends by `_Compiled`."""
    torch.cuda.device = lambda device: contextlib.nullcontext()
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    real, stream = cute.compile, cute.runtime.make_fake_stream

    def keep(*args: Any, options: str, **keywords: Any) -> None:
        raise _Compiled(real(*args, options=f"{options} --keep-ptx --keep-cubin", **keywords))

    cute.compile = keep
    cute.runtime.make_fake_stream = lambda **_: stream()  # TVM's FFI would look for a GPU's stream


def compiled(
    activation: Any, tokens: int, hidden: int, inner: int, experts: int, top_k: int
) -> Any:
    """Return what FlashInfer compiles for this shape, with `__cubin__` and `__ptx__`."""
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
    try:
        fp4_weight_only.execute(inputs, config, ("ffma", COLUMNS, COLUMNS))
    except _Compiled as end:
        return end.kernels
    raise RuntimeError("FlashInfer's execute returned without a call of cute.compile")


def main() -> None:
    """Compile every shape into the folder that the argument names."""
    parser = argparse.ArgumentParser(description="Compile FlashInfer's Frost kernels for sm_90a.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if flashinfer.__version__ != "0.7.4":
        raise SystemExit(f"flashinfer-python is {flashinfer.__version__}; make.py needs 0.7.4")
    folder.mkdir(parents=True, exist_ok=True)
    pretend_hopper()
    index = []
    for name, (activation, tokens, hidden, inner, experts, top_k) in SHAPES.items():
        kernels = compiled(activation, tokens, hidden, inner, experts, top_k)
        (folder / f"{name}.cubin").write_bytes(kernels.__cubin__)
        (folder / f"{name}.ptx").write_text(kernels.__ptx__)
        lines = [line for line in kernels.__ptx__.splitlines() if ".visible .entry" in line]
        entries = [line.split(".entry ")[1].split("(")[0] for line in lines]
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
        print(f"{name}: {len(kernels.__cubin__)} bytes")
    (folder / "index.json").write_text(json.dumps(index, indent=1))


if __name__ == "__main__":
    main()
