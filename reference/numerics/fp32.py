"""fp32 arithmetic as FlashInfer's two builds do it, and MUFU.RCP to the bit.

`build="cuda"` is compiled with -use_fast_math: every fp32 operation flushes subnormal inputs and
results to zero, the sign kept. A GPU rounds a result to 24 bits as if exponents had no end, and then
takes what is below 2^-126 for zero: the product 2^-126 (1 - 2^-24), which IEEE 754 rounds to 2^-126, is
zero. An H200's products and quotients show it; the code that ptxas makes of `div.rn.ftz.f32` compares
the exponent after its last rounding. `build="cute-dsl"` flushes in `rcp.approx.ftz` alone. Both multiply
and add without fusing. Everything in here takes and gives fp32 tensors.
"""

# SPDX-License-Identifier: Apache-2.0
import functools
import lzma
from importlib.resources import files

import torch

FLT_MAX = torch.finfo(torch.float32).max
_MIN_NORMAL = torch.finfo(torch.float32).smallest_normal
_MAX_SUBNORMAL = _MIN_NORMAL - 2.0**-149
_LEAST = _MIN_NORMAL * (1 - 2.0**-25)
"""fp64: what is at least this large rounds to 24 bits that are at least 2^-126."""


def flush(x: torch.Tensor) -> torch.Tensor:
    """Subnormals to zero, the sign kept."""
    return torch.threshold(x.abs(), _MAX_SUBNORMAL, 0.0).copysign(x)


def flush_result(rounded: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Flush the fp32 result of an operation as a GPU does, by its value before it was rounded.

    Args:
        exact: fp64, the result, or a number on its side of every fp32 number and of every tie.
    """
    zero = torch.copysign(torch.zeros_like(rounded), rounded)
    return torch.where(exact.abs() < _LEAST, zero, rounded)


@functools.cache
def rcp_delta(device: torch.device) -> torch.Tensor:
    """Return the ulps, [2^23] int8, that rcp.approx adds to the correctly rounded reciprocal.

    Measured on an H100 over every significand; `nvfp4-moe doctor` compares it with the GPU at hand.
    """
    raw = lzma.decompress((files(__package__) / "rcp_delta.xz").read_bytes())
    return torch.frombuffer(bytearray(raw), dtype=torch.int8).to(device)


def rcp_approx_ftz(x: torch.Tensor) -> torch.Tensor:
    """PTX `rcp.approx.ftz.f32`, to the bit, specials included."""
    bits = x.contiguous().view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    significand = magnitude & 0x007FFFFF
    unit = (significand | 0x3F800000).view(torch.float32)  # in [1, 2)
    delta = rcp_delta(x.device)[significand.long()]
    scaled = unit.reciprocal().view(torch.int32) + delta - ((magnitude >> 23) - 127 << 23)
    scaled = torch.where(scaled < 0x00800000, 0, scaled)  # a subnormal result is flushed
    scaled = torch.where(magnitude < 0x00800000, 0x7F800000, scaled)  # 1 / 0
    scaled = torch.where(magnitude == 0x7F800000, 0, scaled)  # 1 / inf
    scaled = torch.where(x.isnan(), 0x7FFFFFFF, scaled | (bits & -0x80000000))
    return scaled.view(torch.float32)


class Arithmetic:
    """The fp32 operations of one build; `ftz` says whether they flush."""

    def __init__(self, ftz: bool):
        self.ftz = ftz

    def flush(self, x: torch.Tensor) -> torch.Tensor:
        """Return the value that an operation of this build reads where `x` is stored."""
        return flush(x) if self.ftz else x

    def mul(self, a: torch.Tensor, b: torch.Tensor | float) -> torch.Tensor:
        if not self.ftz:
            return a * b
        if not isinstance(b, torch.Tensor):
            b = torch.full_like(a, b)
        return flush_result(a * b, a.double() * b.double())

    def add(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.flush(a + b)

    def sub(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.flush(a - b)

    def div(self, a: torch.Tensor | float, b: torch.Tensor | float) -> torch.Tensor:
        """Correctly rounded a / b."""
        if not isinstance(a, torch.Tensor):
            a = torch.full_like(b, a)  # type: ignore[arg-type]
        if not isinstance(b, torch.Tensor):
            # A 0-dim divisor of a CUDA tensor may become a multiplication; a full tensor divides.
            b = torch.full_like(a, b)
        return flush_result(a / b, a.double() / b.double()) if self.ftz else a / b

    def min_flt_max(self, x: torch.Tensor) -> torch.Tensor:
        """Return fminf(x, FLT_MAX): a NaN becomes FLT_MAX."""
        return torch.fmin(x, torch.full_like(x, FLT_MAX))
