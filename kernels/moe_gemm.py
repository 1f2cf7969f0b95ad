"""The grouped GEMM of the experts: NVFP4 weights in the production layout, tokens on the MMA's N side.

A program owns BM rows of one expert's weights, as they lie in memory, and up to BN of its tokens. The
weights' rows are the MMA's A operand: codes are decoded into bf16 in registers, exactly (e2m1 times
e4m3 has at most 6 significant bits), and the accumulator's rows are put back into their natural order
(`reference/shuffle.py`) once, in the epilogue. The tokens come decoded, each fourth column together, so
that each nibble of a tile of 16-bit words multiplies a tile of its own and no element has to change
place. Where an expert has many tokens its weights are decoded once, before, and both operands come from
shared memory. On Blackwell both stay codes and `tl.dot_scaled` is the hardware's own block-scaled MMA.
"""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl

from .leaves import await_previous, decode_fourth, operand_scale, scaled, to_bf16

# reference.activation.ActivationType
GELU, RELU, SILU, SWIGLU, GEGLU = (tl.constexpr(i) for i in range(5))
RELU2, SWIGLU_STEP, GEGLU_TANH, IDENTITY, SITU = (tl.constexpr(i) for i in range(6, 11))
NONE = tl.constexpr(-1)  # the second GEMM


