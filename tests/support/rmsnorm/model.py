"""The bits of FlashInfer 0.7.4's `rmsnorm_fp4quant`, of a row's reciprocal root, in PyTorch.

NVFP4 with a global scale: `cute_dsl/rmsnorm_fp4quant.py:487`, `fp4_common.py:1699`. Every operation is
fp32 and rounds, unless it says otherwise:

    y            (x * rstd) * weight of bf16; (x * weight rounded to fp16) * rstd of fp16
    block scale  ((global scale * largest |y|) * rcp(6)), at most 448, to e4m3
    code         y * (rcp(block scale) * global scale) to e2m1; rcp of a zero scale is 0
"""

# SPDX-License-Identifier: Apache-2.0
import torch

from nvfp4_moe.reference.numerics import e2m1, e4m3
from nvfp4_moe.reference.numerics.fp32 import rcp_approx_ftz
from nvfp4_moe.reference.recipe import BLOCK_SIZE

ULPS = 16
"""How far `rstd` may lie from the exact one: the sum's order, and the approximate instruction."""


def normalized(
    x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y [M, K] and the largest |y| of each block [M, K / 16], in fp32.

    `x` [M, K] and `weight` [K] are bf16 or fp16; `rstd` [M] is fp32.
    """
    column = rstd[:, None]
    if x.dtype == torch.float16:
        product = (x * weight).float()
        y = product * column
        return y, product.abs().unflatten(-1, (-1, BLOCK_SIZE)).amax(-1) * column
    y = x.float() * column * weight.float()
    return y, y.abs().unflatten(-1, (-1, BLOCK_SIZE)).amax(-1)


def quantized(
    x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, global_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes [M, K / 2] and e4m3 block scales [M, K / 16], both uint8."""
    y, amax = normalized(x, weight, rstd)
    scale = torch.tensor(global_scale, dtype=torch.float32, device="cpu")
    sixth = rcp_approx_ftz(torch.full_like(scale, e2m1.MAX))
    block_scales = e4m3.encode((scale * amax * sixth).clamp(max=448.0))
    value = e4m3.decode(block_scales)
    factor = torch.where(value == 0, 0.0, rcp_approx_ftz(value)) * scale
    blocks = y.unflatten(-1, (-1, BLOCK_SIZE)) * factor[..., None]
    return e2m1.pack(e2m1.encode(blocks).flatten(-2)), block_scales


def exact_rstd(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Return fp32 1 / sqrt(mean of x^2 + eps) [M], rounded once."""
    return (x.double().square().mean(1) + eps).rsqrt().float()


def matching_rstd(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    global_scale: float,
    codes: torch.Tensor,
    block_scales: torch.Tensor,
) -> torch.Tensor:
    """Return for each row an rstd within `ULPS` that gives all its bits, or NaN: [M] fp32."""
    bits = exact_rstd(x, eps).view(torch.int32)
    found = torch.full_like(bits.view(torch.float32), torch.nan)
    for step in range(-ULPS, ULPS + 1):
        rstd = (bits + step).view(torch.float32)
        want = quantized(x, weight, rstd, global_scale)
        same = (want[0] == codes).all(1) & (want[1] == block_scales).all(1)
        found = torch.where(same & found.isnan(), rstd, found)
    return found
