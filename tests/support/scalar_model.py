"""The quantizers a second time: one element at a time, numpy fp32, in the kernels' own order.

Written from flashinfer-python 0.7.2.post1 alone, statement by statement, so that it shares nothing
with the reference but the measured table of rcp.approx: `quantization_utils.cuh:431-690` (blocks),
`:766-860` (e4m3 input), `quantization.cuh:761-1010` (rows) for build "cuda";
`quantization_cute_dsl_utils.py:1542-1895`, `:2356-2445`, `cute_dsl/fp4_common.py:973-1064, 2091` and
`kernels/nvfp4_quantize.py:952-984` for build "cute-dsl". Slow: some 40 us an element with 4over6.
"""

# SPDX-License-Identifier: Apache-2.0
import lzma
import math
from bisect import bisect_left
from importlib.resources import files

import numpy as np

from nvfp4_moe.reference.recipe import NVFP44Over6Config, NVFP44Over6ErrMode, Recipe

F = np.float32
ZERO, ONE, SIX = F(0), F(1), F(6)
FLT_MAX = np.finfo(F).max
MIN_NORMAL = np.finfo(F).tiny
SIXTH = np.array([0x3E2AAAAB], np.uint32).view(F)[0]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3 = [m * 2.0**-9 for m in range(8)]
E4M3 += [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)][:-1]
RCP_DELTA = np.frombuffer(
    lzma.decompress((files("nvfp4_moe.reference.numerics") / "rcp_delta.xz").read_bytes()), np.int8
)


def nearest(x: float, values: list[float] | tuple[float, ...]) -> int:
    """Index of the value nearest to x >= 0, a tie to the even index, the last one beyond."""
    high = bisect_left(values, x)
    if high in (0, len(values)):
        return min(high, len(values) - 1)
    below, above = x - values[high - 1], values[high] - x  # exact in double near a tie
    return high - 1 if below < above or (below == above and high % 2) else high


def to_e2m1(x: F) -> int:
    if np.isnan(x):
        return 7
    return nearest(abs(float(x)), E2M1) | (8 if np.signbit(x) else 0)


def to_e4m3(x: F) -> int:
    if np.isnan(x):
        return 0x7F
    return nearest(abs(float(x)), E4M3) | (0x80 if np.signbit(x) else 0)


def from_e2m1(code: int) -> F:
    return F(-E2M1[code & 7] if code & 8 else E2M1[code])


def from_e4m3(byte: int) -> F:
    if byte & 0x7F == 0x7F:
        return F(np.nan)
    return F(-E4M3[byte & 0x7F] if byte & 0x80 else E4M3[byte])


def rcp(x: F) -> F:
    """rcp.approx.ftz.f32."""
    if np.isnan(x):
        return x
    if abs(x) < MIN_NORMAL:
        return np.copysign(F(np.inf), x)
    if np.isinf(x):
        return np.copysign(ZERO, x)
    fraction, exponent = math.frexp(abs(float(x)))
    unit = F(2 * fraction)
    near = int((ONE / unit).view(np.int32)) + int(RCP_DELTA[int(unit.view(np.int32)) & 0x7FFFFF])
    result = math.ldexp(float(np.int32(near).view(F)), 1 - exponent)
    return np.copysign(F(result if result >= MIN_NORMAL else 0.0), x)


def hmax(values) -> F:
    """Largest magnitude; a NaN loses, and stands where there is nothing else."""
    best = F(np.nan)
    for v in values:
        if np.isnan(best) or abs(v) > best:
            best = abs(v)
    return best


def fmin(a: F, b: F) -> F:
    return b if np.isnan(a) else min(a, b)


