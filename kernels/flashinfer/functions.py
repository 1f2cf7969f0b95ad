"""Every function of FlashInfer that we call, and the differences to the installed ones."""

# SPDX-License-Identifier: Apache-2.0
from . import autotuner, baseline_moe, cute_dsl, cutlass, dense, quantize, trtllm
from .description import Function

LAYERS = (trtllm, cute_dsl, cutlass)
"""The adapters to the fused NVFP4 layers, in the order in which "auto" asks them. Each has NAME, BUILD,
`refusal`, `run`, `function` and `arguments` of a `MoECall`."""

FUNCTIONS: tuple[Function, ...] = (
    quantize.NVFP4_QUANTIZE,
    dense.MM_FP4,
    trtllm.FROM_LOGITS,
    trtllm.ROUTED,
    cute_dsl.CUTE_DSL_FUSED_MOE,
    cutlass.CUTLASS_FUSED_MOE,
    *dict.fromkeys(f for pair in baseline_moe.FUNCTIONS.values() for f in pair),
    baseline_moe.MXFP8_QUANTIZE,
    baseline_moe.FP8_BLOCK_QUANTIZE,
    *autotuner.METHODS,
)


def differences() -> list[str]:
    """List the differences between the installed functions and the table, one line each."""
    return [line for function in FUNCTIONS for line in function.differences()]
