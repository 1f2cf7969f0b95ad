"""e4m3 (finite only), the 8-bit format of NVFP4's block scales.

Encoding is that of PTX `cvt.rn.satfinite.e4m3x2.f32`: round to nearest, ties to even, down to the
subnormals (2^-9; 2^-10 is a tie and gives 0); beyond 464 and infinity give 448 (0x7e) with the
sign; NaN gives 0x7f.
"""

# SPDX-License-Identifier: Apache-2.0
import torch

MAX = 448.0
NAN = 0x7F


def encode(x: torch.Tensor) -> torch.Tensor:
    """Encode fp32 values of any shape to e4m3 bytes, uint8 of the same shape."""
    # torch's own cast gives NaN beyond 464 before 2.12 and saturates since; clamped input is the
    # same for both.
    byte = x.clamp(-MAX, MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(x.isnan(), NAN, byte)


def decode(byte: torch.Tensor) -> torch.Tensor:
    """Decode e4m3 bytes (uint8) to their fp32 values; 0x7f and 0xff to NaN."""
    return byte.view(torch.float8_e4m3fn).float()