class Kernel:
    """One recipe's kernel. With build "cuda" each operation flushes what it reads and writes."""

    def __init__(self, recipe: Recipe):
        self.cuda = recipe.build == "cuda"
        self.exact = recipe.math == "exact"
        self.four = recipe.four_over_six
        # `quantization_utils.cuh:508` of 0.7.2, `:517` of 0.7.4
        self.tests_byte = not self.cuda or recipe.flashinfer == "0.7.4"

    def f(self, x: F) -> F:
        return np.copysign(ZERO, x) if self.cuda and abs(x) < MIN_NORMAL else F(x)

    def mul(self, a: F, b: F) -> F:
        return self.f(self.f(a) * self.f(b))

    def div(self, a: F, b: F) -> F:
        return self.f(self.f(a) / self.f(b))

    def add(self, a: F, b: F) -> F:
        return self.f(self.f(a) + self.f(b))

    def is_zero(self, x: F) -> bool:
        return self.f(x) == 0

    def decode_to_encode(self, scale: F) -> F:
        """The inverse flag."""
        return self.div(ONE, scale) if self.exact else rcp(scale)

    def row(self, x, g: F) -> tuple[list[int], list[int], F]:
        """(block scales, codes, per-token scale) of one row."""
        amax = hmax([ZERO, *x])  # the maximum starts from 0
        encode, scale = self.row_scales(amax, g)
        return *self.blocks(x, encode, amax), scale

    def blocks(self, x, encode: F, row_amax: F = ZERO) -> tuple[list[int], list[int]]:
        scales, codes = [], []
        for i in range(0, len(x), 16):
            scale, block_codes = self.block(x[i : i + 16], encode, row_amax)
            scales.append(scale)
            codes += block_codes
        return scales, codes

    def row_scales(self, amax: F, g: F) -> tuple[F, F]:
        """(encode scale, per-token scale)."""
        if self.is_zero(amax) and (self.exact or not self.cuda):
            return ZERO if self.four else FLT_MAX, ZERO  # of 1 / FLT_MAX, "cuda" flushes to it
        if self.exact:
            encode = fmin(self.div(self.div(ONE, g), amax), FLT_MAX)
            encode = encode if encode != 0 else ONE
            return encode, self.div(ONE, encode)
        scale = self.mul(amax, g)
        return ZERO if self.cuda and scale == 0 else rcp(scale), scale

    def block(self, x, encode: F, row_amax: F) -> tuple[int, list[int]]:
        vmax = hmax(x)
        if self.four:
            return self.four_over_six(x, vmax, encode, row_amax, self.four)
        if self.exact:
            zero = self.is_zero(vmax)
            byte = to_e4m3(ZERO if zero else self.mul(vmax, self.mul(encode, SIXTH)))
            decode = self.mul(from_e4m3(byte), self.div(ONE, encode))
            scale = ZERO if zero else fmin(self.div(ONE, decode), FLT_MAX)
        else:
            byte = to_e4m3(self.mul(encode, self.mul(vmax, rcp(SIX))))
            zero = from_e4m3(byte) == 0 if self.tests_byte else self.is_zero(vmax)
            scale = ZERO if zero else rcp(self.mul(from_e4m3(byte), rcp(encode)))
        return byte, [to_e2m1(self.mul(v, scale)) for v in x]

    def four_over_six(
        self, x, vmax: F, encode: F, row_amax: F, config: NVFP44Over6Config
    ) -> tuple[int, list[int]]:
        if self.is_zero(vmax):
            return 0, [0] * 16
        if self.exact:
            high6, decode = self.mul(self.div(vmax, SIX), encode), self.div(ONE, encode)
        else:
            high6, decode = self.mul(encode, self.mul(vmax, rcp(SIX))), rcp(encode)
        candidates = []
        for high in (self.mul(high6, F(1.5)), high6):
            byte = to_e4m3(high)
            step = self.mul(from_e4m3(byte), decode)
            scale = fmin(self.div(ONE, step), FLT_MAX) if self.exact else rcp(step)
            codes = [to_e2m1(self.mul(v, scale)) for v in x]
            error = self.error(x, byte, codes, encode, decode, row_amax, config)
            candidates.append((error, byte, codes))
        four, six = candidates
        return four[1:] if four[0] < six[0] else six[1:]

    def error(
        self, x, byte: int, codes, encode: F, decode: F, row_amax: F, config: NVFP44Over6Config
    ) -> F:
        """The sum over the block, left to right."""
        total = ZERO
        for v, code in zip(x, codes, strict=True):
            scaled = self.mul(from_e2m1(code), from_e4m3(byte))
            if config.err_use_fast_math:
                d = self.add(scaled, -self.mul(v, encode))
            else:
                if self.f(row_amax) > 0:
                    value = self.div(self.mul(scaled, row_amax), F(6 * config.e4m3_max))
                else:
                    value = self.mul(scaled, decode)
                if not self.cuda and code & 7 == 0:
                    value = ZERO  # a constant there, even times infinity or NaN
                d = self.add(value, -v)
            mse = config.err_mode == NVFP44Over6ErrMode.MSE
            total = self.add(total, self.mul(d, d) if mse else abs(d))
        return total

    def e4m3_block(self, x, encode: F) -> tuple[int, list[int]]:
        """e4m3 input: rescaled into fp16 first. The CUDA kernel knows no exact math."""
        exact = self.exact and not self.cuda
        prescale = self.mul(SIX, self.div(ONE, encode) if exact else rcp(encode))
        halves = [F(np.float16(self.mul(v, prescale))) for v in x]
        if not self.cuda:
            return self.block(halves, encode, ZERO)
        high = self.mul(encode, self.mul(hmax(halves), rcp(SIX)))
        byte = to_e4m3(high)
        scale = self.mul(encode, rcp(from_e4m3(byte))) if high != 0 else ZERO
        return byte, [to_e2m1(self.mul(v, scale)) for v in halves]

    def fp32_row(self, x, g: F) -> tuple[list[int], list[int], F]:
        """fp32 input, per token: codes by the block's own maximum."""
        scales, codes, amax = [], [], ZERO
        for i in range(0, len(x), 16):
            vmax = hmax([ZERO, *(self.f(v) for v in x[i : i + 16])])
            scale = ZERO if vmax == 0 else self.mul(SIX, rcp(vmax))
            codes += [to_e2m1(self.mul(v, scale)) for v in x[i : i + 16]]
            scales.append(scale)
            amax = max(amax, vmax)
        row_scale = self.mul(amax, g)
        products = [self.mul(row_scale, scale) for scale in scales]
        return [to_e4m3(rcp(p) if p != 0 else ZERO) for p in products], codes, row_scale
