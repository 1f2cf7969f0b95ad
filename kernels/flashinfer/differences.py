"""The differences of FlashInfer 0.7.4 from 0.7.2, a row each; `docs/flashinfer_versions.md` shows them.

A row of `BITS` is a reason: FlashInfer of one version does not serve a call that asks for the bits of
the other, if the row touches the call. All other calls have the same bits in both.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from ...reference.recipe import FlashInferVersion
from . import version
from .rules import Call, Rule

C = TypeVar("C", bound=Call, contravariant=True)


@dataclass(frozen=True)
class Difference:
    """One difference.

    Args:
        what: where it is.
        old: in 0.7.2; empty for what it lacks.
        new: in 0.7.4.
        source: the file and line of flashinfer-python 0.7.4 from which it follows.
        test: of ours, which holds it.
    """

    what: str
    old: str
    new: str
    source: str
    test: str


@dataclass(frozen=True)
class Addition:
    """A feature that came with 0.7.4, and its treatment here.

    Args:
        what: an argument, a function or a layer.
        ours: "served" or "refused", and how or why.
        source: the file and line of flashinfer-python 0.7.4.
    """

    what: str
    ours: str
    source: str


ROUNDED_SCALE = Difference(
    "the CUDA quantizer of fp16 and bf16, fast math without 4over6: a block whose scale rounds to zero "
    "in e4m3",
    "its codes are those of 6 and -6, and that of 6 for 0",
    "its codes are those of 0 and -0",
    "quantization_utils.cuh:517",
    "tests/quantize/test_rounded_scale.py::test_a_block_whose_scale_rounds_to_zero",
)
FIRST_SLOT = Difference(
    "the finalize of the CuTe-DSL layer, with use_fused_finalize=False",
    "every slot is a fused multiply-add onto a sum that begins with +0; subnormals are flushed",
    "slot 0 is a multiplication, later ones are fused multiply-adds; -0 and subnormals are kept",
    "fused_moe/cute_dsl/blackwell/moe_finalize.py:184",
    "tests/moe/test_finalize.py::test_zeros",
)
MX_SUBNORMALS = Difference(
    "the MXFP8 quantizer, of a baseline",
    "subnormals are flushed, so that a block under 448 * 2^-126 has codes of zero",
    "subnormals are kept; the codes of a block are zero where its byte is 0",
    "quantization_utils.cuh:900",
    "tests/moe/test_baseline_moe.py::test_mxfp8_of_subnormals",
)
BITS = (ROUNDED_SCALE, FIRST_SLOT, MX_SUBNORMALS)
"""The calls that have other bits in 0.7.4."""

_DESCRIBED = (
    "tests/backends/test_flashinfer_table.py::test_the_installed_functions_are_as_described"
)
DEFAULTS = (
    Difference(
        "backend of nvfp4_quantize, fp4_quantize, mxfp4_quantize and mxfp8_quantize",
        '"cuda"',
        '"auto", which is "cuda" unless batch_invariant=True; we name the backend',
        "quantization/fp4_quantization.py:1653",
        _DESCRIBED,
    ),
    Difference(
        "use_fused_finalize of cutlass_fused_moe",
        "True",
        "None, which is True unless torch asks for deterministic algorithms; we give False",
        "fused_moe/core.py:1572",
        _DESCRIBED,
    ),
    Difference(
        "the tiles that the TRT-LLM layers offer to their tuner",
        "by the average number of tokens of a local expert",
        "by the number of all experts as well: two smaller tiles, one more with several ranks",
        "trtllm_fused_moe_kernel_launcher.cu:1056",
        "tests/backends/test_fake_flashinfer.py::test_every_tactic_is_advertised",
    ),
)
"""The defaults that 0.7.4 changed."""

ADDITIONS = (
    Addition(
        "nvfp4_4over6 of the three fused layers",
        "served: with per-token scales, and in cutlass, we give the call's own, where 0.7.2 reads the "
        "environment",
        "fused_moe/core.py:6922",
    ),
    Addition(
        "workspace_buffer of the TRT-LLM layers",
        "refused: our functions have 0.7.2's arguments, and FlashInfer allocates",
        "fused_moe/core.py:6986",
    ),
    Addition(
        "routing_metadata of trtllm_fp4_block_scale_routed_moe",
        "refused: it is the routing of an earlier call, and every call of ours brings its own",
        "fused_moe/core.py:7308",
    ),
    Addition(
        "batch_invariant of the quantizers and of mm_fp4",
        'refused: other bits. The quantizers are build="cute-dsl" with exact math, as `explain` notes, '
        "but a row of zeros and NaN has the per-token scale 1 / FLT_MAX, not 0 "
        "(`tests/backends/test_batch_invariant_oracle.py`); the product adds in steps of 64, and "
        "`mm_fp4_bounds` has its intervals ("
        "[judging](judging.md#a-batch-invariant-product-of-flashinfer))",
        "quantization/fp4_quantization.py:1660",
    ),
    Addition(
        "clamped_relu2_limit and ClampedRelu2 of the CuTe-DSL layer",
        "refused: the activation is not implemented",
        "fused_moe/cute_dsl/fused_moe.py:1774",
    ),
    Addition(
        "PowLU of the cutlass layer",
        "refused: the activation is not implemented",
        "tllm_enums.py:84",
    ),
    Addition(
        "swap_ab of the CuTe-DSL layer",
        "refused: its gated weights lie in groups of 16 rows, ours in groups of 64",
        "fused_moe/prepare.py:2495",
    ),
    Addition(
        "pad_trtllm_moe_weights",
        "not called, and not equal to ours: it pads H to multiples of 512 and I to multiples of 128, "
        "`prepare_experts` H to 128 and a gated I to 64. An H that is then no multiple of 256, or an I "
        "of 128, is refused for FlashInfer of both versions, whose kernels reject it or may give wrong "
        "results",
        "fused_moe/core.py:489",
    ),
    Addition(
        "CakeStepFunConfig, a layer with per-token scales",
        "refused: it has SwigluStep alone, in kernels whose order of sums is not described",
        "fused_moe/runners.py:7349",
    ),
    Addition(
        "CudnnGroupedGemmNvfp4Config, a layer",
        "refused: it has one global scale and no per-token scales",
        "fused_moe/api.py:2049",
    ),
)
"""The features that came with 0.7.4."""


def of_other_version(
    row: Difference,
    touches: Callable[[C], object],
    asked: Callable[[C], FlashInferVersion],
    how: Mapping[FlashInferVersion, str],
) -> Rule[C]:
    """Refuse a call that a row touches and that asks for the bits of another version.

    Args:
        how: the argument that asks for the bits of each version.
    """

    def reason(call: C) -> str:
        here = version.HERE.contract
        return (
            f"FlashInfer {here} has other bits than {asked(call)}, which the call asks for: "
            f"{row.what}. In 0.7.2 {row.old}; in 0.7.4 {row.new}. {how[here]} asks for those of "
            f"{here}"
        )

    return Rule(lambda r: asked(r) != version.HERE.contract and touches(r), reason, row.source)
