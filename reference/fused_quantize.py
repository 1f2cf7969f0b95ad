"""SiLU-and-mul and RMSNorm before a quantizer, in arithmetic that every device can repeat.

FlashInfer's order of operations (flashinfer-python 0.7.2.post1: `include/flashinfer/activation.cuh:36`,
`include/flashinfer/norm.cuh:63` and `:416`), all of it fp32 and rounded to x's dtype once at the end:

    silu_and_mul   gate / (1 + exp(-gate)) * up
    rmsnorm        x * r * weight, r = 1 / sqrt(sum of x^2 / K + eps)
    add_rmsnorm    the same of x + residual, which is also rounded and kept as the next residual

FlashInfer leaves three things open: the last bits of `__expf` and of `rsqrt`, and the order of the sum
of squares. Here they are fixed, by operations that IEEE 754 rounds correctly, one at a time and never
fused: so any implementation of these lines has their bits.

    exp(t)         n = t / ln 2 to the nearest integer, r = t - n * ln 2 in two steps, 2^n times the
                   Taylor polynomial of degree 7 in r: within 2 ulp
    r              a correctly rounded quotient, square root and quotient
    sum of squares a binary tree over adjacent columns, the row padded with zeros to a power of two
"""

# SPDX-License-Identifier: Apache-2.0
import torch

from .numerics.fp32 import Arithmetic
from .numerics.subnormals import kept
from .recipe import Build

LOG2E = 1.4426950408889634
LN2_HIGH = 0.693359375  # nine bits: its product with n is exact
LN2_LOW = -2.12194440054690583e-4  # ln 2 - LN2_HIGH
ROUND = 12582912.0  # 1.5 * 2^23: a sum with it has no fraction
LOWEST, HIGHEST = -87.0, 89.0  # beyond, 1 + exp(t) is 1, and exp(t) infinite
TAYLOR = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)


def exp(t: torch.Tensor) -> torch.Tensor:
    """Return e^t of fp32 t for `1 + exp(t)`: e^-87 below -87, infinite from 88.73 on."""
    t = torch.where(t < LOWEST, LOWEST, torch.where(t > HIGHEST, HIGHEST, t))
    shifted = t * LOG2E + ROUND
    n = shifted - ROUND
    r = t - n * LN2_HIGH
    r = r - n * LN2_LOW
    p = torch.full_like(r, TAYLOR[0])
    for coefficient in TAYLOR[1:]:
        p = p * r + coefficient
    power = shifted.view(torch.int32) - 0x4B400000  # n, from the bits of the sum
    half = power >> 1  # 2^n in two factors, since n may be 128
    return p * _power_of_two(half) * _power_of_two(power - half)


def _power_of_two(n: torch.Tensor) -> torch.Tensor:
    return ((n + 127) << 23).view(torch.float32)


@kept
def silu_and_mul(x: torch.Tensor, build: Build = "cuda") -> torch.Tensor:
    """Apply SiLU-and-mul to [M, 2K] bf16 or fp16, gate and up: [M, K] of the same dtype.

    Args:
        build: "cuda" takes subnormal numbers for zeros, so that one of them times infinity is NaN
            (`quantization_utils.cuh:1146-1160`, built with -use_fast_math); "cute-dsl" keeps them.
    """
    ar = Arithmetic(ftz=build == "cuda")
    gate, up = ar.flush(x.float()).chunk(2, dim=-1)
    return ar.mul(ar.div(gate, 1.0 + exp(-gate)), up).to(x.dtype)


def sum_of_squares(x: torch.Tensor) -> torch.Tensor:
    """Sum fp32 [M, K] to [M], in the order of a binary tree over adjacent columns."""
    terms = x * x
    width = 1 << (x.shape[1] - 1).bit_length()
    terms = torch.nn.functional.pad(terms, (0, width - x.shape[1]))
    while terms.shape[1] > 1:
        terms = terms[:, 0::2] + terms[:, 1::2]
    return terms[:, 0]


def square_root(x: torch.Tensor) -> torch.Tensor:
    """Return the square root of fp32 numbers, rounded to nearest.

    torch's own in fp32 is an ulp off where a CPU build calls a vector library (MKL, on an AMD EPYC).
    A square root in fp64 is never as near to the middle of two fp32 numbers as its own error.
    """
    return x.double().sqrt().float()


@kept
def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Normalize [M, K] bf16 or fp16 with weight [K] of the same dtype: [M, K]."""
    return _normalized(x.float(), weight, eps).to(x.dtype)


@kept
def add_rmsnorm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the norm of x + residual, and x + residual, each [M, K] rounded once, as new tensors."""
    total = x.float() + residual.float()
    return _normalized(total, weight, eps).to(x.dtype), total.to(x.dtype)


def _normalized(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    # Divisors are whole tensors: a number may become a multiplication with its reciprocal.
    mean = sum_of_squares(x) / x.new_full(x.shape[:1], float(x.shape[1]))
    root = square_root(mean + x.new_full((), eps))
    return x * (torch.ones_like(root) / root)[:, None] * weight.float()
