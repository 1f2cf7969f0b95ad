"""What stands before the per-token quantizer, with it, in one call.

`reference/fused_quantize.py` has the arithmetic, whose bits every backend here has. FlashInfer fuses
these with static scales only, so it is no backend.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from typing import Any

import torch

from ..reference import checks
from ..reference.recipe import BLOCK_SIZE, Build, SfLayout
from ..reference.weights.scalars import LARGEST
from .backends import UnsupportedError, triton_refusal_of
from .ops import Triple
from .producer_ops import Producers
from .quantize_call import UNSET, QuantizeCall, check_values, make_quantize_call

BACKENDS = ("triton", "reference")


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
    rounded to x's dtype between the two, by `reference.fused_quantize.silu_and_mul`.

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
    _check_matrix(x, 2 * BLOCK_SIZE, "2K")
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

    Contract: bitwise `nvfp4_quantize` of `reference.fused_quantize.rmsnorm`, which rounds to x's dtype.

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
    _check_matrix(x, BLOCK_SIZE, "K")
    _check_like("residual", residual, x, x.shape)
    checks.tensor("residual", residual, contiguous=True)
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
    _check_matrix(x, BLOCK_SIZE, "K")
    _check_like("weight", weight, x, x.shape[1:])
    checks.number("eps", eps)
    if not 0 <= eps <= LARGEST:
        checks.wrong_value("eps", eps, "a finite number of fp32, of at least 0")
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
) -> QuantizeCall:
    """The quantizer's request of what it is given, of the shape of `a`."""

    def made(value: float | torch.Tensor, config: Any) -> QuantizeCall:
        return make_quantize_call(
            a, value, sfLayout=sfLayout, per_token_activation=True, nvfp4_4over6=config,
            fast_math=fast_math, build=build,
        )  # fmt: skip

    if scale is not None:
        request = made(scale, nvfp4_4over6)
        check_values(request)
        return request
    # An omitted recipe takes any base scale, so its own can be had from the request.
    recipe = made(1.0, UNSET).recipe if nvfp4_4over6 is UNSET else None
    from_config = 1 / (6 * (nvfp4_4over6.e4m3_max if hasattr(nvfp4_4over6, "e4m3_max") else 448))
    return made(recipe.base_scale_inv if recipe else from_config, nvfp4_4over6)


def _implementation(x: torch.Tensor, r: QuantizeCall, backend: str) -> Producers:
    checks.one_of("backend", backend, ("auto", *BACKENDS))
    reason = triton_refusal_of(x, "x is", r.capability)
    if backend == "triton" and reason is not None:
        raise UnsupportedError(f"backend triton cannot serve this call: {reason}")
    if backend == "triton" or (backend == "auto" and r.capability and reason is None):
        from . import producer_launch as ours
    else:
        from . import reference_producer_ops as ours  # type: ignore[no-redef]
    return Producers(ours.silu_and_mul_quantize, ours.rmsnorm_quantize)


def _check_matrix(x: Any, columns: int, shape: str) -> None:
    checks.tensor("x", x, checks.HALVES, ("M", shape))
    if x.shape[1] % columns or x.shape[1] == 0:
        checks.wrong_value("x", x, f"[M, {shape}], K a positive multiple of {BLOCK_SIZE}")


def _check_like(name: str, t: Any, x: torch.Tensor, shape: Sequence[int]) -> None:
    checks.tensor(name, t, (x.dtype,), shape, like=None if x.is_meta else ("x", x))
