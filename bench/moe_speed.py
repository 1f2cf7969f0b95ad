"""Speed of the fused mixture of experts on the GPU at hand: `python bench/moe_speed.py [--json FILE]`.

Whole calls, bf16 hidden states and router logits to bf16 output, inside CUDA graphs. Beside them, in
the same run: the bf16 layer made of `torch._grouped_mm`, a device copy and a cuBLAS product. The floor
is the time of reading the codes and block scales of the experts that were touched, at the copy's rate.
Every shape's output is first compared with the reference at a few tokens.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass

import torch
from measure import arguments, copy_rate, cublas_rate, microseconds, save, start

import nvfp4_moe
from nvfp4_moe import ActivationType, Experts, Routing, RoutingMethodType

TOKENS = (1, 8, 32, 128, 1024, 4096, 16384)


@dataclass(frozen=True)
class Shape:
    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    activation: ActivationType = ActivationType.Swiglu
    tuned_bf16: tuple[int, ...] = ()  # us of a tuned bf16 Triton MoE on an H100, for TOKENS


SHAPES = (
    Shape("Qwen3-30B-A3B", 2048, 768, 128, 8, tuned_bf16=(40, 170, 374, 426, 511, 857, 2734)),
    Shape("DeepSeek-V3 rank", 7168, 2048, 32, 8, tuned_bf16=(250, 0, 942, 1015, 1703, 5615)),
    Shape("Nemotron-3-Super latent", 1024, 2688, 512, 22, ActivationType.Relu2),
    Shape("GPT-OSS", 2880, 2880, 128, 4),
)


def random_experts(s: Shape) -> Experts:
    """Random codes under scales of ordinary size: what they are does not change the speed."""
    g = torch.Generator("cuda").manual_seed(0)
    rows = s.intermediate * (2 if s.activation.gated else 1)

    def codes(*size: int) -> torch.Tensor:
        return torch.randint(0, 256, size, dtype=torch.uint8, device="cuda", generator=g)

    def scales(*size: int) -> torch.Tensor:
        return torch.randint(0x28, 0x40, size, dtype=torch.uint8, device="cuda", generator=g)

    e, h, i = s.experts, s.hidden, s.intermediate
    return nvfp4_moe.assemble_experts(
        codes(e, rows, h // 2), scales(e, rows, h // 16),
        torch.full((e,), 0.25 * h**-0.5, device="cuda"),
        codes(e, h, i // 2), scales(e, h, i // 16),
        torch.full((e,), 0.25 * i**-0.5, device="cuda"), s.activation,
        **({"alpha": 1.702, "beta": 1.0, "clamp_limit": 7.0} if s.name == "GPT-OSS" else {}),
    )  # fmt: skip


def grouped_mm_layer(s: Shape):
    """The bf16 layer of torch's own grouped product, routing included."""
    rows = s.intermediate * (2 if s.activation.gated else 1)
    w13 = torch.randn(s.experts, rows, s.hidden, device="cuda", dtype=torch.bfloat16) / 64
    w2 = torch.randn(s.experts, s.hidden, s.intermediate, device="cuda", dtype=torch.bfloat16) / 64

    def call(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        best, ids = logits.topk(s.top_k, dim=1)
        weights = best.softmax(1)
        order = ids.flatten().argsort()
        counts = torch.zeros(s.experts, dtype=torch.int32, device="cuda")
        counts.scatter_add_(0, ids.flatten(), torch.ones_like(ids.flatten(), dtype=torch.int32))
        ends = counts.cumsum(0).int()
        y = torch._grouped_mm(x[order // s.top_k], w13.transpose(1, 2), offs=ends)
        if s.activation.gated:
            up, gate = y.chunk(2, 1)
            y = torch.nn.functional.silu(gate) * up
        else:
            y = y.relu().square()
        y = torch._grouped_mm(y, w2.transpose(1, 2), offs=ends)
        back = torch.empty_like(y)
        back[order] = y
        return (back.unflatten(0, (-1, s.top_k)) * weights[..., None]).sum(1).bfloat16()

    return call


def check(s: Shape, experts: Experts, routing: Routing) -> None:
    x = torch.randn(5, s.hidden, device="cuda").bfloat16()
    logits = torch.randn(5, s.experts, device="cuda")
    got, want = (
        nvfp4_moe.fused_moe(x, experts, (logits, routing), backend=b).double()
        for b in ("triton", "reference")
    )
    error = ((got - want).norm() / want.norm()).item()
    if not error < 2e-3:
        raise SystemExit(f"{s.name}: relative error {error} against the reference")


def measure(s: Shape, tokens: int, experts: Experts, layer, copy: float) -> dict:
    routing = Routing(RoutingMethodType.Renormalize, s.top_k)
    g = torch.Generator("cuda").manual_seed(tokens)
    x = torch.randn(tokens, s.hidden, device="cuda", generator=g).bfloat16()
    logits = torch.randn(tokens, s.experts, device="cuda", generator=g)
    calls = 10 if tokens < 1024 else 2

    def ours(**options):
        return microseconds(
            lambda: nvfp4_moe.fused_moe(
                x, experts, (logits, routing), backend="triton", fast_math=True, **options
            ),
            calls, 5,
        )  # fmt: skip

    touched = logits.topk(s.top_k, dim=1).indices.unique().numel()
    matrices = 3 if s.activation.gated else 2
    floor = touched * matrices * s.hidden * s.intermediate * 9 / 16 / copy / 1e3
    cell = {"shape": s.name, "tokens": tokens, "us": ours(), "floor_us": floor}
    cell["invariant_us"] = ours(batch_invariant=True)
    cell["w4a16_us"] = ours(activation="bf16")
    cell["grouped_mm_us"] = microseconds(lambda: layer(x, logits), calls, 5)
    cell["tflops"] = 2 * matrices * tokens * s.top_k * s.hidden * s.intermediate / cell["us"] / 1e6
    return cell


def main() -> None:
    options, where = start(arguments(__doc__))
    copy = copy_rate()
    print(f"device copy {copy:.0f} GB/s, cuBLAS bf16 {cublas_rate():.0f} TFLOP/s")
    cells = []
    for s in SHAPES:
        experts, layer = random_experts(s), grouped_mm_layer(s)
        check(s, experts, Routing(RoutingMethodType.Renormalize, s.top_k))
        print(f"\n{s.name}: H {s.hidden}, I {s.intermediate}, E {s.experts}, K {s.top_k}; us")
        print(
            f"{'T':>6}{'ours':>9}{'of floor':>10}{'TFLOP/s':>9}{'invariant':>11}{'W4A16':>9}"
            f"{'grouped_mm':>12}{'speedup':>9}{'tuned bf16':>12}{'speedup':>9}"
        )
        for i, tokens in enumerate(TOKENS):
            c = measure(s, tokens, experts, layer, copy)
            cells.append(c)
            tuned = s.tuned_bf16[i] if i < len(s.tuned_bf16) else 0
            print(
                f"{tokens:>6}{c['us']:>9.0f}{c['floor_us'] / c['us']:>10.2f}{c['tflops']:>9.0f}"
                f"{c['invariant_us']:>11.0f}{c['w4a16_us']:>9.0f}{c['grouped_mm_us']:>12.0f}"
                f"{c['grouped_mm_us'] / c['us']:>9.2f}"
                + (f"{tuned:>12}{tuned / c['us']:>9.2f}" if tuned else f"{'-':>12}{'-':>9}"),
                flush=True,
            )
        del experts, layer
    save(options.json, {**where, "copy": copy, "cells": cells})


if __name__ == "__main__":
    main()
