"""The dense GEMM of NVFP4 matrices: rows of `b` are the MMA's A operand, rows of `a` its N side.

The K loops are those of the mixture of experts (`jit/mma.py`). Here rows are in their natural order,
neither M nor N need be a multiple of a tile, and block scales are read where FlashInfer's layouts have
them; what pads them is never read for its value.
"""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl

from ..jit.arithmetic import to_bf16
from ..jit.layouts import tiled_scale_offset
from ..jit.mma import decoded_sums, native_sums, sums
from ..jit.pdl import await_previous


@triton.jit(do_not_specialize=["M"])
def dense_gemm_kernel(
    x_ptr,  # a: [M, 4, K/4] bf16 of `decode_kernel`; with NATIVE codes [M, K/2] uint8
    x_sf_ptr,  # with NATIVE uint8, 128x4 or 8x4
    w_ptr,  # b: codes [N, K/2] uint8, or decoded, times 2^-8, [N, 4, K/4] bf16
    w_sf_ptr,  # uint8, 128x4; None where b is decoded
    alpha_ptr,  # fp32 [1], with BY_ROW [M]; or None
    out_ptr,  # [M, N] bf16 or fp16
    M,
    N,
    K4,  # K / 4; of decoded b and a of the padded K
    sf_tiles,  # K / 64, rounded up
    BY_ROW: tl.constexpr,
    X_TILE: tl.constexpr,  # 128 or 8: rows of a tile of a's scales
    BM: tl.constexpr,  # rows of b
    BN: tl.constexpr,  # rows of a
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,  # BK divides K
    NATIVE: tl.constexpr,  # the GPU multiplies codes
    ARCH: tl.constexpr,
):
    await_previous(ARCH)
    strips = (N + BM - 1) // BM
    column = tl.program_id(0) % strips * BM + tl.arange(0, BM)
    n = (tl.program_id(0) // strips).to(tl.int64) * BN + tl.arange(0, BN)
    live = n < M
    # Beyond the edges the first row is multiplied, and not stored.
    source = tl.where(live, n, 0)
    m = tl.where(column < N, column, 0).to(tl.int64)
    if NATIVE:
        block = tl.arange(0, BK // 16)[None, :]
        x_sf = x_sf_ptr + tiled_scale_offset(
            source[:, None], block // 4, block % 4, sf_tiles, X_TILE
        )
        acc = native_sums(
            x_ptr, x_sf, w_ptr, w_sf_ptr, source, 0, m, K4 * 4, sf_tiles, BK // 16 * X_TILE,
            BM, BN, BK, STAGES,
        )  # fmt: skip
    elif w_sf_ptr is None:
        acc = decoded_sums(x_ptr, w_ptr, source, 0, m, K4 * 4, BM, BN, BK, STAGES, ARCH)
    else:
        acc = sums(
            x_ptr, w_ptr, w_sf_ptr, source, 0, m, K4, sf_tiles, BM, BN, BK, STAGES, EVEN, ARCH
        )
    if alpha_ptr is not None:
        if BY_ROW:
            acc = acc * tl.load(alpha_ptr + source)[None, :]
        else:
            acc = acc * tl.load(alpha_ptr)
    out = out_ptr + n[None, :] * N + column[:, None]
    if out_ptr.dtype.element_ty == tl.bfloat16:
        y = to_bf16(acc, ARCH)
    else:
        y = acc.to(out_ptr.dtype.element_ty)
    tl.store(out, y, live[None, :] & (column < N)[:, None])
