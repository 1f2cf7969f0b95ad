"""The adapters to FlashInfer's dense NVFP4 products: `flashinfer.mm_fp4` with its backends.

The function is called in the form that a CUDA graph can capture.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from typing import Any

import torch

from ...reference.recipe import BLOCK_SIZE
from ..dense.call import DenseCall
from . import version
from .description import BATCH_INVARIANT, Argument, Function
from .rules import (
    BLACKWELL,
    COMMON,
    SM10X,
    SM12X,
    SM100,
    Rule,
    first_reason,
    no_kernels_beside,
    on_no_gpu,
)
from .version import Versions


def _alpha(backend: str, r: DenseCall, _: torch.Tensor) -> torch.Tensor | None:
    if r.alpha is None and backend == "flashinfer:cutlass":
        # csrc/fp4_gemm_cutlass.cu:108 reads one in any case.
        return torch.ones(1, dtype=torch.float32, device=r.a.device)
    return r.alpha


MM_FP4 = Function(
    "flashinfer",
    "mm_fp4",
    "gemm/gemm_base.py:9538",
    (
        Argument("a", lambda _, r, __: r.a),
        Argument("b", lambda _, r, __: r.b_rows.T),
        Argument("a_descale", lambda _, r, __: r.a_scales),
        Argument("b_descale", lambda _, r, __: r.b_scales.T),
        Argument("alpha", _alpha, None),
        Argument("out_dtype", lambda _, r, __: r.out_dtype, torch.bfloat16),
        Argument("out", lambda _, __, out: out, None),
        Argument("block_size", lambda *_: BLOCK_SIZE, 16),
        Argument("use_8x4_sf_layout", lambda _, r, __: r.use_8x4, False),
        Argument("backend", lambda backend, *_: backend.removeprefix("flashinfer:"), "auto"),
        Argument("use_nvfp4", lambda *_: True, True),
        Argument("enable_pdl", lambda _, r, __: r.enable_pdl, True),
        BATCH_INVARIANT,
    ),
)
"""It is called with the name of a backend, a call and the output [M, N]."""

_PER_ROW_ALPHA = (0, 7, 2)
"""The version that brought an alpha for each row."""

_COMMON: tuple[Rule[DenseCall], ...] = (
    *COMMON,
    on_no_gpu("a is on the {r.a.device.type}; FlashInfer needs a GPU"),
    Rule(lambda r: r.a_scales is None, "a is bf16; mm_fp4 multiplies codes"),
    Rule(lambda r: r.batch_invariant, "batch_invariant: it chooses its tiles by M"),
)


def _one_alpha(source: str) -> Rule[DenseCall]:
    return Rule(lambda r: r.by_row, "alpha has one element a row; it takes one in all", source)


def _only_128x4(source: str) -> Rule[DenseCall]:
    return Rule(lambda r: r.use_8x4, "a's block scales are 8x4; it reads 128x4", source)


def _contiguous(source: str) -> Rule[DenseCall]:
    return Rule(lambda r: not r.a.is_contiguous(), "a is not contiguous", source)


def _aligned_16(source: str) -> Rule[DenseCall]:
    reason = "a or b does not start at a multiple of 16 bytes, as its loads need"
    return Rule(lambda r: r.misaligned(16), reason, source)


def _multiple_of(size: str, number: int, source: str) -> Rule[DenseCall]:
    reason = f"{size.upper()} is {{r.{size}}}; it must be a multiple of {number}"
    return Rule(lambda r: getattr(r, size) % number, reason, source)


def _on_sm12x(refuses: Callable[[DenseCall], Any], reason: str, source: str) -> Rule[DenseCall]:
    return Rule(lambda r: r.capability in SM12X and refuses(r), reason, source)


RULES: dict[str, tuple[Rule[DenseCall], ...]] = {
    "flashinfer:cutlass": (
        *_COMMON,
        no_kernels_beside(BLACKWELL, "gemm/gemm_base.py:7940"),
        _one_alpha("gemm/gemm_base.py:7853"),
        _only_128x4("gemm/gemm_base.py:7957"),
        _contiguous("csrc/fp4_gemm_cutlass.cu:100"),
        _aligned_16("csrc/fp4_gemm_cutlass.cu:100"),
        _multiple_of("k", 32, "csrc/fp4_gemm_cutlass.cu:142"),
        _multiple_of("n", 32, "csrc/fp4_gemm_cutlass.cu:145"),
    ),
    "flashinfer:cute-dsl": (
        *_COMMON,
        no_kernels_beside((*SM10X, *SM12X), "gemm/gemm_base.py:7968"),
        Rule(
            lambda r: r.by_row,
            "one alpha a row came with 0.7.2",
            "gemm/gemm_base.py:6496",
            Versions(before=_PER_ROW_ALPHA),
        ),
        Rule(
            lambda r: r.by_row and r.capability not in SM100,
            "alpha has one element a row; on {sm} it takes one in all",
            "gemm/gemm_base.py:6496",
        ),
        _only_128x4("gemm/gemm_base.py:8010"),
        _contiguous("gemm/gemm_mm_fp4_cute_dsl.py:69"),  # compact tensors
        _aligned_16("gemm/gemm_mm_fp4_cute_dsl.py:69"),
        # rows of whole 16 bytes
        _multiple_of("k", 32, "gemm/kernels/dense_blockscaled_gemm_sm100.py:1888"),
        _multiple_of("n", 8, "gemm/gemm_base.py:8012"),
        _on_sm12x(
            lambda r: r.out_dtype != torch.bfloat16,
            "on {sm} it writes bfloat16 only",
            "gemm/kernels/sm12x_cute/runner.py:23",
        ),
        _on_sm12x(
            lambda r: r.n % 64 or r.k % 64,
            "N is {r.n} and K {r.k}; on {sm} both must be multiples of 64",
            "gemm/kernels/sm12x_cute/runner.py:47",
        ),
        _on_sm12x(
            lambda r: r.misaligned(32),
            "a or b does not start at a multiple of 32 bytes, as {sm}'s kernel needs",
            "gemm/kernels/sm12x_cute/runner.py:47",
        ),
        _on_sm12x(
            lambda r: max(r.m * r.k, r.n * r.k, r.m * r.n) >= 2**31,
            "a matrix has 2^31 elements or more; on {sm} its offsets are 31 bits",
            "gemm/kernels/sm12x_cute/policy.py:66",
        ),
    ),
    "flashinfer:cudnn": (
        *_COMMON,
        no_kernels_beside(BLACKWELL, "gemm/gemm_base.py:7871"),
        _one_alpha("gemm/gemm_base.py:7853"),
        _only_128x4("gemm/gemm_base.py:7889"),
        Rule(
            lambda _: not version.HERE.has_cudnn,
            "nvidia-cudnn-frontend is not installed",
            "gemm/gemm_base.py:7892",
        ),
        _contiguous("gemm/gemm_base.py:7892"),
        _multiple_of("k", 32, "gemm/gemm_base.py:7892"),
    ),
    "flashinfer:cutedsl_low_latency": (
        *_COMMON,
        no_kernels_beside(SM10X, "gemm/gemm_base.py:8027"),
        _one_alpha("gemm/gemm_base.py:7853"),
        _only_128x4("gemm/gemm_base.py:8042"),
        _contiguous("gemm/gemm_base.py:8046"),
        _aligned_16("gemm/gemm_base.py:8046"),
        Rule(
            lambda r: r.m > 8 or r.k % 64,
            "M is {r.m} and K {r.k}; it takes M up to 8 and K in multiples of 64",
            "gemm/gemm_base.py:8055",
        ),
    ),
    "flashinfer:b12x": (
        *_COMMON,
        no_kernels_beside(SM12X, "gemm/gemm_base.py:8064"),
        _one_alpha("gemm/gemm_base.py:7853"),
        _only_128x4("gemm/gemm_base.py:8090"),
        _contiguous("gemm/gemm_base.py:8090"),
        _aligned_16("gemm/gemm_base.py:8090"),
        _multiple_of("k", 32, "gemm/gemm_base.py:8095"),
    ),
    "flashinfer:cake": (
        *_COMMON,
        no_kernels_beside(SM100, "cake_nvfp4_per_token/support.py:35"),
        Rule(
            lambda _: True,
            "it came with 0.7.2",
            "cake_nvfp4_per_token/support.py:35",
            Versions(before=_PER_ROW_ALPHA),
        ),
        Rule(
            lambda r: r.alpha is None or r.alpha.numel() != r.m,
            "it takes alpha with one element a row only",
            "cake_nvfp4_per_token/support.py:65",
        ),
        _only_128x4("cake_nvfp4_per_token/support.py:72"),
        _contiguous("cake_nvfp4_per_token/support.py:76"),
        _multiple_of("n", 8, "cake_nvfp4_per_token/support.py:85"),
        _multiple_of("k", 256, "cake_nvfp4_per_token/support.py:89"),
        Rule(
            lambda r: not r.enable_pdl,
            "its programs are built with PDL; enable_pdl=False",
            "cake_nvfp4_per_token/support.py:94",
        ),
        _aligned_16("cake_nvfp4_per_token/support.py:89"),
        Rule(
            lambda _: not version.HERE.has_cake_programs,
            "this flashinfer-python lacks the sources of its programs",
        ),
    ),
    "flashinfer:trtllm": (
        *_COMMON,
        # The same call would be another product.
        Rule(
            lambda _: True,
            "it takes b with shuffled rows; mm_fp4's are in their natural order",
            "gemm/gemm_base.py:9647",
        ),
    ),
}
"""The rules of each backend, in the order in which they are asked."""


def refusal(backend: str, r: DenseCall) -> str | None:
    """Return why the FlashInfer backend cannot serve the call; None if it can."""
    return first_reason(RULES[backend], r)


def mm_fp4(backend: str, r: DenseCall, out: torch.Tensor) -> None:
    """Run the call, which `refusal` let pass, on FlashInfer, into `out`."""
    MM_FP4.run(backend, r, out)


def arguments(backend: str, r: DenseCall, out: torch.Tensor) -> dict[str, Any]:
    """Return the keyword arguments of `flashinfer.mm_fp4` for the call."""
    return MM_FP4.keywords(backend, r, out)
