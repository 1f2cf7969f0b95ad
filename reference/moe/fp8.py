"""The FP8 quantizers of the layers that NVFP4 is measured against: e4m3 codes under other scales.

    per tensor   encode = 448 / amax, 1 of zeros; code = e4m3(x * encode)
    blocks       scale = max(amax / 448, least) of 1 x 128 values (activations), 128 x 128 (weights);
                 code = e4m3(x / scale)
    MXFP8        V = largest magnitude of 32 values; scale = 2^(byte - 127), the power of two at or
                 above V * rcp(448); code = e4m3(x * 1 / scale)

All in fp32, each e4m3 saturating (`numerics/e4m3.py`). The first two are FlashInfer's own Python
(0.7.2.post1, `fused_moe/prepare.py:723-760`, `:967-985` and `:1118`), whose divisions are correctly
rounded here and on the CPU; what a GPU's torch makes of a division by a number may differ by an ulp.
`least` is 1e-12 there and the smallest normal number in `activationDeepSeekKernel`
(`trtllm_fused_moe_dev_kernel.cu:347`).

MXFP8 is `cvt_warp_fp16_to_mxfp8` (`quantization_utils.cuh:853`), bit for bit: e8m0 rounds up,
subnormals are flushed (-use_fast_math), so a block under 448 * 2^-126 has byte 0 and codes of zero; a
NaN loses in the maximum and has the code of 448, since min and max before the conversion drop it; a
block of NaN alone has byte 255. FlashInfer's trace template (`trace/templates/quantize.py:140`) rounds
the scale down instead, and saturates what lies above: that is not what the kernel does. Since 0.7.4 the
kernel flushes nothing (`quantization_utils.cuh:265`, `:900`); a block has codes of zero where its byte
is 0, that is up to 448 * 2^-127.
"""

# SPDX-License-Identifier: Apache-2.0
from typing import NamedTuple

import torch

from ..numerics import e4m3
from ..numerics.fp32 import flush, rcp_approx_ftz
from ..numerics.subnormals import kept
from ..recipe import FLASHINFER, FlashInferVersion, check_flashinfer
from ..weights.scalars import MOST_OF_WEIGHTS

BLOCK = 128
MX_BLOCK = 32
LEAST = 1e-12
LEAST_OF_INTERMEDIATE = torch.finfo(torch.float32).smallest_normal
_E4M3 = torch.float8_e4m3fn


class Scaled(NamedTuple):
    codes: torch.Tensor  # float8_e4m3fn
    scale: torch.Tensor


def encode_scale(amax: torch.Tensor) -> torch.Tensor:
    """The per-tensor encode scale of a largest magnitude, fp32; 1 of zeros, at most 2^117."""
    # As torch divides a number by a tensor, in two roundings, which FlashInfer's Python does.
    return torch.where(amax > 0, e4m3.MAX / amax.float(), 1.0).clamp(max=MOST_OF_WEIGHTS)


def quantize_per_tensor(x: torch.Tensor, encode: torch.Tensor) -> torch.Tensor:
    """Return e4m3 codes of x times an encode scale that broadcasts to it."""
    return e4m3.encode(x.float() * encode).view(_E4M3)


def quantize_blocks(x: torch.Tensor, rows: int = 1, least: float = LEAST) -> Scaled:
    """Quantize blocks of `rows` x 128 values.

    Args:
        x: [..., R, C] of any float dtype.
        least: of a scale.

    Returns:
        (codes [..., R, C], decode scales [..., R / rows, C / 128] fp32); a block that holds a NaN is
        NaN altogether.

    Raises:
        ValueError: R or C is no multiple of its block.
    """
    _check(x, rows, BLOCK)
    blocks = x.float().unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, rows))
    amax = blocks.abs().amax((-3, -1), keepdim=True)
    scale = (amax / torch.full_like(amax, e4m3.MAX)).clamp(min=least)
    codes = e4m3.encode(blocks / scale).view(_E4M3)
    return Scaled(codes.reshape(x.shape), scale[..., 0, :, 0])


def block_values(q: Scaled, rows: int = 1) -> torch.Tensor:
    """Codes times scales of `quantize_blocks`, fp64 and exact."""
    scale = q.scale.double().repeat_interleave(rows, -2).repeat_interleave(BLOCK, -1)
    return q.codes.double() * scale


@kept
def quantize_mxfp8(x: torch.Tensor, flashinfer: FlashInferVersion = FLASHINFER) -> Scaled:
    """Quantize [..., C] of any float dtype by blocks of 32.

    Args:
        flashinfer: whose bits; 0.7.4 flushes no subnormals.

    Returns:
        (codes [..., C], e8m0 bytes [..., C / 32] uint8).

    Raises:
        ValueError: C is no multiple of 32.
    """
    _check(x, 1, MX_BLOCK)
    check_flashinfer(flashinfer)
    flushed = flush if flashinfer == "0.7.2" else torch.Tensor.float
    blocks = flushed(x.float()).unflatten(-1, (-1, MX_BLOCK))
    amax = blocks.abs().masked_fill(blocks.isnan(), -1.0).amax(-1)
    amax = amax.masked_fill(amax < 0, torch.nan)
    byte = _e8m0(flushed(amax * rcp_approx_ftz(torch.full_like(amax, e4m3.MAX))))
    # Byte 0 is 2^-127, a subnormal, which compares as zero there and has no reciprocal.
    decode = rcp_approx_ftz(mx_scale(byte).float())
    encode = torch.where(byte == 0, 0.0, decode)[..., None]
    scaled = flushed(blocks * encode)
    codes = e4m3.encode(scaled.masked_fill(scaled.isnan(), e4m3.MAX)).view(_E4M3)
    return Scaled(codes.reshape(x.shape), byte)


def mx_scale(byte: torch.Tensor) -> torch.Tensor:
    """Decode e8m0 bytes to fp64; 255 is NaN."""
    power = torch.exp2(byte.double() - 127)
    return power.masked_fill(byte == 255, torch.nan)


def mx_values(q: Scaled) -> torch.Tensor:
    """Codes times scales of `quantize_mxfp8`, fp64 and exact."""
    return q.codes.double() * mx_scale(q.scale).repeat_interleave(MX_BLOCK, -1)


def _e8m0(x: torch.Tensor) -> torch.Tensor:
    """Positive fp32, `cvt.rp.satfinite.ue8m0x2.f32`; NaN to 255. Byte 0 is 2^-127 and all below it."""
    bits = x.contiguous().view(torch.int32)
    above = (bits & 0x007FFFFF != 0) & (bits > 0x00400000)
    exponent = (bits >> 23) + above
    return torch.where(x.isnan(), 255, exponent.clamp(max=254)).to(torch.uint8)


def _check(x: torch.Tensor, rows: int, columns: int) -> None:
    if x.shape[-1] % columns or (rows > 1 and x.shape[-2] % rows):
        raise ValueError(
            f"x has shape {tuple(x.shape)}; it must be whole blocks of {rows} x {columns}"
        )
