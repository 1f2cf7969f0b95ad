"""The adapters to FlashInfer's BF16, FP8 and MXFP8 layers, the baselines beside NVFP4.

Sources, in flashinfer-python 0.7.2.post1: `fused_moe/core.py:4808` to `:6082` (the functions),
`fused_moe/prepare.py` (the weights), `fused_moe/runners.py:5636` and `:5949` (which of them are
shuffled).
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from typing import Any

import torch

from ...reference.activation import ELSEWHERE, IMPLEMENTED, ActivationType
from ...reference.layouts import from_linear
from ...reference.moe.baseline_moe import BaselineActivations, BaselineExperts, Format, quantize_for
from ...reference.recipe import SfLayout
from ...reference.weights.layout import row_order
from ..baseline_moe.call import BaselineCall
from .description import (
    BATCH_INVARIANT,
    KEYWORD,
    POSITIONAL,
    WORKSPACE,
    Argument,
    Function,
)
from .rules import COMMON, SM10X, Rule, first_reason, no_kernels_beside, on_no_gpu, whole_tiles
from .version import SINCE_NEW, UNTIL_NEW

NAMES: dict[Format, str] = {
    "bf16": "flashinfer:bf16",
    "fp8 per tensor": "flashinfer:fp8-tensor",
    "fp8 block": "flashinfer:fp8-block",
    "mxfp8": "flashinfer:mxfp8",
}
"""The layers, as `nvfp4-moe` names backends."""
_OPTIONS: dict[Format, dict[str, Any]] = {
    "bf16": {"use_shuffled_weight": True, "weight_layout": 2},  # BlockMajorK
    "fp8 per tensor": {"use_routing_scales_on_input": False},
    "fp8 block": {"use_shuffled_weight": False, "weight_layout": 0, "fp8_quantization_type": 1},
    "mxfp8": {"use_shuffled_weight": True, "weight_layout": 0, "fp8_quantization_type": 2},
}
_BLOCK_K_BYTES = 128  # of BlockMajorK, prepare.py:1333
_FUSED = tuple(kind for kind in IMPLEMENTED if "baselines" in ELSEWHERE[kind].flashinfer)
"""Activations; fp8 block has SwiGLU alone, `reference.moe.baseline_moe`."""


RULES: tuple[Rule[BaselineCall], ...] = (
    *COMMON,
    on_no_gpu("hidden_states are on the CPU"),
    Rule(
        lambda r: r.activations.hidden_states.shape[0] == 0,
        "there are no tokens",
        "trtllm_batched_gemm_runner.cu:339",
    ),
    no_kernels_beside(SM10X, "trtllm_fused_moe_kernel_launcher.cu:1697"),
    Rule(
        lambda r: (
            r.experts.format in ("fp8 block", "mxfp8")
            and (r.num_experts % 4 or r.num_experts <= r.routing.top_k)
        ),
        "num_experts must be a multiple of 4 above top_k",
        "trtllm_fused_moe_kernel_launcher.cu:4276",
    ),
    Rule(
        lambda r: r.experts.activation not in _FUSED,
        f"the activation is not among {', '.join(kind.name for kind in _FUSED)}",
        "trtllm_fused_moe_runner.cu:114",
    ),
    whole_tiles(lambda r: r.experts.w2.shape[1] if r.experts.format == "mxfp8" else 0),
)
"""The rules of the layers, in the order in which they are asked."""


def refusal(r: BaselineCall) -> str | None:
    """Return why FlashInfer cannot serve the request; None if it can."""
    return first_reason(RULES, r)


def _weight(name: str) -> Any:
    return lambda r: r.weights[name]


def _option(name: str) -> Any:
    return lambda r: _OPTIONS[r.experts.format][name]


_WEIGHTS = (
    "gemm1_weights",
    "gemm1_weights_scale",
    "gemm2_weights",
    "gemm2_weights_scale",
    "output1_scales_scalar",
    "output1_scales_gate_scalar",
    "output2_scales_scalar",
)
_VALUES: dict[str, Any] = {
    "routing_logits": lambda r: r.logits,
    "topk_ids": lambda r: r.topk,
    "routing_bias": lambda _: None,
    "hidden_states": lambda r: r.activations.hidden_states,
    "hidden_states_scale": lambda r: r.activations.scale,
    **{name: _weight(name) for name in _WEIGHTS},
    "num_experts": lambda r: r.num_experts,
    "top_k": lambda r: r.routing.top_k,
    "n_group": lambda r: r.routing.n_group,
    "topk_group": lambda r: r.routing.topk_group,
    "intermediate_size": lambda r: r.experts.w2.shape[2],
    "local_expert_offset": lambda r: r.local_expert_offset,
    "local_num_experts": lambda r: r.experts.num_local,
    "routed_scaling_factor": lambda r: r.routing.routed_scaling_factor,
    "routing_method_type": lambda r: int(r.routing.method),
    "activation_type": lambda r: int(r.experts.activation),
    "norm_topk_prob": lambda r: r.routing.norm_topk_prob,
    **{name: _option(name) for options in _OPTIONS.values() for name in options},
}
"""The value of each argument, by its name in every function; the others keep their defaults."""


def _required(names: str) -> tuple[Argument, ...]:
    return tuple(Argument(name, _VALUES.get(name)) for name in names.split())


def _optional(kind: Any = POSITIONAL, **defaults: Any) -> tuple[Argument, ...]:
    return tuple(
        Argument(name, _VALUES.get(name), default, kind=kind) for name, default in defaults.items()
    )


def _function(name: str, line: int, *arguments: tuple[Argument, ...]) -> Function:
    rows = tuple(argument for part in arguments for argument in part)
    return Function("flashinfer.fused_moe", name, f"fused_moe/core.py:{line}", rows)


_SWIGLU = int(ActivationType.Swiglu)
_SIZES = _required(
    "num_experts top_k n_group topk_group intermediate_size local_expert_offset local_num_experts"
)
_SCALING = _required("routed_scaling_factor")
_BF16_WEIGHTS = _required("hidden_states gemm1_weights gemm2_weights")
_BF16_OPTIONS = _optional(
    routed_scaling_factor=None,
    routing_method_type=0,
    use_shuffled_weight=True,
    weight_layout=2,
    do_finalize=True,
    enable_pdl=True,
)
_SWIGLU_CONSTANTS = _optional(gemm1_alpha=None, gemm1_beta=None, gemm1_clamp_limit=None)
_TENSOR_WEIGHTS = _required(
    "routing_bias hidden_states gemm1_weights output1_scales_scalar output1_scales_gate_scalar "
    "gemm2_weights output2_scales_scalar"
)
_TENSOR_OPTIONS = (
    *_required("use_routing_scales_on_input"),
    *_optional(
        routing_method_type=0,
        do_finalize=True,
        enable_pdl=None,
        tune_max_num_tokens=8192,
        activation_type=_SWIGLU,
    ),
)
_BLOCK_WEIGHTS = _required(
    "routing_bias hidden_states hidden_states_scale gemm1_weights gemm1_weights_scale "
    "gemm2_weights gemm2_weights_scale"
)
_BLOCK_OPTIONS = _optional(
    routing_method_type=0,
    use_shuffled_weight=False,
    weight_layout=0,
    do_finalize=True,
    enable_pdl=None,
)
_VALID_SIZES = _optional(valid_hidden_size=None, valid_intermediate_size=None)

_BF16 = (
    _function(
        "trtllm_bf16_moe", 4807,
        _required("routing_logits routing_bias"), _BF16_WEIGHTS, _SIZES, _BF16_OPTIONS,
        _optional(
            tune_max_num_tokens=8192, activation_type=_SWIGLU, norm_topk_prob=True,
            routing_replay_out=None,
        ),
        _SWIGLU_CONSTANTS, _optional(output=None), (WORKSPACE,),
    ),
    _function(
        "trtllm_bf16_routed_moe", 5024,
        _required("topk_ids"), _BF16_WEIGHTS, _SIZES, _BF16_OPTIONS,
        _optional(
            gemm1_lora_delta=None, tune_max_num_tokens=8192, activation_type=_SWIGLU,
            routing_replay_out=None,
        ),
        _SWIGLU_CONSTANTS, _optional(output=None), (WORKSPACE,),
    ),
)  # fmt: skip
_FP8_TENSOR = (
    _function(
        "trtllm_fp8_per_tensor_scale_moe", 5238,
        _required("routing_logits"), _TENSOR_WEIGHTS, _SIZES, _SCALING, _TENSOR_OPTIONS,
        _optional(
            norm_topk_prob=True, routing_replay_out=None, output=None, gemm1_clamp_limit=None
        ),
        (WORKSPACE,),
    ),
    _function(
        "trtllm_fp8_per_tensor_scale_routed_moe", 5409,
        _required("topk_ids"), _TENSOR_WEIGHTS, _SIZES, _SCALING, _TENSOR_OPTIONS,
        _optional(routing_replay_out=None, output=None, gemm1_clamp_limit=None), (WORKSPACE,),
    ),
)  # fmt: skip
_FP8_BLOCK = (
    _function(
        "trtllm_fp8_block_scale_moe", 5817,
        _required("routing_logits"), _BLOCK_WEIGHTS, _SIZES, _SCALING, _BLOCK_OPTIONS,
        _optional(
            tune_max_num_tokens=8192, fp8_quantization_type=1, num_fused_shared_experts=None,
            activation_type=_SWIGLU, norm_topk_prob=True, routing_replay_out=None,
        ),
        _SWIGLU_CONSTANTS, _optional(output=None), _VALID_SIZES,
        _optional(KEYWORD, gemm1_bias=None, gemm2_bias=None), (replace(WORKSPACE, kind=KEYWORD),),
    ),
    _function(
        "trtllm_fp8_block_scale_routed_moe", 6082,
        _required("topk_ids"), _BLOCK_WEIGHTS, _SIZES, _SCALING, _BLOCK_OPTIONS,
        _optional(
            gemm1_lora_delta=None, output=None, tune_max_num_tokens=8192, fp8_quantization_type=1,
            activation_type=_SWIGLU,
        ),
        _SWIGLU_CONSTANTS, _VALID_SIZES, (WORKSPACE,),
    ),
)  # fmt: skip
FUNCTIONS: dict[Format, tuple[Function, Function]] = {
    "bf16": _BF16,
    "fp8 per tensor": _FP8_TENSOR,
    "fp8 block": _FP8_BLOCK,
    "mxfp8": _FP8_BLOCK,
}
"""Return the functions of a format: from router logits, and with a given routing."""

MXFP8_QUANTIZE = Function(
    "flashinfer",
    "mxfp8_quantize",
    "quantization/fp8_quantization.py:172",
    (
        Argument("input", lambda x: x),
        Argument("is_sf_swizzled_layout", lambda _: False, True),
        *_optional(alignment=32, enable_pdl=None),
        # Since NEW "auto" is "cuda", unless the call is to be batch-invariant.
        Argument("backend", default="cuda", versions=UNTIL_NEW),
        Argument("backend", default="auto", versions=SINCE_NEW),
        *_optional(sf_swizzle_layout=None),
        BATCH_INVARIANT,
    ),
)
"""It is called with the hidden states [T, H] bf16."""


def _deepseek(_: torch.Tensor) -> Any:
    from flashinfer.fused_moe.api import QuantConfig, QuantFormat

    return QuantConfig(QuantFormat.DeepSeekFp8, QuantFormat.DeepSeekFp8)


FP8_BLOCK_QUANTIZE = Function(
    "flashinfer.fused_moe.prepare",
    "prepare_trtllm_fp8_block_activations",
    "fused_moe/prepare.py:914",
    (
        Argument("hidden_states_bf16", lambda x: x),
        Argument("quant", _deepseek, kind=KEYWORD),
    ),
)
"""It is called with the hidden states [T, H] bf16."""


def flashinfer_weights(experts: BaselineExperts) -> dict[str, torch.Tensor]:
    """Prepare the weights and scales in the layouts of FlashInfer's function, by its keywords.

    bf16 is shuffled and in BlockMajorK, fp8 per tensor and mxfp8 are shuffled, fp8 block is as it was.
    """
    gated = experts.activation.gated
    if experts.format == "fp8 block":
        assert experts.w13_scale is not None and experts.w2_scale is not None
        return {
            "gemm1_weights": experts.w13,
            "gemm1_weights_scale": experts.w13_scale,
            "gemm2_weights": experts.w2,
            "gemm2_weights_scale": experts.w2_scale,
        }
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
    """Reorder [E, rows, ...], codes or scales, for the GEMM's epilogue."""
    order = row_order(t.shape[1], gated, t.device)
    return t.view(torch.uint8)[:, order].view(t.dtype).contiguous()


