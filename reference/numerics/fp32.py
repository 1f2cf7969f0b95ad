"""fp32 arithmetic as FlashInfer's two builds do it, and MUFU.RCP to the bit.

`build="cuda"` is compiled with -use_fast_math: every fp32 operation flushes subnormal inputs and
results to zero, the sign kept. `build="cute-dsl"` flushes in `rcp.approx.ftz` alone. Both multiply
and add without fusing. Everything in here takes and gives fp32 tensors.
"""

# SPDX-License-Identifier: Apache-2.0
import functools
import lzma
from importlib.resources import files

import torch

FLT_MAX = torch.finfo(torch.float32).max
_MIN_NORMAL = torch.finfo(torch.float32).smallest_normal


def flush(x: torch.Tensor) -> torch.Tensor:
    """Subnormals to zero, the sign kept."""
    return torch.where(x.abs() < _MIN_NORMAL, torch.copysign(torch.zeros_like(x), x), x)


@functools.cache
def rcp_delta(device: torch.device) -> torch.Tensor:
    """[2^23] int8: what rcp.approx adds, in ulp, to the correctly rounded reciprocal.

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
        return self.flush(a * b)

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
        return self.flush(a / b)

    def min_flt_max(self, x: torch.Tensor) -> torch.Tensor:
        """fminf(x, FLT_MAX): a NaN loses."""
        return torch.fmin(x, torch.full_like(x, FLT_MAX))
