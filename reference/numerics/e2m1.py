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
    a = x.abs()
    # One comparison for each midpoint: `>` where the tie rounds down to an even code, `>=` where up.
    code = (a > 0.25).to(torch.uint8)
    code += a >= 0.75
    code += a > 1.25
    code += a >= 1.75
    code += a > 2.5
    code += a >= 3.5
    code += a > 5.0
    code = torch.where(torch.signbit(x), code | 8, code)
    return torch.where(x.isnan(), 7, code)


def decode(code: torch.Tensor) -> torch.Tensor:
    """Decode e2m1 codes 0..15 (uint8) to their fp32 values, code 8 to -0."""
    return _values(code.device)[code.int()]


@functools.cache  # a copy to the GPU waits for it
def _values(device: torch.device) -> torch.Tensor:
    return torch.tensor(VALUES + tuple(-v for v in VALUES), dtype=torch.float32, device=device)


def pack(code: torch.Tensor) -> torch.Tensor:
    """Codes [..., K] to bytes [..., K/2], the even column in the low nibble."""
    return code[..., 0::2] | (code[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Unpack bytes [..., K/2] to codes [..., K]: the inverse of `pack`."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
