"""The adapters to FlashInfer's BF16, FP8 and MXFP8 layers, the baselines beside NVFP4.

Sources, in flashinfer-python 0.7.2.post1: `fused_moe/core.py:4808` to `:6082` (the functions),
`fused_moe/prepare.py` (the weights), `fused_moe/runners.py:5636` and `:5949` (which of them are
shuffled), `trtllm_fused_moe_kernel_launcher.cu` (launcher), `trtllm_fused_moe_runner.cu` (runner.cu).
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...reference.activation import IMPLEMENTED
from ...reference.layouts import from_linear
from ...reference.moe.baselines import Format, SiblingActivations, SiblingExperts, quantize_for
from ...reference.moe.routing import Routing
from ...reference.recipe import SfLayout
from ...reference.weights.experts import row_order
from ..capability import capability_of
from .quantize import INSTALLED, VERSION

NAMES: dict[Format, str] = {
    "bf16": "flashinfer:bf16",
    "fp8 per tensor": "flashinfer:fp8-tensor",
    "fp8 block": "flashinfer:fp8-block",
    "mxfp8": "flashinfer:mxfp8",
}
"""Of the layers, as `nvfp4-moe` names backends."""
_FUNCTIONS: dict[Format, str] = {
    "bf16": "trtllm_bf16",
    "fp8 per tensor": "trtllm_fp8_per_tensor_scale",
    "fp8 block": "trtllm_fp8_block_scale",
    "mxfp8": "trtllm_fp8_block_scale",
}
_OPTIONS: dict[Format, dict[str, Any]] = {
    "bf16": {"use_shuffled_weight": True, "weight_layout": 2},  # BlockMajorK
    "fp8 per tensor": {"use_routing_scales_on_input": False},
    "fp8 block": {"use_shuffled_weight": False, "weight_layout": 0, "fp8_quantization_type": 1},
    "mxfp8": {"use_shuffled_weight": True, "weight_layout": 0, "fp8_quantization_type": 2},
}
_BLOCK_K_BYTES = 128  # of BlockMajorK, prepare.py:1333
_CAPABILITIES = ((10, 0), (10, 3), (10, 7))
_FUSED = tuple(kind for kind in IMPLEMENTED if "baselines" in kind.row.flashinfer)
"""Activations; fp8 block has SwiGLU alone, `reference.moe.baselines`."""


@dataclass(frozen=True)
class SiblingRequest:
    """One call: from router logits [T, E], or with (ids [T, K] int32, weights [T, K] bf16 or fp32)."""

    activations: SiblingActivations
    experts: SiblingExperts
    weights: dict[str, torch.Tensor]  # `flashinfer_weights` of the experts, made once
    routing: Routing
    num_experts: int
    logits: torch.Tensor | None = None
    topk: tuple[torch.Tensor, torch.Tensor] | None = None
    local_expert_offset: int = 0

    @property
    def capability(self) -> tuple[int, int] | None:
        return capability_of(self.activations.hidden_states)


Rule = tuple[Callable[[SiblingRequest], Any], str]
RULES: tuple[Rule, ...] = (
    (
        lambda r: not INSTALLED,
        "flashinfer-python is not installed (pip install 'nvfp4-moe[flashinfer]')",
    ),
    (lambda r: VERSION and VERSION < (0, 7), "flashinfer-python is older than 0.7"),
    (lambda r: r.capability is None, "hidden_states are on the CPU"),
    (lambda r: r.activations.hidden_states.shape[0] == 0, "there are no tokens"),
    # launcher:1697
    (lambda r: r.capability not in _CAPABILITIES, "the GPU is not sm_100, 103 or 107"),
    # launcher:4276
    (
        lambda r: (
            r.experts.format in ("fp8 block", "mxfp8")
            and (r.num_experts % 4 or r.num_experts <= r.routing.top_k)
        ),
        "num_experts must be a multiple of 4 above top_k",
    ),
    (
        lambda r: r.experts.activation not in _FUSED,
        f"the activation is not among {', '.join(kind.name for kind in _FUSED)}",
    ),
)


def refusal(r: SiblingRequest) -> str | None:
    """Why FlashInfer cannot serve the request; None if it can."""
    return next((reason for refused, reason in RULES if refused(r)), None)


def flashinfer_weights(experts: SiblingExperts) -> dict[str, torch.Tensor]:
    """The weights and scales in the layouts of FlashInfer's function, by its keywords.

    bf16 is shuffled and in BlockMajorK, fp8 per tensor and mxfp8 are shuffled, fp8 block is as it was.
    """
    gated = experts.activation.gated
    if experts.format == "fp8 block":
        assert experts.w13_scale is not None and experts.w2_scale is not None
        return {
            "gemm1_weights": experts.w13, "gemm1_weights_scale": experts.w13_scale,
            "gemm2_weights": experts.w2, "gemm2_weights_scale": experts.w2_scale,
        }  # fmt: skip
    w1, w2 = _shuffled(experts.w13, gated), _shuffled(experts.w2, False)
    if experts.format == "bf16":
        return {"gemm1_weights": _block_major(w1), "gemm2_weights": _block_major(w2)}
    given = {"gemm1_weights": w1, "gemm2_weights": w2}
    assert experts.w13_scale is not None and experts.w2_scale is not None
    if experts.format == "mxfp8":
        s1, s2 = _shuffled(experts.w13_scale, gated), _shuffled(experts.w2_scale, False)
        swizzled = (from_linear(s, SfLayout.layout_128x4) for s in (s1, s2))
        return given | dict(
            zip(("gemm1_weights_scale", "gemm2_weights_scale"), swizzled, strict=True)
        )
    names = ("output1_scales_scalar", "output1_scales_gate_scalar", "output2_scales_scalar")
    return given | dict(zip(names, experts.scalars, strict=True))


def _shuffled(t: torch.Tensor, gated: bool) -> torch.Tensor:
    """[E, rows, ...] in the order of the GEMM's epilogue, of codes and of scales alike."""
    order = row_order(t.shape[1], gated, t.device)
    return t.view(torch.uint8)[:, order].view(t.dtype).contiguous()


