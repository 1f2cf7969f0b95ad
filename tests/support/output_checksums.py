"""Checksums of the outputs of a fixed set of calls of the public interface.

    python tests/support/output_checksums.py write FILE NAME      before a change
    python tests/support/output_checksums.py compare FILE NAME    after it, on the same machine

NAME is "reference", "interpreter" (in a process with TRITON_INTERPRET=1) or "gpu". A change of the
structure alone leaves every output as it is. The order of fp32 sums belongs to the machine, so the
file is good for one machine only.
"""

# SPDX-License-Identifier: Apache-2.0
import hashlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import nvfp4_moe
from nvfp4_moe import ActivationType, NVFP44Over6Config, Routing, RoutingMethodType, SfLayout

TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 19, 256, 128, 4, 2


def numbers(seed: int, *size: int, low: int = 120, high: int = 129) -> torch.Tensor:
    """bf16 numbers of random bits, whose biased exponents are `low` to `high` - 1."""
    g = torch.Generator().manual_seed(seed)

    def bits(first: int, end: int) -> torch.Tensor:
        return torch.randint(first, end, size, generator=g, dtype=torch.int32, device="cpu")

    word = bits(0, 2) << 15 | bits(low, high) << 7 | bits(0, 128)
    return torch.where(word >= 1 << 15, word - (1 << 16), word).to(torch.int16).view(torch.bfloat16)


def base_scale(config: NVFP44Over6Config | None) -> float:
    """The `a_global_sf` of per-token scales."""
    return 1 / (6 * (448 if config is None else config.e4m3_max))


def outputs(backend: str, device: str) -> Iterator[tuple[str, Any]]:
    """(what was called, its tensors)."""
    yield from _quantized(backend, device)
    yield from _fused_quantized(backend, device)
    yield from _products(backend, device)
    yield from _layers(backend, device)


def _quantized(backend: str, device: str) -> Iterator[tuple[str, Any]]:
    x = numbers(1, TOKENS, HIDDEN)
    for per_token, fast, layout, dtype in itertools.product(
        (True, False), (True, False), SfLayout, (torch.bfloat16, torch.float16)
    ):
        for config in (None, NVFP44Over6Config(), NVFP44Over6Config(256, "MSE", True)):
            yield (
                f"nvfp4_quantize {per_token=} {fast=} {layout.name} {dtype} {config}",
                nvfp4_moe.nvfp4_quantize(
                    x.to(device, dtype),
                    base_scale(config) if per_token else 0.25,
                    layout,
                    per_token_activation=per_token,
                    nvfp4_4over6=config,
                    fast_math=fast,
                    backend=backend,
                ),
            )


def _fused_quantized(backend: str, device: str) -> Iterator[tuple[str, Any]]:
    x, residual = (numbers(seed, TOKENS, HIDDEN).to(device) for seed in (2, 3))
    weight = numbers(4, HIDDEN, low=125, high=128).to(device)
    for config in (None, NVFP44Over6Config()):
        options: dict[str, Any] = {"nvfp4_4over6": config, "fast_math": True, "backend": backend}
        yield (
            f"silu_and_mul_nvfp4_quantize {config}",
            nvfp4_moe.silu_and_mul_nvfp4_quantize(x, base_scale(config), **options),
        )
        yield (
            f"rmsnorm_nvfp4_quantize {config}",
            nvfp4_moe.rmsnorm_nvfp4_quantize(x, weight, 1e-6, base_scale(config), **options),
        )
        yield (
            f"add_rmsnorm_nvfp4_quantize {config}",
            nvfp4_moe.add_rmsnorm_nvfp4_quantize(
                x.clone(), residual.clone(), weight, 1e-6, base_scale(config), **options
            ),
        )


def _products(backend: str, device: str) -> Iterator[tuple[str, Any]]:
    quantize = {"backend": backend, "fast_math": True, "nvfp4_4over6": None}
    a, a_scales = nvfp4_moe.nvfp4_quantize(numbers(5, TOKENS, HIDDEN).to(device), 0.5, **quantize)
    b, b_scales = nvfp4_moe.nvfp4_quantize(numbers(6, 96, HIDDEN).to(device), 0.5, **quantize)
    alpha = torch.tensor([0.03], dtype=torch.float32, device=device)
    for dtype in (torch.bfloat16, torch.float16):
        yield (
            f"mm_fp4 {dtype}",
            nvfp4_moe.mm_fp4(
                a, b.T, a_scales, b_scales.T, alpha=alpha, out_dtype=dtype, backend=backend
            ),
        )