@triton.jit
def _scale_offset(row, column, words):
    """128x4 (`reference/layouts.py`); `words` is K / 64, the tiles that 128 rows have."""
    tile = (row // 128) * words + column // 4
    return tile * 512 + (row % 32) * 16 + row % 128 // 32 * 4 + column % 4


@triton.jit
def _activation(up, gate, scale, gate_scale, alpha, beta, limit, ACT: tl.constexpr):
    """`reference.activation.activate`; of activations without a gate, `gate` is the argument."""
    if ACT == SWIGLU_STEP:
        g = gate * gate_scale
        g = tl.minimum(g / (1.0 + tl.exp(-g)), limit * gate_scale)
        y = g * (tl.minimum(tl.maximum(up, -limit), limit) * scale)
    elif ACT == SWIGLU:
        u = tl.minimum(tl.maximum(up, -limit), limit) * scale
        g = tl.minimum(gate, limit) * gate_scale
        y = g / (1.0 + tl.exp(-alpha * g)) * (u + beta)
    elif ACT == SITU:
        u = tl.minimum(tl.maximum(up, -limit), limit) * gate_scale
        g = tl.minimum(gate, limit) * gate_scale
        y = beta * _tanh(u / beta) * (alpha * _tanh(g / alpha) / (1.0 + tl.exp(-g))) * scale
    elif ACT == GEGLU:
        y = _gelu(gate * gate_scale) * (up * scale)
    elif ACT == GEGLU_TANH:
        g = gate * gate_scale
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        y = 0.5 * g * (1.0 + _tanh(inner)) * (up * scale)
    else:
        g = gate * gate_scale
        if ACT == RELU:
            g = tl.maximum(g, 0.0)
        elif ACT == RELU2:
            g = tl.maximum(g, 0.0)
            g = g * g
        elif ACT == SILU:
            g = g / (1.0 + tl.exp(-g))
        elif ACT == GELU:
            g = _gelu(g)
        y = g * scale
    return y


@triton.jit
def _tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _per_expert(ptr, expert, default: tl.constexpr):
    """One fp32 an expert, or the default where there is no tensor."""
    if ptr is None:
        value = default
    else:
        value = tl.load(ptr + expert)
    return value


@triton.jit
def _sums(
    x_ptr, w_ptr, w_sf_ptr, source, expert_rows, m, K4,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """[BM, BN] fp32: rows of weights, decoded, times rows of decoded tokens."""
    WORDS: tl.constexpr = BK // 4  # of four codes
    word = tl.arange(0, WORDS)
    column = tl.arange(0, BK // 16)
    w = w_ptr.to(tl.pointer_type(tl.uint16)) + expert_rows * K4
    w += m[:, None] * K4 + word[None, :]
    w_sf = w_sf_ptr + expert_rows * (K4 // 4)
    w_sf += _scale_offset(m[:, None], column[None, :], K4 // 16)
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
        else:  # K is a multiple of 64
            inside = word < K4 - k
            codes = tl.load(w, inside[None, :], other=0)
            sf = tl.load(w_sf, (column // 4 < (K4 - k) // 16)[None, :], other=0)
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
def _decoded_sums(
    x_ptr, w_ptr, source, rows, m, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """The same of weights that were decoded before, columns in the order of the tokens'."""
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
def _native_sums(
    x_ptr, x_sf_ptr, w_ptr, w_sf_ptr, source, expert_rows, m, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same of codes, by the block-scaled MMA."""
    HALF: tl.constexpr = BK // 2
    byte = tl.arange(0, HALF)
    column = tl.arange(0, BK // 16)
    w = w_ptr + expert_rows * (K // 2) + m[:, None] * (K // 2) + byte[None, :]
    w_sf = w_sf_ptr + expert_rows * (K // 16)
    w_sf += _scale_offset(m[:, None], column[None, :], K // 64)
    x = x_ptr + source[None, :] * (K // 2) + byte[:, None]
    x_sf = x_sf_ptr + source[:, None] * (K // 16) + column[None, :]

    acc = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        inside = byte < (K - k) // 2  # K is a multiple of 64
        inside_sf = column < (K - k) // 16
        w_codes = tl.load(w, inside[None, :], other=0)
        w_scale = tl.load(w_sf, inside_sf[None, :], other=0).to(tl.float8e4nv, bitcast=True)
        x_codes = tl.load(x, inside[:, None], other=0)
        x_scale = tl.load(x_sf, inside_sf[None, :], other=0).to(tl.float8e4nv, bitcast=True)
        acc = tl.dot_scaled(w_codes, w_scale, "e2m1", x_codes, x_scale, "e2m1", acc)
        w += HALF
        w_sf += BK // 64 * 512
        x += HALF
        x_sf += BK // 16
    return acc


@triton.jit
def _expert_tile(
    x_ptr, x_sf_ptr, w_ptr, w_sf_ptr, token_scale_ptr, bias_ptr, scale_ptr, gate_scale_ptr,
    alpha_ptr, beta_ptr, limit_ptr, out_ptr, expanded_ptr, expert, place, first, end, M, K4,
    X_DIVISOR: tl.constexpr, ACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr, NATIVE: tl.constexpr,
    ARCH: tl.constexpr,
):  # fmt: skip
    """The expert's permuted rows from `first`, BN of them, up to `end`; decoded weights at `place`."""
    GATED: tl.constexpr = (
        ACT == SWIGLU or ACT == GEGLU or ACT == SWIGLU_STEP or ACT == GEGLU_TANH or ACT == SITU
    )
    n = first + tl.arange(0, BN)
    live = n < end
    K = K4 * 4
    if X_DIVISOR == 0:
        source = n
    else:
        source = tl.load(expanded_ptr + n, live, other=0) // X_DIVISOR
    source = tl.where(live, source, 0).to(tl.int64)

    m = tl.program_id(0) * BM + tl.arange(0, BM)
    expert_rows = expert.to(tl.int64) * M  # a multiple of 128, as the tiles of scales
    if w_ptr.dtype.element_ty == tl.bfloat16:
        rows = place.to(tl.int64) * M
        acc = _decoded_sums(x_ptr, w_ptr, source, rows, m, K, BM, BN, BK, STAGES, ARCH)
    elif NATIVE:
        acc = _native_sums(
            x_ptr, x_sf_ptr, w_ptr, w_sf_ptr, source, expert_rows, m, K, BM, BN, BK, STAGES
        )
    else:
        acc = _sums(
            x_ptr, w_ptr, w_sf_ptr, source, expert_rows, m, K4, BM, BN, BK, STAGES, EVEN, ARCH
        )

    if token_scale_ptr is not None:
        acc = acc * tl.load(token_scale_ptr + source, live, other=0.0)[None, :]
    if bias_ptr is not None:
        acc = acc + tl.load(bias_ptr + expert_rows + m)[:, None]
    scale = tl.load(scale_ptr + expert)
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
    if ACT == NONE:
        y = gate * scale
    else:
        gate_scale = tl.load(gate_scale_ptr + expert)
        alpha = _per_expert(alpha_ptr, expert, 1.0)
        beta = _per_expert(beta_ptr, expert, 1.0 if ACT == SITU else 0.0)
        limit = _per_expert(limit_ptr, expert, 3.0e38)
        if ACT == SWIGLU_STEP and limit_ptr is None:
            limit = 7.0 / gate_scale
        y = _activation(up, gate, scale, gate_scale, alpha, beta, limit, ACT)
    out = out_ptr + n.to(tl.int64)[None, :] * width + column[:, None]
    if out_ptr.dtype.element_ty == tl.bfloat16:
        y = to_bf16(y, ARCH)
    tl.store(out, y, live[None, :])


@triton.jit(do_not_specialize=["first_expert", "num_experts", "tiles"])
def expert_gemm_kernel(
    x_ptr,  # [N, 4, K/4] bf16: columns 0, 4, 8 ..., columns 1, 5 ...; with NATIVE [N, K/2] uint8
    x_sf_ptr,  # with NATIVE [N, K/16] uint8, linear
    w_ptr,  # [E, M, K/2] uint8, or decoded [num_experts, M, 4, K/4] bf16
    w_sf_ptr,  # [E, M, K/16] uint8, 128x4
    token_scale_ptr,  # [N] fp32, or None
    bias_ptr,  # [E, M] fp32, or None
    scale_ptr,  # [E] fp32: of up, or of the result
    gate_scale_ptr,  # [E] fp32, with an activation
    alpha_ptr, beta_ptr, limit_ptr,  # [E] fp32, or None
    out_ptr,  # [rows, M / 2 or M] bf16, or fp32 for static scales, by permuted row
    expanded_ptr,  # [rows] int32: the expanded index, token * top_k + slot, of a permuted row
    tile_ptr,  # [2, tiles] int32: the tile's expert (-1: none), its first permuted row
    end_ptr,  # [E] int32: the expert's last permuted row, + 1
    first_expert,  # of those whose tiles are worked on now
    num_experts,
    tiles,
    M,
    K4,  # K / 4: a multiple of 16, as K is of 64
    X_DIVISOR: tl.constexpr,  # x's row is expanded index / X_DIVISOR; 0: the permuted row itself
    ACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,  # BK divides K
    NATIVE: tl.constexpr,  # the GPU multiplies codes
    ARCH: tl.constexpr,
):  # fmt: skip
    await_previous(ARCH)
    tile = tl.program_id(1)
    expert = tl.load(tile_ptr + tile)
    if (expert < first_expert) | (expert >= first_expert + num_experts):
        return
    first = tl.load(tile_ptr + tiles + tile)
    end = tl.load(end_ptr + expert)
    if BN >= 32 and not NATIVE and w_ptr.dtype.element_ty != tl.bfloat16:
        # Half as wide where that holds the rows: an expert's last tile is often nearly empty.
        half = end - first <= BN // 2
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
