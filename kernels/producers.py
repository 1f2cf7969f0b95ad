"""What stands before the per-token quantizer, with it, in one call.

`reference/producers.py` has the arithmetic, whose bits every backend here has. FlashInfer fuses these
with static scales only, so it is no backend.
"""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch

from ..reference.recipe import BLOCK_SIZE, Build, SfLayout
from .dispatch import UnsupportedError, triton_refusal_of
from .ops import Triple
from .producer_ops import Producers
from .request import UNSET, Request, make_request

BACKENDS = ("triton", "reference")
_DTYPES = (torch.bfloat16, torch.float16)


def silu_and_mul_nvfp4_quantize(
    x: torch.Tensor,
    a_global_sf: float | torch.Tensor | None = None,
    sfLayout: Any = SfLayout.layout_128x4,
    backend: str = "auto",
    *,
    nvfp4_4over6: Any = UNSET,
    fast_math: bool | None = None,
    build: Build = "cuda",
) -> Triple:
    """SiLU of the first half of every row times the second, quantized per token.

    Contract: bitwise `nvfp4_quantize(silu_and_mul(x), ..., per_token_activation=True)` with the product
    rounded to x's dtype between the two, where `reference.producers.silu_and_mul` is the first step.

    Args:
        x: [M, 2K] bf16 or fp16, K a multiple of 16.
        a_global_sf: as `nvfp4_quantize` has it per token; None for the recipe's own, 1/2688 or 1/1536.
        sfLayout, nvfp4_4over6, fast_math, build: as `nvfp4_quantize` has them.
        backend: "auto", "triton" or "reference".

    Returns:
        (codes uint8 [M, K/2], block scales uint8 [padded M, padded K/16], per-token scales fp32 [M]).

    Raises:
        ValueError, TypeError: an argument that no backend accepts.
        UnsupportedError: Triton was named and cannot run here.
    """
    _check_matrix(x, 2 * BLOCK_SIZE, "[M, 2K]")
    half = x[:, : x.shape[1] // 2]
    request = _request(half, a_global_sf, sfLayout, nvfp4_4over6, fast_math, build)
    ops = _implementation(x, request, backend)
    return ops.silu_and_mul(x.contiguous(), request.scale, request.recipe, request.layout)


def rmsnorm_nvfp4_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    a_global_sf: float | torch.Tensor | None = None,
    sfLayout: Any = SfLayout.layout_128x4,
    backend: str = "auto",
    *,
    nvfp4_4over6: Any = UNSET,
    fast_math: bool | None = None,
    build: Build = "cuda",
) -> Triple:
    """The RMSNorm of every row, quantized per token.

    Contract: bitwise `nvfp4_quantize` of `reference.producers.rmsnorm`, which rounds to x's dtype.

    Args:
        x: [M, K] bf16 or fp16, K a multiple of 16.
        weight: [K] of x's dtype.
        eps: added to the mean of squares.
        the others, returns and errors: as `silu_and_mul_nvfp4_quantize` has them.
    """
    return _norm(
        x, None, weight, eps, a_global_sf, sfLayout, backend, nvfp4_4over6, fast_math, build
    )


def add_rmsnorm_nvfp4_quantize(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    a_global_sf: float | torch.Tensor | None = None,
    sfLayout: Any = SfLayout.layout_128x4,
    backend: str = "auto",
    *,
    nvfp4_4over6: Any = UNSET,
    fast_math: bool | None = None,
    build: Build = "cuda",
) -> Triple:
    """The same of x + residual, which replaces `residual`, rounded to its dtype.

    As in FlashInfer's `fused_add_rmsnorm` the norm is of the fp32 sum; x stays as it is.

    Args:
        residual: [M, K] of x's dtype, contiguous; updated in place.
        the others, returns and errors: as `rmsnorm_nvfp4_quantize` has them.
    """
    _check_matrix(x, BLOCK_SIZE, "[M, K]")
    _check_like(residual, "residual", x, tuple(x.shape))
    if not residual.is_contiguous():
        raise ValueError(f"residual has strides {tuple(residual.stride())}; it must be contiguous")
    return _norm(
        x, residual, weight, eps, a_global_sf, sfLayout, backend, nvfp4_4over6, fast_math, build
    )


def _norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    a_global_sf: float | torch.Tensor | None,
    sfLayout: Any,
    backend: str,
    nvfp4_4over6: Any,
    fast_math: bool | None,
    build: Build,
) -> Triple:
    _check_matrix(x, BLOCK_SIZE, "[M, K]")
    _check_like(weight, "weight", x, (x.shape[1],))
    if not isinstance(eps, (int, float)):
        raise TypeError(f"eps is a {type(eps).__name__}; it must be a float")
    request = _request(x, a_global_sf, sfLayout, nvfp4_4over6, fast_math, build)
    ops = _implementation(x, request, backend)
    return ops.rmsnorm(
        x.contiguous(), residual, weight.contiguous(), float(eps), request.scale, request.recipe,
        request.layout,
    )  # fmt: skip


def _request(
    a: torch.Tensor,
    scale: float | torch.Tensor | None,
    sfLayout: Any,
    nvfp4_4over6: Any,
    fast_math: bool | None,
    build: Build,
) -> Request:
    """The quantizer's request of what it is given, of the shape of `a`."""

    def made(value: float | torch.Tensor, config: Any) -> Request:
        return make_request(
            a, value, sfLayout, False, BLOCK_SIZE, None, True, None, None, config, fast_math, build
        )

    if scale is not None:
        return made(scale, nvfp4_4over6)
    # An omitted recipe takes any base scale, so its own can be had from the request.
    recipe = made(1.0, UNSET).recipe if nvfp4_4over6 is UNSET else None
    from_config = 1 / (6 * (nvfp4_4over6.e4m3_max if hasattr(nvfp4_4over6, "e4m3_max") else 448))
    return made(recipe.base_scale_inv if recipe else from_config, nvfp4_4over6)


def _implementation(x: torch.Tensor, r: Request, backend: str) -> Producers:
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend is {backend!r}; it must be one of auto, {', '.join(BACKENDS)}")
    reason = triton_refusal_of(x, "x is", r.capability)
    if backend == "triton" and reason is not None:
        raise UnsupportedError(f"backend triton cannot serve this call: {reason}")
    if backend == "triton" or (backend == "auto" and r.capability and reason is None):
        from . import producer_launch as ours
    else:
        from . import reference_producer_ops as ours  # type: ignore[no-redef]
    return Producers(ours.silu_and_mul_quantize, ours.rmsnorm_quantize)


def _check_matrix(x: Any, columns: int, shape: str) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is a {type(x).__name__}; it must be a torch.Tensor")
    if x.dtype not in _DTYPES:
        raise ValueError(f"x is {x.dtype}; it must be bfloat16 or float16")
    if x.dim() != 2 or x.shape[1] % columns or x.shape[1] == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; it must be {shape}, K a positive multiple of {BLOCK_SIZE}"
        )


def _check_like(t: Any, name: str, x: torch.Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name} is a {type(t).__name__}; it must be a torch.Tensor")
    if t.dtype != x.dtype or tuple(t.shape) != shape:
        raise ValueError(
            f"{name} is {t.dtype} of shape {tuple(t.shape)}; it must be {x.dtype}, as x, of shape "
            f"{shape}"
        )
    if t.device != x.device and not x.is_meta:
        raise ValueError(f"{name} is on {t.device}; it must be on x's device, {x.device}")
