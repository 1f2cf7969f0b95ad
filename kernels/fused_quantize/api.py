"""SiLU and multiply, or RMSNorm, and the per-token quantizer in one call.

`reference/fused_quantize.py` has the arithmetic, whose bits every backend here has. FlashInfer fuses
these with static scales only, so it is no backend.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from ...reference import checks
from ...reference.recipe import (
    BLOCK_SIZE,
    FLASHINFER,
    Build,
    FlashInferVersion,
    Recipe,
    SfLayout,
)
from ...reference.weights.scalars import LARGEST
from .. import backends, environment
from ..allocate import allocate
from ..backends import Asked, Backend, Operation
from ..quantize.call import (
    UNSET,
    QuantizeCall,
    check_values,
    four_over_six_of,
    is_unset,
    make_quantize_call,
)
from ..quantize.ops import Triple
from .call import FusedQuantizeCall

FusedQuantizeBackend = Literal["auto", "reference", "triton"]
"""The names that an editor offers for `backend`; `register_backend` adds others."""


def _triton_refusal(call: FusedQuantizeCall) -> str | None:
    return backends.triton_refusal_of(call.x, "x is", call.capability)


def _in_triton(call: FusedQuantizeCall) -> Triple:
    from .launch import OP

    return OP(call, call.residual)


def _in_reference(call: FusedQuantizeCall) -> Triple:
    from .ops import REFERENCE

    return REFERENCE(call, call.residual)


def _adopt(
    name: str, run: Callable[[FusedQuantizeCall], Any]
) -> Callable[[FusedQuantizeCall], Triple]:
    """Wrap the function of a user's backend, whose results are checked."""

    def adopted(call: FusedQuantizeCall) -> Triple:
        result = run(call)
        expected = allocate(call.values().to("meta"), call.layout)
        backends.check_results(name, result, expected, call.x)
        codes, block_scales, per_token_scale = result
        return codes, block_scales, per_token_scale

    return adopted


FUSED_QUANTIZE: Operation[FusedQuantizeCall, Triple] = Operation(
    "fused_quantize",
    [
        Backend("triton", _triton_refusal, _in_triton, backends.on_gpu, launches=True),
        Backend("reference", backends.serves_all, _in_reference),
    ],
    adopt=_adopt,
)


@FUSED_QUANTIZE.served()
def silu_and_mul_nvfp4_quantize(
    x: torch.Tensor,
    a_global_sf: float | torch.Tensor | None = None,
    sfLayout: SfLayout | int = SfLayout.layout_128x4,
    backend: FusedQuantizeBackend | str = "auto",
    *,
    nvfp4_4over6: Any = UNSET,
    fast_math: bool | None = None,
    build: Build = "cuda",
    flashinfer: FlashInferVersion = FLASHINFER,
) -> Asked[FusedQuantizeCall]:
    """SiLU of the first half of every row times the second, quantized per token.

    Contract: bitwise `nvfp4_quantize(silu_and_mul(x), ..., per_token_activation=True)` with the product
    rounded to x's dtype between the two, by `reference.fused_quantize.silu_and_mul` of the build.

    Args:
        x: [M, 2K] bf16 or fp16, K a multiple of 16.
        a_global_sf: as `nvfp4_quantize` has it per token; None for the recipe's own, 1/2688 or 1/1536.
        sfLayout, nvfp4_4over6, fast_math, build, flashinfer: as `nvfp4_quantize` has them.
        backend: "auto", "triton", "reference", or one of `register_backend("fused_quantize", ...)`.

    Returns:
        (codes uint8 [M, K/2], block scales uint8 [padded M, padded K/16], per-token scales fp32 [M]).

    Raises:
        ValueError, TypeError: an argument that no backend accepts.
        UnsupportedError: the backend that was named cannot serve the call.
    """
    _check_matrix(x, 2 * BLOCK_SIZE, "2K")
    half = x[:, : x.shape[1] // 2]
    quantizer = _quantizer(half, a_global_sf, sfLayout, nvfp4_4over6, fast_math, build, flashinfer)
    return _call(x, None, 0.0, None, quantizer), FUSED_QUANTIZE.check_name(backend)


@FUSED_QUANTIZE.served()
def rmsnorm_nvfp4_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    a_global_sf: float | torch.Tensor | None = None,
    sfLayout: SfLayout | int = SfLayout.layout_128x4,
    backend: FusedQuantizeBackend | str = "auto",
    *,
    nvfp4_4over6: Any = UNSET,
    fast_math: bool | None = None,
    build: Build = "cuda",
    flashinfer: FlashInferVersion = FLASHINFER,
) -> Asked[FusedQuantizeCall]:
    """The RMSNorm of every row, quantized per token.

    Contract: bitwise `nvfp4_quantize` of `reference.fused_quantize.rmsnorm`, which rounds to x's dtype.

    Args:
        x: [M, K] bf16 or fp16, K a multiple of 16.
        weight: [K] of x's dtype.
        eps: added to the mean of squares.
        the others, returns and errors: as `silu_and_mul_nvfp4_quantize` has them.
    """
    _check_norm(x, weight, eps)
    quantizer = _quantizer(x, a_global_sf, sfLayout, nvfp4_4over6, fast_math, build, flashinfer)
    return _call(x, weight, eps, None, quantizer), FUSED_QUANTIZE.check_name(backend)


