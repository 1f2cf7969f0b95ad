"""The grouped GEMM of the experts: NVFP4 weights in the production layout, tokens on the MMA's N side.

A program owns BM rows of one expert's weights, as they lie in memory, and up to BN of its tokens. The
weights' rows are the MMA's A operand: codes are decoded into bf16 in registers, exactly (e2m1 times
e4m3 has at most 6 significant bits), and the accumulator's rows are put back into their natural order
(`reference/shuffle.py`) once, in the epilogue. The tokens come decoded, their even columns apart from
the odd ones, so that the low nibbles of a tile of codes multiply the first and the high ones the second
and no element has to change place. On Blackwell both operands stay codes and `tl.dot_scaled` is the
hardware's own block-scaled MMA.
"""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl

from .leaves import e4m3_decode, to_bf16

# reference.activation.ActivationType
GELU, RELU, SILU, SWIGLU, GEGLU = (tl.constexpr(i) for i in range(5))
RELU2, SWIGLU_STEP, GEGLU_TANH, IDENTITY, SITU = (tl.constexpr(i) for i in range(6, 11))
NONE = tl.constexpr(-1)  # the second GEMM


@triton.jit
def decode_pairs(codes, ARCH: tl.constexpr):
    """uint8 codes to (low nibbles, high nibbles), values times 2^-126: bf16, fp32 in the interpreter."""
    if ARCH == 0:
        byte = codes.to(tl.int32)
        low = ((byte & 7) << 6) | ((byte & 8) << 12)
        high = ((byte & 0x70) << 2) | ((byte & 0x80) << 8)
        return (low << 16).to(tl.float32, bitcast=True), (high << 16).to(tl.float32, bitcast=True)
    # Exponent and significand of a code stand where those of bf16 do; two codes at a time.
    return tl.inline_asm_elementwise(
        """{ .reg .b32 v, s, t;
        prmt.b32 v, $4, 0, 0x1100;
        shl.b32 s, v, 6; and.b32 s, s, 0x01C001C0; shl.b32 t, v, 4; and.b32 t, t, 0x80008000;
        or.b32 $0, s, t;
        shl.b32 s, v, 2; and.b32 s, s, 0x01C001C0; and.b32 t, v, 0x80008000; or.b32 $2, s, t;
        prmt.b32 v, $4, 0, 0x3322;
        shl.b32 s, v, 6; and.b32 s, s, 0x01C001C0; shl.b32 t, v, 4; and.b32 t, t, 0x80008000;
        or.b32 $1, s, t;
        shl.b32 s, v, 2; and.b32 s, s, 0x01C001C0; and.b32 t, v, 0x80008000; or.b32 $3, s, t; }""",
        "=r,=r,=r,=r,r",
        [codes],
        (tl.bfloat16, tl.bfloat16),
        True,
        4,
    )


@triton.jit
def _times(a, b, ARCH: tl.constexpr):
    """Decoded codes times bf16 scales, exactly."""
    if ARCH == 0:
        product = a * b.to(tl.float32)
    else:
        product = a * b
    return product


