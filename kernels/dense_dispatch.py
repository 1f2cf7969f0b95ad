"""One call, `mm_fp4`, over every backend; which one runs, and why not the others.

As `dispatch.py` does for the quantizer. The choice never changes the meaning of the result; its bits it
does as far as the contract leaves the sums open (`reference/bounds/dense.py`). A backend that was named
never falls back.
"""

# SPDX-License-Identifier: Apache-2.0
import functools
import logging

import torch

from ..reference import checks
from .backends import Explanation, UnsupportedError, triton_refusal_of
from .dense_call import DenseCall, make_dense_call
from .flashinfer import dense as fi

ORDER = ("flashinfer:cutlass", "flashinfer:cute-dsl", "triton", "reference")
"""What `auto` tries, in order; one alpha a row passes cutlass by. Of FlashInfer's others one is
experimental, and what serves the same calls is not better known."""

BACKENDS: tuple[str, ...] = (*fi.RULES, "triton", "reference")
_log = logging.getLogger("nvfp4_moe")


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
    backend: str = "auto",
    use_nvfp4: bool = True,
    enable_pdl: bool = True,
) -> torch.Tensor:
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

    Returns:
        [M, N] of out_dtype.

    Raises:
        ValueError, TypeError: an argument that no backend accepts.
        UnsupportedError: the backend that was named cannot serve the call.
    """
    name = _backend(backend)
    request = make_dense_call(
        a, b, a_descale, b_descale, alpha, out_dtype, out, block_size, use_8x4_sf_layout, use_nvfp4,
        enable_pdl,
    )  # fmt: skip
    if name == "auto":
        name = _choose(request)
    elif (reason := refusal(name, request)) is not None:
        raise UnsupportedError(f"backend {name} cannot serve this call: {reason}")
    return run(name, request)


def explain_mm_fp4(
    a: torch.Tensor,
    b: torch.Tensor,
    a_descale: torch.Tensor,
    b_descale: torch.Tensor,
    alpha: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    block_size: int = 16,
    use_8x4_sf_layout: bool = False,
    backend: str = "auto",
    use_nvfp4: bool = True,
    enable_pdl: bool = True,
    *,
    capability: tuple[int, int] | None = None,
) -> Explanation:
    """Which backend `mm_fp4` of the same arguments would run, and why each other would not.

    Nothing is computed; meta tensors do. `capability=(10, 3)` asks about another GPU than the one `a`
    is on. An invalid call is explained, not raised.
    """
    try:
        name = _backend(backend)
        request = make_dense_call(
            a, b, a_descale, b_descale, alpha, out_dtype, out, block_size, use_8x4_sf_layout,
            use_nvfp4, enable_pdl, capability,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        return Explanation(None, tuple((name, str(error)) for name in BACKENDS))
    reasons = tuple((name, refusal(name, request)) for name in BACKENDS)
    if name == "auto":
        name = _choose(request)
    return Explanation(name if dict(reasons)[name] is None else None, reasons)


def refusal(backend: str, r: DenseCall) -> str | None:
    """Why a backend cannot serve the request; None if it can."""
    if backend in fi.RULES:
        return fi.refusal(backend, r)
    return triton_refusal_of(r.a, "a is", r.capability) if backend == "triton" else None


def run(backend: str, r: DenseCall) -> torch.Tensor:
    """Run the request on a backend that `refusal` let pass."""
    out = r.output()
    if backend in fi.RULES:
        if out.numel():  # an empty launch is an error
            try:
                fi.mm_fp4(backend, r, out)
            except NotImplementedError as error:  # cake has programs for some shapes only
                raise UnsupportedError(
                    f"backend {backend} cannot serve this call: {error}"
                ) from error
        return out
    if backend == "triton":
        from .dense import mm_fp4 as op
    else:
        from .reference_dense_ops import mm_fp4 as op
    op(r.a, r.b_rows, r.a_scales, r.b_scales, r.alpha, out, r.use_8x4)
    return out


def _choose(r: DenseCall) -> str:
    """The backend of `auto`. It never picks the interpreter: a CPU tensor goes to the reference."""
    if r.capability is None:
        return "reference"
    for name in ORDER:
        reason = refusal(name, r)
        if reason is None:
            return name
        if r.capability >= (10, 0) and not torch.compiler.is_compiling():
            _log_once(name, reason)
    raise AssertionError("the reference serves every valid request")


@functools.lru_cache(maxsize=256)
def _log_once(backend: str, reason: str) -> None:
    _log.info("mm_fp4: %s cannot serve, falling back: %s", backend, reason)


def _backend(backend: str) -> str:
    """The full name of a backend, or "auto"."""
    name = f"flashinfer:{backend}"
    if name in fi.RULES:
        return name
    checks.one_of("backend", backend, ("auto", *BACKENDS))
    return backend
