"""One call, `mm_fp4`, over every backend; which one runs, and why not the others.

The choice never changes the meaning of the result. It changes the bits only where the contract leaves
the sums open (`reference/bounds/dense.py`). A backend that was named never falls back.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from typing import Any, Literal

import torch

from .. import backends
from ..backends import Asked, Backend, Operation
from ..flashinfer import dense as fi
from .call import DenseCall, make_bf16_call, make_dense_call

DenseBackend = Literal[
    "auto", "reference", "triton",
    "flashinfer:cutlass", "flashinfer:cute-dsl", "flashinfer:cudnn",
    "flashinfer:cutedsl_low_latency", "flashinfer:b12x", "flashinfer:cake", "flashinfer:trtllm",
    "cutlass", "cute-dsl", "cudnn", "cutedsl_low_latency", "b12x", "cake", "trtllm",
]  # fmt: skip
"""The names that an editor offers for `backend`; `register_backend` adds others."""
_AUTOMATIC = ("flashinfer:cutlass", "flashinfer:cute-dsl")
"""FlashInfer's backends that "auto" tries, in order. Its cake is experimental; that its others are
better than these is not known."""


def _on_flashinfer(name: str) -> Backend[DenseCall, torch.Tensor]:
    def run(call: DenseCall) -> torch.Tensor:
        out = call.output()
        if out.numel():  # an empty launch is an error
            fi.mm_fp4(name, call, out)  # cake has programs for some shapes only
        return out

    automatic = backends.always if name in _AUTOMATIC else backends.never
    return Backend(name, lambda call: fi.refusal(name, call), run, automatic)


def _triton_refusal(call: DenseCall) -> str | None:
    return backends.triton_refusal_of(call.a, "a is", call.capability)


def _notes(call: DenseCall) -> list[str]:
    """Say on an sm_90 which of its GEMMs Triton takes, and what bits it has."""
    if call.capability != (9, 0) or not backends.HAS_TRITON:
        return []
    from . import hopper

    reason = hopper.refusal(90, call.k)
    if reason is None:
        return ["triton multiplies by its GEMM for sm_90: a row's bits depend on no other row"]
    return [f"triton multiplies by its GEMM for every GPU, not by that for sm_90: {reason}"]


def _in_triton(call: DenseCall) -> torch.Tensor:
    from .launch import OP

    return _fill(OP, call)


def _in_reference(call: DenseCall) -> torch.Tensor:
    from .ops import REFERENCE

    return _fill(REFERENCE, call)


def _fill(op: Callable[[DenseCall, torch.Tensor], None], call: DenseCall) -> torch.Tensor:
    """Run a call by an implementation, which fills the output."""
    out = call.output()
    op(call, out)
    return out


def _adopt(name: str, run: Callable[[DenseCall], Any]) -> Callable[[DenseCall], torch.Tensor]:
    """The function of a user's backend, whose result is checked and put where the caller wants it."""

    def adopted(call: DenseCall) -> torch.Tensor:
        result = run(call)
        expected = torch.empty((call.m, call.n), dtype=call.out_dtype, device="meta")
        backends.check_results(name, [result], [expected], call.a)
        return result if call.out is None or call.out is result else call.out.copy_(result)

    return adopted


def _unfit(call: DenseCall) -> str | None:
    """Say why no user's backend can serve a call: it was written for the arguments of `mm_fp4`."""
    return "a is bf16, and it multiplies codes" if call.a_scales is None else None


MM_FP4: Operation[DenseCall, torch.Tensor] = Operation(
    "mm_fp4",
    [
        *map(_on_flashinfer, fi.RULES),
        Backend("triton", _triton_refusal, _in_triton, backends.on_gpu, launches=True),
        Backend("reference", backends.serves_all, _in_reference),
    ],
    aliases={name.removeprefix("flashinfer:"): name for name in fi.RULES},
    notes=_notes,
    adopt=_adopt,
    unfit=_unfit,
)
BACKENDS = MM_FP4.names
"""Our own backends."""


