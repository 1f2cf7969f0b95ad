"""e2m1, the 4-bit format of NVFP4's elements.

A code is a sign bit and a magnitude 0..7 that stands for 0, .5, 1, 1.5, 2, 3, 4, 6. Two codes share
a byte, the even column in the low nibble. Encoding is that of PTX `cvt.rn.satfinite.e2m1x2.f32`:
round to nearest, ties to the even code; beyond 6 and infinity give 6; the sign of zero is kept;
NaN gives +6 (CUDA 13.0, `cuda_fp4.hpp`).
"""

# SPDX-License-Identifier: Apache-2.0
import functools

import torch

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MAX = 6.0


def encode(x: torch.Tensor) -> torch.Tensor:
    """Encode fp32 values of any shape to e2m1 codes 0..15, uint8 of the same shape."""
    x = x.nan_to_num(nan=MAX)
    a = x.abs().clamp_(max=MAX)
    # The values are 1/2 apart up to 2, 1 apart up to 4, and 2 apart beyond. Each of these roundings
    # (ties to even) gives the code in its range, and no smaller number than the code in the others.
    code = torch.minimum((a * 2.0).round_(), a.round().add_(2.0))
    code = torch.minimum(code, a.mul_(0.5).round_().add_(4.0)).to(torch.int8)
    sign = (x.view(torch.int32) >> 31).to(torch.int8)  # 0, or -1 with every bit set
    return (code | (sign & 8)).view(torch.uint8)


def decode(code: torch.Tensor) -> torch.Tensor:
    """Decode e2m1 codes 0..15 (uint8) to their fp32 values, code 8 to -0."""
    values = _values(code.device).index_select(0, code.int().flatten())
    return values.view(code.shape)


@functools.cache  # a copy to the GPU waits for it
def _values(device: torch.device) -> torch.Tensor:
    return torch.tensor(VALUES + tuple(-v for v in VALUES), dtype=torch.float32, device=device)


def pack(code: torch.Tensor) -> torch.Tensor:
    """Codes [..., K] to bytes [..., K/2], the even column in the low nibble."""
    pairs = code.contiguous().view(torch.int16)  # the even column in the low byte
    return (pairs | (pairs >> 4)).to(torch.uint8)  # the low byte


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Unpack bytes [..., K/2] to codes [..., K]: the inverse of `pack`."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
