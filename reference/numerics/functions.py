"""exp, sigmoid and quotients by which FlashInfer routes: exact, or as a GPU approximates them.

nvcc's -use_fast_math makes them of three instructions (`RoutingKernel.cuh:128` has the sigmoid):

    e^x          ex2.approx.ftz(x * log2(e))
    sigmoid(x)   0.5 * tanh.approx(0.5 * x) + 0.5, rounded once
    a / b        a * rcp.approx.ftz(b)

What the instructions give depends on the GPU. "hopper" is the H200's, measured over every argument:

    ex2.approx   2^(k >> 23) * T[k & (2^23 - 1)] with k = floor(|x| 2^23), of a negative x -k where the
                 low bits of k are 0 and else ~k; T[i] = 2^(i / 2^23), rounded, and the table's ulp
    tanh.approx  x below 2^-8 and 1 from 8 on; between, that of x cut to its leading bits, rounded, and
                 the table's ulp

With it FlashInfer's ids and weights of all ten methods on an H200 are reproduced to the bit, as the
tests show. What a Blackwell gives is not known. `hopper_functions.xz` holds the ulp: int8 [2^23] of ex2,
then little-endian int16 of tanh for each exponent of `LEADING_BITS`.
"""

# SPDX-License-Identifier: Apache-2.0
import functools
import hashlib
import lzma
import math
from collections.abc import Callable
from importlib.resources import files
from typing import Any, Literal, get_args

import torch

from .fp32 import Arithmetic, flush, rcp_approx_ftz

FunctionsName = Literal["exact", "hopper"]
FUNCTIONS: tuple[FunctionsName, ...] = get_args(FunctionsName)
LOG2E = 1.4426950216293335  # fp32 0x3fb8aa3b
LEADING_BITS = {
    119: 17, 120: 17, 121: 17, 122: 18, 123: 18, 124: 19, 125: 19, 126: 19, 127: 20, 128: 21, 129: 20
}  # fmt: skip
"""By exponent, how many bits below the leading one tanh.approx reads."""
_CUDA = Arithmetic(ftz=True)


class Exact:
    """Rounded once from fp64, subnormal results to zero."""

    def exp(self, x: torch.Tensor) -> torch.Tensor:
        return flush(torch.exp(x.double()).float())

    def sigmoid(self, x: torch.Tensor) -> torch.Tensor:
        tanh = torch.tanh(0.5 * x.double()).float()
        return positive_nan(0.5 * tanh + 0.5)

    def div(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return _CUDA.div(a, b)


class Hopper(Exact):
    """As an H200 approximates them; their derivatives are those of the exact functions."""

    def exp(self, x: torch.Tensor) -> torch.Tensor:
        def approximate(x: torch.Tensor) -> torch.Tensor:
            return ex2_approx_ftz(_CUDA.mul(flush(x), LOG2E))

        return _approximated(approximate, super().exp, x)

    def sigmoid(self, x: torch.Tensor) -> torch.Tensor:
        def approximate(x: torch.Tensor) -> torch.Tensor:
            tanh = tanh_approx(_CUDA.mul(flush(x), 0.5))
            return positive_nan(flush((0.5 * tanh.double() + 0.5).float()))  # exact in fp64

        return _approximated(approximate, super().sigmoid, x)

    def div(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        def approximate(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return _CUDA.mul(a, rcp_approx_ftz(b.expand_as(a)))

        return _approximated(approximate, super().div, a, b)


class _ValueAndGradient(torch.autograd.Function):
    """The first tensor, with the gradient of the second."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, differentiable: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, grad


def _approximated(
    approximate: Callable[..., torch.Tensor],
    exact: Callable[..., torch.Tensor],
    *given: torch.Tensor,
) -> torch.Tensor:
    """Return an approximation, which is read from tables, with the gradient of the exact function."""
    value = approximate(*(t.detach() for t in given))
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in given)):
        return value
    result: torch.Tensor = _ValueAndGradient.apply(value, exact(*given))
    return result


def functions(name: FunctionsName) -> Exact:
    """The functions of a name."""
    return Hopper() if name == "hopper" else Exact()


@functools.cache
def checksum(name: FunctionsName) -> str:
    """SHA-256 of what the functions are read from, in hexadecimal; of "exact" that of nothing."""
    raw = _hopper_bytes() if name == "hopper" else b""
    return hashlib.sha256(raw).hexdigest()


def ex2_approx_ftz(x: torch.Tensor) -> torch.Tensor:
    """PTX `ex2.approx.ftz.f32` of an H200, to the bit."""
    x = flush(x)
    steps = (x.abs().double().clamp(max=1000.0) * 2.0**23).floor().nan_to_num().long()
    low = steps & (2**23 - 1)
    steps = torch.where(x < 0, torch.where(low != 0, ~steps, -steps), steps)
    significand = ex2_table(x.device)[steps & (2**23 - 1)]
    power = ((steps >> 23) + 1023 << 52).view(torch.float64)
    y = significand.double() * power
    y = torch.where(y < 2.0**-126, 0.0, torch.where(y >= 2.0**128, math.inf, y)).float()
    return y.masked_fill(x.isnan(), math.nan)


def tanh_approx(x: torch.Tensor) -> torch.Tensor:
    """PTX `tanh.approx.f32` of an H200, to the bit."""
    bits = x.contiguous().view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    exponent = magnitude >> 23
    y = magnitude.view(torch.float32)
    for e, leading in LEADING_BITS.items():
        place = (magnitude & 0x7FFFFF) >> (23 - leading)
        y = torch.where(exponent == e, tanh_table(e, x.device)[place.long()], y)
    y = torch.where(exponent > max(LEADING_BITS), 1.0, y)
    return torch.copysign(y, x).masked_fill(x.isnan(), math.nan)


@functools.cache
def ex2_table(device: torch.device) -> torch.Tensor:
    """[2^23] fp32: ex2.approx of i / 2^23."""
    i = torch.arange(2**23, dtype=torch.float64, device="cpu")
    ulp = torch.frombuffer(bytearray(_hopper_bytes()[: 2**23]), dtype=torch.int8)
    near = torch.exp2(i * 2.0**-23).float()
    return (near.view(torch.int32) + ulp).view(torch.float32).to(device)


@functools.cache
def tanh_table(exponent: int, device: torch.device) -> torch.Tensor:
    """fp32 [2^leading bits]: tanh.approx of the numbers of a biased exponent, by their leading bits."""
    start = 2**23
    for e in range(min(LEADING_BITS), exponent):
        start += 2 << LEADING_BITS[e]
    leading = LEADING_BITS[exponent]
    raw = _hopper_bytes()[start : start + (2 << leading)]
    ulp = torch.frombuffer(bytearray(raw), dtype=torch.int16)
    near = torch.tanh(leading_numbers(exponent).double()).float()
    return (near.view(torch.int32) + ulp).view(torch.float32).to(device)


def leading_numbers(exponent: int) -> torch.Tensor:
    """fp32 [2^leading bits]: the numbers of a biased exponent that differ in what tanh.approx reads."""
    leading = LEADING_BITS[exponent]
    place = torch.arange(1 << leading, dtype=torch.int32, device="cpu")
    return (place << (23 - leading) | exponent << 23).view(torch.float32)


def positive_nan(values: torch.Tensor) -> torch.Tensor:
    """NaNs as a GPU computes them; a CPU's have any sign, which a comparison of bits would see."""
    return values.masked_fill(values.isnan(), math.nan)


@functools.cache
def _hopper_bytes() -> bytes:
    return lzma.decompress((files(__package__) / "hopper_functions.xz").read_bytes())