@triton.jit
def _block_scale_offset(row, column, columns):
    """128x4 (`reference/layouts.py`), columns a multiple of 4."""
    tile = (row // 128) * (columns // 4) + column // 4
    return tile * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + column % 4


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
def expert_gemm_kernel(
    x_ptr,  # [N, 2, K/2] bf16: even columns, odd columns; with NATIVE [N, K/2] uint8
    x_sf_ptr,  # with NATIVE [N, K/16] uint8, linear
    w_ptr,  # [E, M, K/2] uint8
    w_sf_ptr,  # [E, M, K/16] uint8, 128x4
    token_scale_ptr,  # [N] fp32, or None
    bias_ptr,  # [E, M] fp32, or None
    scale_ptr,  # [E] fp32: of up, or of the result
    gate_scale_ptr,  # [E] fp32, with an activation
    alpha_ptr, beta_ptr, limit_ptr,  # [E] fp32, or None
    out_ptr,  # [rows, M / 2 or M] bf16, by permuted row
    expanded_ptr,  # [rows] int32: the expanded index, token * top_k + slot, of a permuted row
    tile_ptr,  # [2, tiles] int32: the tile's expert (-1: none), its first permuted row
    end_ptr,  # [E] int32: the expert's last permuted row, + 1
    tiles,
    M, K,
    X_DIVISOR: tl.constexpr,  # x's row is expanded index / X_DIVISOR; 0: the permuted row itself
    ACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr,
    NATIVE: tl.constexpr,  # the GPU multiplies codes
    ARCH: tl.constexpr,
):  # fmt: skip
    GATED: tl.constexpr = (
        ACT == SWIGLU or ACT == GEGLU or ACT == SWIGLU_STEP or ACT == GEGLU_TANH or ACT == SITU
    )
    tile = tl.program_id(1)
    expert = tl.load(tile_ptr + tile)
    if expert < 0:
        return
    first = tl.load(tile_ptr + tiles + tile)
    n = first + tl.arange(0, BN)
    live = n < tl.load(end_ptr + expert)
    if X_DIVISOR == 0:
        source = n
    else:
        source = tl.load(expanded_ptr + n, live, other=0) // X_DIVISOR
    source = tl.where(live, source, 0).to(tl.int64)

    m = tl.program_id(0) * BM + tl.arange(0, BM)
    HALF: tl.constexpr = BK // 2
    byte = tl.arange(0, HALF)
    expert_rows = expert.to(tl.int64) * M
    w = w_ptr + (expert_rows + m)[:, None] * (K // 2) + byte[None, :]
    column = tl.arange(0, BK // 16)
    # Tiles of 128 rows: the expert's first row is a multiple of 128.
    w_sf = w_sf_ptr + expert_rows * (K // 16)
    w_sf += _block_scale_offset(m[:, None], column[None, :], K // 16)
    x = x_ptr + source[None, :] * (K // 2 if NATIVE else K) + byte[:, None]
    if NATIVE:
        x_sf = x_sf_ptr + source[:, None] * (K // 16) + column[None, :]

    acc = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        inside = byte < (K - k) // 2  # K is a multiple of 64, not always of BK
        inside_sf = column < (K - k) // 16
        codes = tl.load(w, inside[None, :], other=0)
        sf = tl.load(w_sf, inside_sf[None, :], other=0)
        if NATIVE:
            x_codes = tl.load(x, inside[:, None], other=0)
            x_scale = tl.load(x_sf, inside_sf[None, :], other=0).to(tl.float8e4nv, bitcast=True)
            scale = sf.to(tl.float8e4nv, bitcast=True)
            acc = tl.dot_scaled(codes, scale, "e2m1", x_codes, x_scale, "e2m1", acc)
            x_sf += BK // 16
        else:
            even = tl.load(x, inside[:, None], other=0.0)
            odd = tl.load(x + K // 2, inside[:, None], other=0.0)
            if ARCH == 0:  # the interpreter multiplies the bit patterns of bf16
                even, odd = even.to(tl.float32), odd.to(tl.float32)
            # 2^118 here, 2^126 in the codes and 2^-8 at the end: all exact, nothing overflows bf16.
            scale = (e4m3_decode(sf.to(tl.int32)) * 3.3230699894622e35).to(tl.bfloat16)
            scale = tl.broadcast_to(scale[:, :, None], (BM, BK // 16, 8)).reshape(BM, HALF)
            low, high = decode_pairs(codes, ARCH)
            acc = tl.dot(_times(low, scale, ARCH), even, acc)
            acc = tl.dot(_times(high, scale, ARCH), odd, acc)
        w += HALF
        w_sf += BK // 64 * 512
        x += HALF
    if not NATIVE:
        acc = acc * 256.0

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
    tl.store(out, to_bf16(y, ARCH), live[None, :])
