"""ex2 and tanh as a GPU approximates them; `reference/numerics/functions.py` is their specification.

On a GPU each is one instruction, whose results depend on the GPU. The interpreter has no inline
assembly and reads the results of an H200 from `table_ptr`, fp32: ex2 of [0, 1) in steps of 2^-23, then
tanh by exponent and leading bits.
"""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl

from ...reference.numerics import functions
from .arithmetic import flush

LOG2E = tl.constexpr(functions.LOG2E)
_FIRST = tl.constexpr(min(functions.LEADING_BITS))
_LAST = tl.constexpr(max(functions.LEADING_BITS))
_LEADING_BITS = tl.constexpr(tuple(functions.LEADING_BITS.values()))
_LEAST = tl.constexpr(2.0**-126)
_TOO_LARGE = tl.constexpr(2.0**128)


@triton.constexpr_function
def leading_bits(exponent):
    return _LEADING_BITS.value[exponent - _FIRST.value]


@triton.constexpr_function
def start_of(exponent):
    """The place in the table of the tanh of a biased exponent."""
    return 2**23 + sum(1 << bits for bits in _LEADING_BITS.value[: exponent - _FIRST.value])


@triton.jit
def ex2_approx(x, table_ptr, ARCH: tl.constexpr):
    """The instruction `ex2.approx.ftz.f32`."""
    if ARCH == 0:
        x = flush(x, True, ARCH)
        size = tl.where(x == x, tl.where(tl.abs(x) < 1000.0, tl.abs(x), 1000.0), 0.0)
        steps = (size.to(tl.float64) * 8388608.0).to(tl.int64)
        steps = tl.where(x < 0, tl.where((steps & 0x7FFFFF) != 0, ~steps, -steps), steps)
        significand = tl.load(table_ptr + (steps & 0x7FFFFF)).to(tl.float64)
        y = significand * (((steps >> 23) + 1023) << 52).to(tl.float64, bitcast=True)
        y = tl.where(y < _LEAST, 0.0, tl.where(y < _TOO_LARGE, y, float("inf")))
        return tl.where(x == x, y.to(tl.float32), x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def tanh_approx(x, table_ptr, ARCH: tl.constexpr):
    """The instruction `tanh.approx.f32`."""
    if ARCH == 0:
        bits = x.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        exponent = magnitude >> 23
        y = magnitude.to(tl.float32, bitcast=True)
        for e in tl.static_range(_FIRST, _LAST + 1):
            place = (magnitude & 0x7FFFFF) >> (23 - leading_bits(e))
            y = tl.where(exponent == e, tl.load(table_ptr + start_of(e) + place), y)
        y = tl.where(exponent > _LAST, 1.0, y).to(tl.int32, bitcast=True)
        return tl.where(x == x, (y | (bits ^ magnitude)).to(tl.float32, bitcast=True), x)
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
