"""The grouped GEMM of the experts: NVFP4 weights in the production layout, tokens on the MMA's N side.

A program owns BM rows of one expert's weights, as they lie in memory, and up to BN of its tokens.
`jit/mma.py` multiplies them; the accumulator's rows are put back into their natural order
(`reference/layouts.py`) once, in the epilogue. Where an expert has many tokens its weights are decoded
once, before.
"""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl

from ..jit.arithmetic import to_bf16
from ..jit.mma import decoded_sums, native_sums, sums
from ..jit.pdl import await_previous
from .activation import finished, is_gated


@triton.jit
def _expert_tile(
    x_ptr, x_sf_ptr, w_ptr, w_sf_ptr, token_scale_ptr, bias_ptr, scale_ptr, gate_scale_ptr,
    alpha_ptr, beta_ptr, limit_ptr, out_ptr, expanded_ptr, expert, place, first, end, M, K4,
    X_DIVISOR: tl.constexpr, ACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr, NATIVE: tl.constexpr,
    ARCH: tl.constexpr,
):  # fmt: skip
    """Compute the expert's BN permuted rows from `first`, up to `end`; `place` has decoded weights."""
    GATED: tl.constexpr = is_gated(ACT)
    n = first + tl.arange(0, BN)
    live = n < end
    K = K4 * 4
    source = tl.minimum(n, end - 1)  # a tile's columns without a row read its last row again
    if X_DIVISOR != 0:
        source = tl.load(expanded_ptr + source) // X_DIVISOR
    source = source.to(tl.int64)

    m = tl.program_id(0) * BM + tl.arange(0, BM)
    expert_rows = expert.to(tl.int64) * M  # a multiple of 128, as the tiles of scales
    if w_ptr.dtype.element_ty == tl.bfloat16:
        rows = place.to(tl.int64) * M
        acc = decoded_sums(x_ptr, w_ptr, source, rows, m, K, BM, BN, BK, STAGES, ARCH)
    elif NATIVE:
        x_sf = x_sf_ptr + source[:, None] * (K // 16) + tl.arange(0, BK // 16)[None, :]
        acc = native_sums(
            x_ptr, x_sf, w_ptr, w_sf_ptr, source, expert_rows, m, K, K // 64, BK // 16,
            BM, BN, BK, STAGES,
        )  # fmt: skip
    else:
        acc = sums(
            x_ptr, w_ptr, w_sf_ptr, source, expert_rows, m, K4, K4 // 16, BM, BN, BK, STAGES,
            EVEN, ARCH,
        )  # fmt: skip

    if token_scale_ptr is not None:
        acc = acc * tl.load(token_scale_ptr + source, live, other=0.0)[None, :]
    if bias_ptr is not None:
        acc = acc + tl.load(bias_ptr + expert_rows + m)[:, None]
    G: tl.constexpr = BM // 32
    # Within 32 rows, natural row 4a + b lies at 8b + a.
    if GATED:
        pairs = tl.permute(tl.reshape(acc, (G, 2, 2, 8, BN)), (0, 3, 1, 4, 2))
        up, gate = tl.split(tl.reshape(pairs, (BM // 2, BN, 2)))
        column = tl.program_id(0) * (BM // 2) + tl.arange(0, BM // 2)
        width = M // 2
    else:
        gate = tl.reshape(tl.permute(tl.reshape(acc, (G, 4, 8, BN)), (0, 2, 1, 3)), (BM, BN))
        up = gate
        column = m
        width = M
    y = finished(up, gate, scale_ptr, gate_scale_ptr, alpha_ptr, beta_ptr, limit_ptr, expert, ACT)
    out = out_ptr + n.to(tl.int64)[None, :] * width + column[:, None]
    if out_ptr.dtype.element_ty == tl.bfloat16:
        y = to_bf16(y, ARCH)
    tl.store(out, y, live[None, :])


@triton.jit(do_not_specialize=["first_expert", "num_experts"])
def expert_gemm_kernel(
    x_ptr,  # [N, 4, K/4] bf16: columns 0, 4, 8 ..., columns 1, 5 ...; with NATIVE [N, K/2] uint8
    x_sf_ptr,  # with NATIVE [N, K/16] uint8, linear
    w_ptr,  # [E, M, K/2] uint8, or decoded [num_experts, M, 4, K/4] bf16
    w_sf_ptr,  # [E, M, K/16] uint8, 128x4
    token_scale_ptr,  # [N] fp32, or None
    bias_ptr,  # [E, M] fp32, or None
    scale_ptr,  # [E] fp32: of up, or of the result
    gate_scale_ptr,  # [E] fp32, with an activation
    alpha_ptr,
    beta_ptr,
    limit_ptr,  # [E] fp32, or None
    out_ptr,  # [rows, M / 2 or M] bf16, or fp32 for static scales, by permuted row
    expanded_ptr,  # [rows] int32: the expanded index, token * top_k + slot, of a permuted row
    tile_ptr,  # [tiles, 4] int32: a tile's expert (-1: none), its first permuted row, its rows
    first_expert,  # of those whose tiles are worked on now
    num_experts,
    M,
    K4,  # K / 4: a multiple of 16, as K is of 64
    X_DIVISOR: tl.constexpr,  # x's row is expanded index / X_DIVISOR; 0: the permuted row itself
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,  # BK divides K
    NATIVE: tl.constexpr,  # the GPU multiplies codes
    ARCH: tl.constexpr,
):
    await_previous(ARCH)
    tile_ptr += tl.program_id(1) * 4
    expert = tl.load(tile_ptr)
    if (expert < first_expert) | (expert >= first_expert + num_experts):
        return
    first = tl.load(tile_ptr + 1)
    rows = tl.load(tile_ptr + 2)
    end = first + rows
    if BN >= 32 and not NATIVE and w_ptr.dtype.element_ty != tl.bfloat16:
        # Half as wide where that holds the rows: an expert's last tile is often nearly empty.
        half = rows <= BN // 2
        for i in tl.static_range(2):
            if half == (i == 1):
                _expert_tile(
                    x_ptr, x_sf_ptr, w_ptr, w_sf_ptr, token_scale_ptr, bias_ptr, scale_ptr,
                    gate_scale_ptr, alpha_ptr, beta_ptr, limit_ptr, out_ptr, expanded_ptr, expert,
                    expert - first_expert, first, end, M, K4, X_DIVISOR, ACT, BM, BN // (1 + i), BK,
                    STAGES, EVEN, NATIVE, ARCH,
                )  # fmt: skip
    else:
        _expert_tile(
            x_ptr, x_sf_ptr, w_ptr, w_sf_ptr, token_scale_ptr, bias_ptr, scale_ptr, gate_scale_ptr,
            alpha_ptr, beta_ptr, limit_ptr, out_ptr, expanded_ptr, expert, expert - first_expert,
            first, end, M, K4, X_DIVISOR, ACT, BM, BN, BK, STAGES, EVEN, NATIVE, ARCH,
        )  # fmt: skip
