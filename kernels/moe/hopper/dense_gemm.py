"""The dense GEMM for sm_90: one expert whose weights have their rows in natural order, and any number.

The ring, its pipeline, and so the order of a sum are those of `grouped_gemm.py`. Tiles follow from the
sizes alone, so that no table of them is read.
"""

# SPDX-License-Identifier: Apache-2.0
from ...jit.arithmetic import to_bf16
from ...jit.pdl import await_previous
from .fragments import ROWS, WARPS, WORDS
from .gluon import fence_async_shared, gl, gluon, mbarrier
from .grouped_gemm import (
    count_of,
    fill_ring,
    narrower,
    results_layout,
    ring_sums,
    tokens_at_once,
    width_of,
)


@gluon.jit
def _tokens_of(t, strips, M, WIDTHS: gl.constexpr):
    """Return (first token, tokens from there) of piece t of the work."""
    first = t // strips * width_of(WIDTHS, 0)
    return first, gl.minimum(M - first, width_of(WIDTHS, 0))


@gluon.jit
def _produce_dense(
    x_desc, w_desc, sf_desc, x_bufs, w_bufs, sf_bufs, full, empty, M, total, strips, steps,
    WIDTHS: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, ARCH: gl.constexpr,
):  # fmt: skip
    await_previous(ARCH)
    stage = 0
    phase = 1
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        first, tokens = _tokens_of(t, strips, M, WIDTHS)
        for i in gl.static_range(count_of(WIDTHS)):
            if (tokens <= width_of(WIDTHS, i)) & (tokens > narrower(WIDTHS, i)):
                stage, phase = fill_ring(
                    x_desc, w_desc, sf_desc, x_bufs, w_bufs, sf_bufs, full, empty, stage, phase,
                    t % strips * ROWS, first, steps, width_of(WIDTHS, i), STAGES, GROUPS,
                )  # fmt: skip


