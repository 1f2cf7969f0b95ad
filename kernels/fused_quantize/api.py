"""SiLU and multiply, or RMSNorm, and the per-token quantizer in one call.

`reference/fused_quantize.py` has the arithmetic, whose bits every backend here has. FlashInfer fuses
these with static scales only, so it is no backend.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ...reference import checks
from ...reference.recipe import BLOCK_SIZE, Build, Recipe, SfLayout
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

FusedQuantizeBackend = Literal["auto", "reference", "triton"]
"""The names that an editor offers for `backend`; `register_backend` adds others."""


@dataclass(frozen=True)
class FusedQuantizeCall:
    """The checked arguments of one of the three functions here."""

    x: torch.Tensor  # [M, K], or [M, 2K] for SiLU and multiply; contiguous
    weight: torch.Tensor | None  # [K], contiguous; None: SiLU and multiply
    residual: torch.Tensor | None  # [M, K]: it is added to x, and the sum written into it
    eps: float
    quantize: QuantizeCall  # of the values [M, K]; its `a` has their shape alone
    capability: tuple[int, int] | None  # of the GPU asked about; None on the CPU


def _triton_refusal(call: FusedQuantizeCall) -> str | None:
    return backends.triton_refusal_of(call.x, "x is", call.capability)


def _in_triton(call: FusedQuantizeCall) -> Triple:
    from . import launch as ours

    return _run(ours, call)


def _in_reference(call: FusedQuantizeCall) -> Triple:
    from .ops import REFERENCE

    return _run(REFERENCE, call)


def _run(ours: Any, call: FusedQuantizeCall) -> Triple:
    """Run a call by an implementation's two functions (`ops.Producers`)."""
    q = call.quantize
    if call.weight is None:
        return ours.silu_and_mul_quantize(call.x, q.scale, q.recipe, q.layout)
    return ours.rmsnorm_quantize(
        call.x, call.residual, call.weight, call.eps, q.scale, q.recipe, q.layout
    )


def _adopt(
    name: str, run: Callable[[FusedQuantizeCall], Any]
) -> Callable[[FusedQuantizeCall], Triple]:
    """Wrap the function of a user's backend, whose results are checked."""

    def adopted(call: FusedQuantizeCall) -> Triple:
        result = run(call)
        expected = allocate(call.quantize.a.to("meta"), call.quantize.layout)
        backends.check_results(name, result, expected, call.x)
        codes, block_scales, per_token_scale = result
        return codes, block_scales, per_token_scale

    return adopted


FUSED_QUANTIZE: Operation[FusedQuantizeCall, Triple] = Operation(
    "fused_quantize",
    [
        Backend("triton", _triton_refusal, _in_triton, backends.on_gpu),
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
) -> Asked[FusedQuantizeCall]:
    """SiLU of the first half of every row times the second, quantized per token.

    Contract: bitwise `nvfp4_quantize(silu_and_mul(x), ..., per_token_activation=True)` with the product
    rounded to x's dtype between the two, by `reference.fused_quantize.silu_and_mul` of the build.

    Args:
        x: [M, 2K] bf16 or fp16, K a multiple of 16.
        a_global_sf: as `nvfp4_quantize` has it per token; None for the recipe's own, 1/2688 or 1/1536.
        sfLayout, nvfp4_4over6, fast_math, build: as `nvfp4_quantize` has them.
        backend: "auto", "triton", "reference", or one of `register_backend("fused_quantize", ...)`.

    Returns:
        (codes uint8 [M, K/2], block scales uint8 [padded M, padded K/16], per-token scales fp32 [M]).

    Raises:
        ValueError, TypeError: an argument that no backend accepts.
        UnsupportedError: the backend that was named cannot serve the call.
    """
    _check_matrix(x, 2 * BLOCK_SIZE, "2K")
    half = x[:, : x.shape[1] // 2]
    quantizer = _quantizer(half, a_global_sf, sfLayout, nvfp4_4over6, fast_math, build)
    call = FusedQuantizeCall(x.contiguous(), None, None, 0.0, quantizer, quantizer.capability)
    return call, FUSED_QUANTIZE.check_name(backend)


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
) -> Asked[FusedQuantizeCall]:
    """The RMSNorm of every row, quantized per token.

    Contract: bitwise `nvfp4_quantize` of `reference.fused_quantize.rmsnorm`, which rounds to x's dtype.

    Args:
        x: [M, K] bf16 or fp16, K a multiple of 16.
        weight: [K] of x's dtype.
        eps: added to the mean of squares.
        the others, returns and errors: as `silu_and_mul_nvfp4_quantize` has them.
    """
    quantizer = _quantizer_of_norm(
        x, weight, eps, a_global_sf, sfLayout, nvfp4_4over6, fast_math, build
    )
    call = FusedQuantizeCall(
        x.contiguous(), weight.contiguous(), None, float(eps), quantizer, quantizer.capability
    )
    return call, FUSED_QUANTIZE.check_name(backend)


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
    quantizer = _quantizer_of_norm(
        x, weight, eps, a_global_sf, sfLayout, nvfp4_4over6, fast_math, build
    )
    call = FusedQuantizeCall(
        x.contiguous(), weight.contiguous(), residual, float(eps), quantizer, quantizer.capability
    )
    return call, FUSED_QUANTIZE.check_name(backend)


def _quantizer_of_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *quantizer: Any
) -> QuantizeCall:
    """The quantizer's call, of a norm whose arguments are checked."""
    _check_matrix(x, BLOCK_SIZE, "K")
    _check_like("weight", weight, x, x.shape[1:])
    checks.number("eps", eps)
    if not 0 <= eps <= LARGEST:
        checks.wrong_value("eps", eps, "a finite number of fp32, of at least 0")
    return _quantizer(x, *quantizer)


def _quantizer(
    a: torch.Tensor,
    scale: float | torch.Tensor | None,
    sfLayout: SfLayout | int,
    nvfp4_4over6: Any,
    fast_math: bool | None,
    build: Build,
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
    )
    if not own:
        check_values(call)
    return call


def _check_matrix(x: Any, columns: int, shape: str) -> None:
    checks.tensor("x", x, checks.HALVES, ("M", shape))
    if x.shape[1] % columns or x.shape[1] == 0:
        checks.wrong_value("x", x, f"[M, {shape}], K a positive multiple of {BLOCK_SIZE}")


def _check_like(name: str, t: Any, x: torch.Tensor, shape: Sequence[int]) -> None:
    checks.tensor(name, t, (x.dtype,), shape, like=None if x.is_meta else ("x", x))