@MM_FP4.served()
def mm_fp4(
    a: torch.Tensor,
    b: torch.Tensor,
    a_descale: torch.Tensor,
    b_descale: torch.Tensor,
    alpha: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    block_size: int = 16,
    use_8x4_sf_layout: bool = False,
    backend: DenseBackend | str = "auto",
    use_nvfp4: bool = True,
    enable_pdl: bool = True,
    *,
    batch_invariant: bool = False,
) -> Asked[DenseCall]:
    """alpha * a @ b of NVFP4 matrices: FlashInfer's `mm_fp4`, on every backend.

    Names, order and meaning of the arguments are those of flashinfer-python 0.7.2
    (`gemm/gemm_base.py:9538`). `reference.dense.mm_fp4` has the arithmetic: exact products, a sum in
    fp32 whose order is open, one product with alpha, one rounding. Where the sums are exact in fp32 all
    backends agree to the bit. With tokens quantized per token, alpha is their scales times the weights'
    global decode scale.

    Args:
        a: [M, K/2] uint8 or float4_e2m1fn_x2, two codes a byte; K a multiple of 16, M any.
        b: [K/2, N], column-major: `codes.T` of contiguous [N, K/2], rows not shuffled; N any.
        a_descale: uint8 or float8_e4m3fn block scales of a, as `nvfp4_quantize` returns them in 128x4.
        b_descale: the transpose of b's block scales in 128x4, `scales.T`. Padding is not read.
        alpha: float32, one element or M of them; None counts as 1.
        out_dtype: bfloat16 or float16.
        out: [M, N] of out_dtype, contiguous, filled and returned; None for a new one.
        block_size: 16.
        use_8x4_sf_layout: a's block scales are in 8x4; b's are 128x4 all the same.
        backend: "auto", "reference", "triton", or "flashinfer:" before one of FlashInfer's own names
            (cutlass, cute-dsl, cudnn, cutedsl_low_latency, b12x, cake); those without it mean the same.
        use_nvfp4: True.
        enable_pdl: passed on to FlashInfer, of no meaning elsewhere.
        batch_invariant: a row of the result depends on no other row of a, whatever M is; in Triton and
            in the reference.

    Returns:
        [M, N] of out_dtype.

    Raises:
        ValueError, TypeError: an argument that no backend accepts.
        UnsupportedError: the backend that was named cannot serve the call.
    """
    name = MM_FP4.check_name(backend)
    call = make_dense_call(
        a,
        b,
        a_descale,
        b_descale,
        alpha,
        out_dtype=out_dtype,
        out=out,
        block_size=block_size,
        use_8x4_sf_layout=use_8x4_sf_layout,
        use_nvfp4=use_nvfp4,
        enable_pdl=enable_pdl,
        batch_invariant=batch_invariant,
    )
    return call, name


explain_mm_fp4 = MM_FP4.explaining(mm_fp4)


@MM_FP4.served()
def mm_bf16_fp4(
    a: torch.Tensor,
    b: torch.Tensor,
    b_descale: torch.Tensor,
    alpha: torch.Tensor | None = None,
    *,
    backend: Literal["auto", "reference", "triton"] | str = "auto",
    batch_invariant: bool = False,
) -> Asked[DenseCall]:
    """alpha * a @ b of bf16 rows and NVFP4 weights (W4A16), in Triton and in the reference.

    Names and meaning of the arguments are those of flashinfer-python 0.7.2's function
    (`gemm/gemm_bf16_fp4.py:372`); `b` and `b_descale` are as `mm_fp4` takes them.
    `reference.dense.mm_bf16_fp4` has the arithmetic.

    Args:
        a: [M, K] bf16; K a multiple of 16, M any.
        b, b_descale, alpha, batch_invariant: as for `mm_fp4`.
        backend: "auto", "reference" or "triton".

    Returns:
        [M, N] bf16.

    Raises:
        ValueError, TypeError: an argument that no backend accepts, or one that requires a gradient.
        UnsupportedError: the backend that was named cannot serve the call.
    """
    name = MM_FP4.check_name(backend)
    return make_bf16_call(a, b, b_descale, alpha, batch_invariant=batch_invariant), name
