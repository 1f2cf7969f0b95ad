"""The sums of the GEMMs, NVFP4 weights times tokens: the K loops that experts and dense layers share.

The weights' rows are the MMA's A operand: codes are decoded into bf16 in registers, exactly (e2m1 times
e4m3 has at most 6 significant bits). The tokens come decoded, each fourth column together, so that each
nibble of a tile of 16-bit words multiplies a tile of its own and no element has to change place. Weights
decoded before, as well, come from shared memory like the tokens. On Blackwell both stay codes and
`tl.dot_scaled` is the hardware's own block-scaled MMA. K is a multiple of 16; block scales that pad it
are never multiplied.
"""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl

from .decode import decode_fourth, operand_scale, scaled
from .layouts import tiled_scale_offset


@triton.jit
def sums(
    x_ptr, w_ptr, w_sf_ptr, source, expert_rows, m, K4, sf_tiles,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """[BM, BN] fp32: rows of weights, decoded, times rows of decoded tokens.

    `sf_tiles` is the number of tiles of scales along K, K / 64 rounded up.
    """
    WORDS: tl.constexpr = BK // 4  # of four codes
    word = tl.arange(0, WORDS)
    column = tl.arange(0, BK // 16)
    w = w_ptr.to(tl.pointer_type(tl.uint16)) + expert_rows * K4
    w += m[:, None] * K4 + word[None, :]
    w_sf = w_sf_ptr + expert_rows * (K4 // 4)
    # Quotients: after shifts the compiler spills a tile's registers for sm_80 and sm_89.
    w_sf += tiled_scale_offset(m[:, None], (column // 4)[None, :], (column % 4)[None, :], sf_tiles)
    x = x_ptr + source[None, :] * (4 * K4) + word[:, None]

    acc = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K4, WORDS, num_stages=STAGES):
        if EVEN:
            codes = tl.load(w)
            sf = tl.load(w_sf)
            x0 = tl.load(x)
            x1 = tl.load(x + K4)
            x2 = tl.load(x + 2 * K4)
            x3 = tl.load(x + 3 * K4)
        else:
            inside = word < K4 - k
            codes = tl.load(w, inside[None, :], other=0)
            sf = tl.load(w_sf, (column // 4 < sf_tiles - k // 16)[None, :], other=0)
            sf = tl.where((column < (K4 - k) // 4)[None, :], sf, 0)  # padding may hold NaN
            x0 = tl.load(x, inside[:, None], other=0.0)
            x1 = tl.load(x + K4, inside[:, None], other=0.0)
            x2 = tl.load(x + 2 * K4, inside[:, None], other=0.0)
            x3 = tl.load(x + 3 * K4, inside[:, None], other=0.0)
        if ARCH == 0:  # the interpreter multiplies the bit patterns of bf16
            x0, x1, x2, x3 = _as_fp32(x0, x1, x2, x3)
        scale = operand_scale(sf)
        scale = tl.broadcast_to(scale[:, :, None], (BM, BK // 16, 4)).reshape(BM, WORDS)
        acc = tl.dot(scaled(decode_fourth(codes, 0, ARCH), scale, ARCH), x0, acc)
        acc = tl.dot(scaled(decode_fourth(codes, 1, ARCH), scale, ARCH), x1, acc)
        acc = tl.dot(scaled(decode_fourth(codes, 2, ARCH), scale, ARCH), x2, acc)
        acc = tl.dot(scaled(decode_fourth(codes, 3, ARCH), scale, ARCH), x3, acc)
        w += WORDS
        w_sf += BK // 64 * 512
        x += WORDS
    return acc * 256.0


@triton.jit
def decoded_sums(
    x_ptr, w_ptr, source, rows, m, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """Sum products of weights that were decoded before, their columns in the order of the tokens'."""
    column = tl.arange(0, BK)
    w = w_ptr + rows * K + m[:, None] * K + column[None, :]
    x = x_ptr + source[None, :] * K + column[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    for _ in tl.range(0, K, BK, num_stages=STAGES):  # BK divides K
        a = tl.load(w)
        b = tl.load(x)
        if ARCH == 0:  # the interpreter multiplies the bit patterns of bf16
            acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
        else:
            acc = tl.dot(a, b, acc)
        w += BK
        x += BK
    return acc * 256.0


@triton.jit
def _as_fp32(a, b, c, d):
    return a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32)


@triton.jit
def native_sums(
    x_ptr, x_sf, w_ptr, w_sf_ptr, source, expert_rows, m, K, sf_tiles,
    X_SF_STEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Sum products of codes by the block-scaled MMA.

    `x_sf` points to the first scales of the tokens, [BN, BK / 16]; those of the next BK columns are
    X_SF_STEP further.
    """
    HALF: tl.constexpr = BK // 2
    byte = tl.arange(0, HALF)
    column = tl.arange(0, BK // 16)
    w = w_ptr + expert_rows * (K // 2) + m[:, None] * (K // 2) + byte[None, :]
    w_sf = w_sf_ptr + expert_rows * (K // 16)
    w_sf += tiled_scale_offset(m[:, None], (column // 4)[None, :], (column % 4)[None, :], sf_tiles)
    x = x_ptr + source[None, :] * (K // 2) + byte[:, None]

    acc = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        inside = byte < (K - k) // 2
        inside_sf = column < (K - k) // 16
        w_codes = tl.load(w, inside[None, :], other=0)
        w_scale = tl.load(w_sf, inside_sf[None, :], other=0).to(tl.float8e4nv, bitcast=True)
        x_codes = tl.load(x, inside[:, None], other=0)
        x_scale = tl.load(x_sf, inside_sf[None, :], other=0).to(tl.float8e4nv, bitcast=True)
        acc = tl.dot_scaled(w_codes, w_scale, "e2m1", x_codes, x_scale, "e2m1", acc)
        w += HALF
        w_sf += BK // 64 * 512
        x += HALF
        x_sf += X_SF_STEP
    return acc