def _block_major(w: torch.Tensor) -> torch.Tensor:
    """Convert [E, rows, K] to [E, K / block, rows, block]."""
    block = _BLOCK_K_BYTES // w.element_size()
    return w.unflatten(-1, (-1, block)).transpose(1, 2).contiguous()


def quantize(x: torch.Tensor, experts: BaselineExperts) -> BaselineActivations:
    """Quantize hidden states [T, H] bf16 to the experts' format by FlashInfer's own functions.

    That of mxfp8 is a kernel, whose bits are the reference's. fp8 block's is torch, which on a GPU
    multiplies by 1 / 448 where the reference divides: an ulp of some scales.
    """
    if experts.format == "mxfp8":
        codes, scale = MXFP8_QUANTIZE.run(x)
        return BaselineActivations(codes, scale.view(torch.uint8).view(x.shape[0], -1))
    if experts.format == "fp8 block":
        return BaselineActivations(*FP8_BLOCK_QUANTIZE.run(x))
    return quantize_for(x, experts)


def function(r: BaselineCall) -> Function:
    """Return FlashInfer's function that serves the request."""
    return FUNCTIONS[r.experts.format][r.logits is None]


def run(r: BaselineCall) -> torch.Tensor:
    """Run the request, which `refusal` let pass: [T, H] bf16."""
    output = function(r).run(r)
    return output[0] if isinstance(output, list) else output


def arguments(r: BaselineCall) -> dict[str, Any]:
    """Return the keyword arguments of `function(r)`."""
    return function(r).keywords(r)