def _layers(backend: str, device: str) -> Iterator[tuple[str, Any]]:
    x = numbers(7, TOKENS, HIDDEN).to(device)
    logits = numbers(8, TOKENS, EXPERTS, low=122).to(device)
    bias = numbers(9, EXPERTS, low=118, high=124).to(device)
    plain = (logits, Routing(RoutingMethodType.Renormalize, TOP_K))

    def layer(
        name: str,
        kind: ActivationType,
        routing: Any = plain,
        more: dict[str, Any] | None = None,
        **options: Any,
    ) -> tuple[str, Any]:
        w13 = numbers(10, EXPERTS, INTERMEDIATE * (2 if kind.gated else 1), HIDDEN, high=123)
        w2 = numbers(11, EXPERTS, HIDDEN, INTERMEDIATE, high=123)
        experts = nvfp4_moe.prepare_experts(w13.to(device), w2.to(device), kind, **more or {})
        y = nvfp4_moe.fused_moe(x, experts, routing, backend=backend, fast_math=True, **options)
        return f"fused_moe {kind.name} {name}", (experts.checksum(), y)

    for kind in ActivationType:
        if kind.implemented:
            yield layer("", kind)
    swiglu = ActivationType.Swiglu
    for method in RoutingMethodType:
        if method != RoutingMethodType.Unspecified:
            top_k = 1 if method == RoutingMethodType.Llama4 else TOP_K
            biased = method.biased
            yield layer(
                f"routed by {method.name}",
                swiglu,
                (logits, Routing(method, top_k)),
                routing_bias=bias if biased else None,
            )
    for name, options in {
        "4over6": {"nvfp4_4over6": NVFP44Over6Config()},
        "bf16 activations": {"activation": "bf16"},
        "slot order": {"finalize_order": "slot"},
        "batch invariant": {"batch_invariant": True, "finalize_order": "slot"},
        "fp32": {"output_dtype": torch.float32},
        "fp16": {"output_dtype": torch.float16},
    }.items():
        yield layer(name, swiglu, **options)
    yield layer(
        "parameters",
        swiglu,
        more={
            "alpha": 1.702,
            "beta": 1.0,
            "clamp_limit": 7.0,
            "w13_bias": numbers(12, EXPERTS, 2 * INTERMEDIATE).float().to(device),
            "w2_bias": numbers(13, EXPERTS, HIDDEN).float().to(device),
        },
    )
    yield layer("static", swiglu, more={"input_amax": 4.0, "intermediate_amax": 9.0})
    ids = torch.arange(TOKENS * TOP_K, dtype=torch.int32).reshape(TOKENS, TOP_K) * 5 % 8
    weights = numbers(14, TOKENS, TOP_K).abs()
    yield layer(
        "experts 2 to 5 of 8",
        swiglu,
        (ids.to(device), weights.to(device)),
        num_experts=8,
        local_expert_offset=2,
    )


def checksum(value: Any) -> str:
    """16 hex digits of every tensor's dtype, shape and bytes."""
    digest = hashlib.blake2b(digest_size=8)
    for part in value if isinstance(value, (tuple, list)) else [value]:
        if isinstance(part, torch.Tensor):
            tensor = part.detach().cpu().contiguous()
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()


def checksums(name: str) -> dict[str, str]:
    """By call, of the backend and device that the name stands for."""
    backend = "reference" if name == "reference" else "triton"
    device = "cuda" if name == "gpu" else "cpu"
    return {call: checksum(value) for call, value in outputs(backend, device)}


def main(arguments: list[str]) -> int:
    """Exit status: 1 if a checksum differs or a call is missing, else 0."""
    action, file, name = arguments
    path = Path(file)
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    actual = checksums(name)
    if action == "write":
        known[name] = actual
        path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", "utf-8")
        print(f"{len(actual)} calls written: {name}")
        return 0
    expected = known[name]
    different = [call for call in expected if actual.get(call) != expected[call]]
    for call in different:
        print(f"DIFFERENT {call}")
    print(f"{len(expected)} calls compared, {len(different)} different: {name}")
    return 1 if different or not expected else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