def _block_major(w: torch.Tensor) -> torch.Tensor:
    """[E, rows, K] to [E, K / block, rows, block]."""
    block = _BLOCK_K_BYTES // w.element_size()
    return w.unflatten(-1, (-1, block)).transpose(1, 2).contiguous()


def quantize(x: torch.Tensor, experts: SiblingExperts) -> SiblingActivations:
    """[T, H] bf16 hidden states in the experts' format, by what FlashInfer has for it.

    That of mxfp8 is a kernel, whose bits are the reference's. fp8 block's is torch, which on a GPU
    multiplies by 1 / 448 where the reference divides: an ulp of some scales.
    """
    if experts.format == "mxfp8":
        from flashinfer import mxfp8_quantize

        codes, scale = mxfp8_quantize(x, is_sf_swizzled_layout=False)
        return SiblingActivations(codes, scale.view(torch.uint8).view(x.shape[0], -1))
    if experts.format == "fp8 block":
        from flashinfer.fused_moe.api import QuantConfig, QuantFormat
        from flashinfer.fused_moe.prepare import prepare_trtllm_fp8_block_activations

        deepseek = QuantFormat.DeepSeekFp8
        quant = QuantConfig(deepseek, deepseek)
        return SiblingActivations(*prepare_trtllm_fp8_block_activations(x, quant=quant))
    return quantize_for(x, experts)


def function(r: SiblingRequest) -> str:
    """The name of FlashInfer's function that serves the request."""
    return f"{_FUNCTIONS[r.experts.format]}_{'moe' if r.logits is not None else 'routed_moe'}"


def run(r: SiblingRequest) -> torch.Tensor:
    """[T, H] bf16 of the request, which `refusal` let pass."""
    from flashinfer import fused_moe

    output = getattr(fused_moe, function(r))(**arguments(r))
    return output[0] if isinstance(output, list) else output


def arguments(r: SiblingRequest) -> dict[str, Any]:
    """Keywords of `function(r)`."""
    e, routing, format = r.experts, r.routing, r.experts.format
    given: dict[str, Any] = r.weights | {
        "hidden_states": r.activations.hidden_states,
        "num_experts": r.num_experts,
        "top_k": routing.top_k,
        "n_group": routing.n_group,
        "topk_group": routing.topk_group,
        "intermediate_size": e.w2.shape[2],
        "local_expert_offset": r.local_expert_offset,
        "local_num_experts": e.num_local,
        "routed_scaling_factor": routing.routed_scaling_factor,
        "routing_method_type": int(routing.method),
        "activation_type": int(e.activation),
    }
    if r.activations.scale is not None:
        given["hidden_states_scale"] = r.activations.scale
    given |= _OPTIONS[format]
    if r.logits is None:
        given |= {"topk_ids": r.topk}
    else:
        given |= {"routing_logits": r.logits, "norm_topk_prob": routing.norm_topk_prob}
    if r.logits is not None or format != "bf16":
        given["routing_bias"] = None
    return given