@gluon.jit
def _finish_dense(
    acc, alpha_buf, alpha, out_ptr, strip, first, end, N,
    FROM: gl.constexpr, BY_ROW: gl.constexpr, ARCH: gl.constexpr,
):  # fmt: skip
    """Multiply sums [ROWS, tokens], of tokens from FROM of the tile, by alpha; round and store them.

    Only tokens from `first` up to `end` and columns below N are stored.
    """
    TOKENS: gl.constexpr = acc.shape[1]
    AT_ONCE: gl.constexpr = tokens_at_once(
        ROWS, out_ptr.dtype.element_ty.primitive_bitwidth, TOKENS
    )
    if TOKENS > AT_ONCE:
        halves = gl.permute(gl.reshape(acc, (ROWS, 2, TOKENS // 2)), (0, 2, 1))
        low, high = gl.split(halves)
        _finish_dense(low, alpha_buf, alpha, out_ptr, strip, first, end, N, FROM, BY_ROW, ARCH)
        _finish_dense(
            high, alpha_buf, alpha, out_ptr, strip, first, end, N, FROM + TOKENS // 2, BY_ROW, ARCH
        )
    else:
        L: gl.constexpr = acc.type.layout
        acc = acc * 256.0
        if BY_ROW:
            of_token = alpha_buf.slice(FROM, TOKENS).load(gl.SliceLayout(0, L))
            acc = acc * gl.expand_dims(of_token, 0)
        elif alpha is not None:
            acc = acc * alpha
        if out_ptr.dtype.element_ty == gl.bfloat16:
            y = to_bf16(acc, ARCH)
        else:
            y = acc.to(out_ptr.dtype.element_ty)
        OUT: gl.constexpr = results_layout(ROWS)
        y = gl.convert_layout(y, OUT)
        row = first + FROM + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, OUT))
        column = strip * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
        out = out_ptr + gl.expand_dims(row.to(gl.int64) * N, 0) + gl.expand_dims(column, 1)
        gl.store(out, y, gl.expand_dims(row < end, 0) & gl.expand_dims(column < N, 1))


@gluon.jit
def _consume_dense(
    x_bufs, w_bufs, sf_bufs, alpha_buf, full, empty, alpha_ptr, out_ptr, M, N, total, strips, steps,
    BY_ROW: gl.constexpr, WIDTHS: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
    ARCH: gl.constexpr,
):  # fmt: skip
    stage = 0
    phase = 0
    if alpha_ptr is None or BY_ROW:
        alpha = None
    else:
        alpha = gl.load(alpha_ptr)
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        first, tokens = _tokens_of(t, strips, M, WIDTHS)
        if BY_ROW:  # on its way while the sums are made
            WIDEST: gl.constexpr = width_of(WIDTHS, 0)
            n = gl.arange(0, WIDEST, layout=gl.BlockedLayout([1], [32], [WARPS.value], [0]))
            of_token = gl.load(alpha_ptr + first + n, n < tokens, other=0.0)
        else:
            of_token = None
        for i in gl.static_range(count_of(WIDTHS)):
            if (tokens <= width_of(WIDTHS, i)) & (tokens > narrower(WIDTHS, i)):
                acc, stage, phase = ring_sums(
                    x_bufs, w_bufs, sf_bufs, full, empty, stage, phase, steps,
                    width_of(WIDTHS, i), STAGES, GROUPS,
                )  # fmt: skip
                if BY_ROW:
                    alpha_buf.store(of_token)
                _finish_dense(
                    acc, alpha_buf, alpha, out_ptr, t % strips, first, first + tokens, N, 0, BY_ROW,
                    ARCH,
                )  # fmt: skip


@gluon.jit(do_not_specialize=["M"])
def dense_gemm_kernel(
    x_desc,  # [M, >= K] bf16, columns in the order of `fragments.py`; box [<= tokens, 64]
    w_desc,  # [N, K / 8] int32, words of 8 codes; box [ROWS, WORDS], which gives 0 beyond both sizes
    sf_desc,  # [N / ROWS, K / 64, 128] int32, 128x4, sizes rounded up; box [1, 2, 128]
    alpha_ptr,  # fp32 [1], with BY_ROW [M]; or None
    out_ptr,  # [M, N] bf16 or fp16
    M,  # rows of a, the tokens
    N,  # rows of b
    K,  # 64 divides it
    BY_ROW: gl.constexpr,
    WIDTHS: gl.constexpr,  # tokens of a tile, from the widest
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,  # of 128 columns, in a stage
    ARCH: gl.constexpr,
):
    WIDEST: gl.constexpr = width_of(WIDTHS, 0)
    x_bufs = gl.allocate_shared_memory(
        gl.bfloat16, [STAGES * GROUPS * 2, WIDEST, 64], x_desc.layout
    )
    w_bufs = gl.allocate_shared_memory(gl.int32, [STAGES * GROUPS, ROWS, WORDS], w_desc.layout)
    sf_bufs = gl.allocate_shared_memory(gl.int32, [STAGES * GROUPS, 1, 2, 128], sf_desc.layout)
    alpha_buf = gl.allocate_shared_memory(
        gl.float32, [WIDEST], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    await_previous(ARCH)
    strips = (N + ROWS - 1) // ROWS
    total = strips * ((M + WIDEST - 1) // WIDEST)
    steps = (K + GROUPS * 128 - 1) // (GROUPS * 128)
    # The consumers are the default partition: ptxas serializes the wgmma of any other.
    gl.warp_specialize(
        [
            (
                _consume_dense,
                (
                    x_bufs, w_bufs, sf_bufs, alpha_buf, full, empty, alpha_ptr, out_ptr, M, N, total,
                    strips, steps, BY_ROW, WIDTHS, STAGES, GROUPS, ARCH,
                ),
            ),
            (
                _produce_dense,
                (
                    x_desc, w_desc, sf_desc, x_bufs, w_bufs, sf_bufs, full, empty, M, total, strips,
                    steps, WIDTHS, STAGES, GROUPS, ARCH,
                ),
            ),
        ],
        [1],
        [24],
    )  # fmt: skip
