"""Calls of every kind that is repeated from a record."""

# SPDX-License-Identifier: Apache-2.0
import dataclasses
from collections.abc import Callable
from typing import Any

import torch

import nvfp4_moe
from nvfp4_moe import Experts, NVFP44Over6Config, Routing, RoutingMethodType, SfLayout
from nvfp4_moe.kernels.dense.api import mm_bf16_fp4
from nvfp4_moe.kernels.records import recorder

ROUTING = Routing(RoutingMethodType.Renormalize, 2)
H, I, E = 256, 128, 4  # noqa: E741
Call = Callable[[], Any]


def random_bytes(*size: int, device: str, low: int = 0, high: int = 256) -> torch.Tensor:
    return torch.randint(low, high, size, dtype=torch.uint8, device=device)


def experts(device: str = "cpu", *, biased: bool = False) -> Experts:
    one = torch.full((E,), 0.1, device=device)
    extra = {}
    if biased:
        extra = {"w13_bias": torch.randn(E, 2 * I, device=device)}
        extra["w2_bias"] = torch.randn(E, H, device=device)
    scales = {"device": device, "low": 0x28, "high": 0x40}
    return nvfp4_moe.assemble_experts(
        random_bytes(E, 2 * I, H // 2, device=device),
        random_bytes(E, 2 * I, H // 16, **scales),
        one,
        random_bytes(E, H, I // 2, device=device),
        random_bytes(E, H, I // 16, **scales),
        one.clone(),
        **extra,
    )


def inputs(tokens: int = 1, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(tokens, H, device=device).bfloat16()
    return x, torch.randn(tokens, E, device=device)


def layer(device: str = "cpu", tokens: int = 1, biased: bool = False, **options: Any) -> Call:
    """Return a call of the layer of new tensors."""
    (x, logits), e = inputs(tokens, device), experts(device, biased=biased)
    options = {"backend": "triton"} | options
    return lambda: nvfp4_moe.fused_moe(x, e, (logits, ROUTING), **options)


def given_ids(device: str) -> Call:
    x, e = inputs(1, device)[0], experts(device)
    ids = torch.randint(0, E, (1, 2), dtype=torch.int32, device=device)
    weights = torch.rand(1, 2, device=device)
    return lambda: nvfp4_moe.fused_moe(x, e, (ids, weights))


def signature(device: str, **options: Any) -> Call:
    e, (_, logits) = experts(device), inputs(1, device)
    codes, scales, token = quantized(1, device, SfLayout.layout_linear)
    scales = scales.view(torch.float8_e4m3fn)
    return lambda: nvfp4_moe.trtllm_fp4_block_scale_moe(
        logits, None, codes, scales, e.gemm1_weights, e.gemm1_weights_scale, None, None, None, None,
        e.gemm2_weights, e.gemm2_weights_scale, None, e.output1_scale_scalar,
        e.output1_scale_gate_scalar, e.output2_scale_scalar, E, 2, None, None, I, 0, E, None, 1,
        per_token_scale=token, backend="triton", **options,
    )  # fmt: skip


def padded(device: str) -> Call:
    """Return a call of a layer whose hidden states are padded: 240 columns of 256."""
    e = dataclasses.replace(experts(device), hidden_size=H - 16)
    x, logits = inputs(2, device)
    x = x[:, : H - 16].contiguous()
    return lambda: nvfp4_moe.fused_moe(x, e, (logits, ROUTING), backend="triton")


def into_output(device: str) -> Call:
    return signature(device, output=torch.zeros(1, H, dtype=torch.bfloat16, device=device))


def quantized(rows: int, device: str, layout: SfLayout) -> tuple[torch.Tensor, ...]:
    """Return random codes, block scales and per-token scales."""
    padded = rows if layout == SfLayout.layout_linear else 128
    return (
        random_bytes(rows, H // 2, device=device),
        random_bytes(padded, H // 16, device=device, low=0x28, high=0x40),
        torch.rand(rows, device=device) + 0.5,
    )


def quantize(device: str, **options: Any) -> Call:
    x = inputs(3, device)[0]
    return lambda: nvfp4_moe.nvfp4_quantize(x, 1 / 2688, per_token_activation=True, **options)


def silu(device: str) -> Call:
    x = inputs(3, device)[0]
    return lambda: nvfp4_moe.silu_and_mul_nvfp4_quantize(x, backend="triton")


def rmsnorm(device: str) -> Call:
    """Return a call that adds to a residual, which has its first values again each time."""
    x, residual = (inputs(3, device)[0] for _ in range(2))
    weight, total = torch.rand(H, device=device).bfloat16(), torch.empty_like(residual)

    def call() -> Any:
        total.copy_(residual)
        return *nvfp4_moe.add_rmsnorm_nvfp4_quantize(x, total, weight, backend="triton"), total

    return call


def global_scale(device: str) -> Call:
    x, scale = inputs(3, device)[0], torch.rand(1, device=device) + 100
    return lambda: nvfp4_moe.nvfp4_quantize(x, scale, backend="triton")


def dense(device: str, with_out: bool = False) -> Call:
    a, a_scales, alpha = quantized(3, device, SfLayout.layout_128x4)
    b, b_scales, _ = quantized(128, device, SfLayout.layout_128x4)
    out = torch.zeros(3, 128, dtype=torch.bfloat16, device=device) if with_out else None
    return lambda: nvfp4_moe.mm_fp4(a, b.T, a_scales, b_scales.T, alpha, out=out)


def dense_bf16(device: str) -> Call:
    x, alpha = inputs(3, device)[0], torch.rand(1, device=device)
    b, b_scales, _ = quantized(128, device, SfLayout.layout_128x4)
    return lambda: mm_bf16_fp4(x, b.T, b_scales.T, alpha)


CALLS: dict[str, Callable[[str], Call]] = {
    "layer": layer,
    "auto": lambda device: layer(device, backend="auto"),
    "8 tokens": lambda device: layer(device, 8),
    "biases": lambda device: layer(device, biased=True),
    "W4A16": lambda device: layer(device, activation="bf16"),
    "batch-invariant": lambda device: layer(device, batch_invariant=True),
    "fp32": lambda device: layer(device, output_dtype=torch.float32),
    "ids": given_ids,
    "FlashInfer's signature": signature,
    "rows": lambda device: signature(device, do_finalize=False),
    "output": into_output,
    "padded": padded,
    "quantize": quantize,
    "global scale": global_scale,
    "4over6": lambda device: quantize(device, nvfp4_4over6=NVFP44Over6Config()),
    "silu": silu,
    "rmsnorm": rmsnorm,
    "dense": dense,
    "dense, out": lambda device: dense(device, True),
    "dense, bf16": dense_bf16,
}
"""By name, a function that returns a call of new tensors on a device, always of the same form."""


def recorders_of(monkeypatch):
    """Return a list to which every recorder is added that makes a record, or cannot."""
    made = []

    def spy(recording, result, of=recorder.Recorder.made):
        made.append(recording)
        return of(recording, result)

    monkeypatch.setattr(recorder.Recorder, "made", spy)
    return made