@FUSED_QUANTIZE.served()
def add_rmsnorm_nvfp4_quantize(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    a_global_sf: float | torch.Tensor | None = None,
    sfLayout: SfLayout | int = SfLayout.layout_128x4,
    backend: FusedQuantizeBackend | str = "auto",
    *,
    nvfp4_4over6: Any = UNSET,
    fast_math: bool | None = None,
    build: Build = "cuda",
    flashinfer: FlashInferVersion = FLASHINFER,
) -> Asked[FusedQuantizeCall]:
    """Normalize and quantize x + residual; the sum, rounded to its dtype, replaces `residual`.

    As in FlashInfer's `fused_add_rmsnorm` the norm is of the fp32 sum; x stays as it is.

    Args:
        residual: [M, K] of x's dtype, contiguous; updated in place.
        the others, returns and errors: as `rmsnorm_nvfp4_quantize` has them.
    """
    _check_matrix(x, BLOCK_SIZE, "K")
    _check_like("residual", residual, x, x.shape)
    checks.tensor("residual", residual, contiguous=True)
    _check_norm(x, weight, eps)
    quantizer = _quantizer(x, a_global_sf, sfLayout, nvfp4_4over6, fast_math, build, flashinfer)
    return _call(x, weight, eps, residual, quantizer), FUSED_QUANTIZE.check_name(backend)


def _call(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    quantizer: QuantizeCall,
) -> FusedQuantizeCall:
    """The call, of arguments that are checked, and of the quantizer's call."""
    return FusedQuantizeCall(
        x.contiguous(), None if weight is None else weight.contiguous(), float(eps),
        quantizer.scale, quantizer.recipe, quantizer.layout, residual, quantizer.capability,
    )  # fmt: skip


def _quantizer(
    a: torch.Tensor,
    scale: float | torch.Tensor | None,
    sfLayout: SfLayout | int,
    nvfp4_4over6: Any,
    fast_math: bool | None,
    build: Build,
    flashinfer: FlashInferVersion,
) -> QuantizeCall:
    """The quantizer's call, of values of the shape of `a`; without a scale, by the recipe's own."""
    own = scale is None
    if own:
        unset = is_unset(nvfp4_4over6)
        config = environment.four_over_six() if unset else four_over_six_of(nvfp4_4over6)
        scale = Recipe(four_over_six=config).base_scale_inv
    assert scale is not None
    call = make_quantize_call(
        a,
        scale,
        sfLayout=sfLayout,
        per_token_activation=True,
        nvfp4_4over6=nvfp4_4over6,
        fast_math=fast_math,
        build=build,
        flashinfer=flashinfer,
    )
    if not own:
        check_values(call)
    return call


def _check_matrix(x: Any, columns: int, shape: str) -> None:
    checks.tensor("x", x, checks.HALVES, ("M", shape))
    if x.shape[1] % columns or x.shape[1] == 0:
        checks.wrong_value("x", x, f"[M, {shape}], K a positive multiple of {BLOCK_SIZE}")


def _check_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    _check_matrix(x, BLOCK_SIZE, "K")
    _check_like("weight", weight, x, x.shape[1:])
    checks.number("eps", eps)
    if not 0 <= eps <= LARGEST:
        checks.wrong_value("eps", eps, "a finite number of fp32, of at least 0")


def _check_like(name: str, t: Any, x: torch.Tensor, shape: Sequence[int]) -> None:
    checks.tensor(name, t, (x.dtype,), shape, like=None if x.is_meta else ("x", x))
