"""The dense GEMM for sm_90: one expert whose weights have their rows in natural order, and any number.

The ring, its pipeline, and so the order of a sum are those of `grouped_gemm.py`. Tiles follow from the
sizes alone, so that no table of them is read.

Programs get equal shares of the work, where tiles are more than programs and no multiple of them. They
take whole tiles in turn, and of what is left, between one and two tiles each, equal ranges of steps. So
a tile may be begun by one program and ended by the next one, which goes on from the first one's sums.
The order of a sum stays the same. The beginning of a tile comes first in a program, and the end of
another one last: nobody waits for a program that waits. Where the GPU has no room for all programs at
once, that needs them to begin in the order of their numbers, which CUDA does not promise.
"""

# SPDX-License-Identifier: Apache-2.0
from ...jit.arithmetic import to_bf16
from ...jit.pdl import await_previous
from .fragments import WORDS, warps_of
from .gluon import block_barrier, fence_async_shared, gl, gluon, mbarrier
from .grouped_gemm import (
    allocate_tokens,
    count_of,
    fill_ring,
    narrower,
    no_sums,
    parts_of,
    power_of_2,
    results_layout,
    ring_sums,
    sums_layout,
    tokens_at_once,
    tokens_before,
    width_of,
)


@gluon.jit
def _share(total, steps, SHARED: gl.constexpr):
    """Return a program's (whole tiles in turn, first step, step behind the last) of what is left."""
    programs = gl.num_programs(0)
    if SHARED:
        turns = total // programs - 1
        left = (total - turns * programs).to(gl.int64) * steps
        begin = (left * gl.program_id(0) // programs).to(gl.int32)
        end = (left * (gl.program_id(0) + 1) // programs).to(gl.int32)
    else:
        turns = (total - gl.program_id(0) + programs - 1) // programs
        begin = 0
        end = 0
    return turns, begin, end


@gluon.jit
def _pieces(turns, begin, end, steps):
    """Return how many pieces a program has: the beginning of a tile, whole tiles, the end of one."""
    return (end % steps > 0).to(gl.int32) + turns + end // steps - begin // steps


@gluon.jit
def _piece(j, turns, begin, end, steps, SHARED: gl.constexpr):
    """Return (tile, first step, step behind the last) of piece j of a program."""
    if SHARED:
        begun = (end % steps > 0).to(gl.int32)
        behind = j - begun - turns  # from 0: tiles of what is left, from the last
        in_turn = (j >= begun) & (behind < 0)
        left = end // steps - gl.where(j < begun, 0, 1 + behind)
        tile = gl.where(
            in_turn,
            gl.program_id(0) + (j - begun) * gl.num_programs(0),
            turns * gl.num_programs(0) + left,
        )
        ends = (behind >= 0) & (left == begin // steps)
        from_step = gl.where(ends, begin % steps, 0)
        to_step = gl.where(j < begun, end % steps, steps)
    else:
        tile = gl.program_id(0) + j * gl.num_programs(0)
        from_step = 0
        to_step = steps
    return tile, from_step, to_step


@gluon.jit
def _tokens_of(tile, strips, M, WIDTHS: gl.constexpr):
    """Return (first token, tokens from there) of a tile."""
    first = tile // strips * width_of(WIDTHS, 0)
    return first, gl.minimum(M - first, width_of(WIDTHS, 0))


@gluon.jit
def _produce_dense(
    x_desc, w_desc, sf_desc, x_bufs, w_bufs, sf_bufs, full, empty, M, total, strips, steps,
    SHARED: gl.constexpr, WIDTHS: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
    ARCH: gl.constexpr,
):  # fmt: skip
    R: gl.constexpr = w_desc.block_shape[0]
    await_previous(ARCH)
    stage = 0
    phase = 1
    turns, begin, end = _share(total, steps, SHARED)
    for j in range(_pieces(turns, begin, end, steps)):
        tile, from_step, to_step = _piece(j, turns, begin, end, steps, SHARED)
        first, tokens = _tokens_of(tile, strips, M, WIDTHS)
        for i in gl.static_range(count_of(WIDTHS)):
            if (tokens <= width_of(WIDTHS, i)) & (tokens > narrower(WIDTHS, i)):
                stage, phase = fill_ring(
                    x_desc, w_desc, sf_desc, x_bufs, w_bufs, sf_bufs, full, empty, stage, phase,
                    tile % strips * R, first, from_step, to_step, width_of(WIDTHS, i), STAGES,
                    GROUPS,
                )  # fmt: skip


@gluon.jit
def _places(
    ptr, program, R: gl.constexpr, FROM: gl.constexpr, N: gl.constexpr, WIDEST: gl.constexpr
):
    """Return where sums [R, N] of a program, of tokens from FROM of a tile, are handed over."""
    m = gl.arange(0, R, layout=gl.SliceLayout(1, sums_layout(R, N)))
    n = gl.arange(0, N, layout=gl.SliceLayout(0, sums_layout(R, N)))
    first = ptr + program * R * WIDEST + R * FROM
    return first + gl.expand_dims(m * N, 1) + gl.expand_dims(n, 0)


@gluon.jit
def _begun_part(
    sums_ptr, program, from_step, R: gl.constexpr, FROM: gl.constexpr, N: gl.constexpr,
    WIDEST: gl.constexpr,
):  # fmt: skip
    """Load sums [R, N] of a program, of tokens from FROM of a tile; zeros at a tile's first step."""
    # No branch: ptxas serializes the wgmma behind one. And not from a multiprocessor's own cache, where
    # the stores of no other are.
    taken = gl.full((R, N), from_step, gl.int32, layout=sums_layout(R, N)) > 0
    places = _places(sums_ptr, program, R, FROM, N, WIDEST)
    return gl.load(places, taken, other=0.0, cache_modifier=".cg")


@gluon.jit
def _begun(
    sums_ptr, ready_ptr, from_step, R: gl.constexpr, PARTS: gl.constexpr, WIDEST: gl.constexpr
):
    """Return the sums of a tile before `from_step`, which the program before has made."""
    before = gl.program_id(0) - 1
    if from_step > 0:
        while gl.atomic_add(ready_ptr + before, 0, sem="acquire", scope="gpu") == 0:
            pass
    sums = ()  # type: tuple
    for i in gl.static_range(count_of(PARTS)):
        of_part = _begun_part(
            sums_ptr, before, from_step, R, tokens_before(PARTS, i), width_of(PARTS, i), WIDEST
        )
        sums = sums + (of_part,)  # noqa: RUF005, Triton has no star
    return sums


@gluon.jit
def _hand_over(sums, sums_ptr, ready_ptr, PARTS: gl.constexpr, WIDEST: gl.constexpr):
    """Give sums of the beginning of a tile to the next program."""
    R: gl.constexpr = sums[0].shape[0]
    for i in gl.static_range(count_of(PARTS)):
        gl.store(
            _places(
                sums_ptr, gl.program_id(0), R, tokens_before(PARTS, i), width_of(PARTS, i), WIDEST
            ),
            sums[i],
        )
    block_barrier()  # every warp has stored before one tells
    gl.atomic_xchg(ready_ptr + gl.program_id(0), 1, sem="release", scope="gpu")


@gluon.jit
def clear_kernel(ready_ptr, programs, SIZE: gl.constexpr, ARCH: gl.constexpr):
    """Say that no sums are handed over yet."""
    await_previous(ARCH)
    i = gl.arange(0, SIZE, layout=gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(ready_ptr + i, 0, i < programs)


@gluon.jit
def _finish_dense(
    acc, alpha_buf, alpha, out_ptr, strip, first, end, N,
    FROM: gl.constexpr, BY_ROW: gl.constexpr, ARCH: gl.constexpr,
):  # fmt: skip
    """Multiply sums [R, tokens], of tokens from FROM of the tile, by alpha; round and store them.

    Only tokens from `first` up to `end` and columns below N are stored.
    """
    R: gl.constexpr = acc.shape[0]
    TOKENS: gl.constexpr = acc.shape[1]
    AT_ONCE: gl.constexpr = tokens_at_once(R, out_ptr.dtype.element_ty.primitive_bitwidth, TOKENS)
    if TOKENS > AT_ONCE:
        halves = gl.permute(gl.reshape(acc, (R, 2, TOKENS // 2)), (0, 2, 1))
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
        OUT: gl.constexpr = results_layout(R, R)
        y = gl.convert_layout(y, OUT)
        row = first + FROM + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, OUT))
        column = strip * R + gl.arange(0, R, layout=gl.SliceLayout(1, OUT))
        out = out_ptr + gl.expand_dims(row.to(gl.int64) * N, 0) + gl.expand_dims(column, 1)
        gl.store(out, y, gl.expand_dims(row < end, 0) & gl.expand_dims(column < N, 1))


@gluon.jit
def _finish_parts(
    sums, alpha_buf, alpha, out_ptr, strip, first, end, N,
    PARTS: gl.constexpr, BY_ROW: gl.constexpr, ARCH: gl.constexpr,
):  # fmt: skip
    for i in gl.static_range(count_of(PARTS)):
        _finish_dense(
            sums[i], alpha_buf, alpha, out_ptr, strip, first, end, N, tokens_before(PARTS, i), BY_ROW,
            ARCH,
        )  # fmt: skip


@gluon.jit
def _consume_dense(
    x_bufs, w_bufs, sf_bufs, alpha_buf, full, empty, alpha_ptr, out_ptr, sums_ptr, ready_ptr, M, N,
    total, strips, steps, BY_ROW: gl.constexpr, WIDTHS: gl.constexpr, STAGES: gl.constexpr,
    GROUPS: gl.constexpr, ARCH: gl.constexpr,
):  # fmt: skip
    R: gl.constexpr = w_bufs.shape[1]
    WIDEST: gl.constexpr = width_of(WIDTHS, 0)
    SHARED: gl.constexpr = sums_ptr is not None
    stage = 0
    phase = 0
    if alpha_ptr is None or BY_ROW:
        alpha = None
    else:
        alpha = gl.load(alpha_ptr)
    turns, begin, end = _share(total, steps, SHARED)
    for j in range(_pieces(turns, begin, end, steps)):
        tile, from_step, to_step = _piece(j, turns, begin, end, steps, SHARED)
        first, tokens = _tokens_of(tile, strips, M, WIDTHS)
        if BY_ROW:  # on its way while the sums are made
            n = gl.arange(
                0, power_of_2(WIDEST), layout=gl.BlockedLayout([1], [32], [warps_of(R)], [0])
            )
            of_token = gl.load(alpha_ptr + first + n, n < tokens, other=0.0)
        else:
            of_token = None
        for i in gl.static_range(count_of(WIDTHS)):
            if (tokens <= width_of(WIDTHS, i)) & (tokens > narrower(WIDTHS, i)):
                PARTS: gl.constexpr = parts_of(width_of(WIDTHS, i))
                if SHARED:
                    sums = _begun(sums_ptr, ready_ptr, from_step, R, PARTS, WIDEST)
                else:
                    sums = no_sums(R, PARTS)
                sums, stage, phase = ring_sums(
                    sums, x_bufs, w_bufs, sf_bufs, full, empty, stage, phase, to_step - from_step,
                    PARTS, STAGES, GROUPS, upper=tile % strips % 2 > 0,
                )  # fmt: skip
                if BY_ROW:
                    alpha_buf.store(of_token)
                if SHARED:
                    if to_step < steps:
                        _hand_over(sums, sums_ptr, ready_ptr, PARTS, WIDEST)
                    else:
                        _finish_parts(
                            sums, alpha_buf, alpha, out_ptr, tile % strips, first, first + tokens, N,
                            PARTS, BY_ROW, ARCH,
                        )  # fmt: skip
                else:
                    _finish_parts(
                        sums, alpha_buf, alpha, out_ptr, tile % strips, first, first + tokens, N,
                        PARTS, BY_ROW, ARCH,
                    )  # fmt: skip


@gluon.jit(do_not_specialize=["M"])
def dense_gemm_kernel(
    x_desc,  # [M, >= K] bf16, columns in the order of `fragments.py`; box [<= tokens, 64]
    w_desc,  # [N, K / 8] int32, words of 8 codes; box [R, WORDS], which gives 0 beyond both sizes
    sf_desc,  # [N / 128, K / 64, 128] int32, 128x4, sizes rounded up; box [1, 2, 128]
    alpha_ptr,  # fp32 [1], with BY_ROW [M]; or None
    out_ptr,  # [M, N] bf16 or fp16
    sums_ptr,  # [programs, R * WIDTHS[0]] fp32: sums that are handed over; None: no tile is shared
    ready_ptr,  # [programs] int32 of `clear_kernel`: 1 once they are there; or None
    M,  # rows of a, the tokens
    N,  # rows of b
    K,  # 64 divides it
    BY_ROW: gl.constexpr,
    WIDTHS: gl.constexpr,  # tokens of a tile, from the widest
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,  # of 128 columns, in a stage
    ARCH: gl.constexpr,
):
    R: gl.constexpr = w_desc.block_shape[0]  # rows of weights of a tile: 128, or 64
    WIDEST: gl.constexpr = width_of(WIDTHS, 0)
    x_bufs = allocate_tokens(x_desc, STAGES * GROUPS * 2, WIDEST)
    w_bufs = gl.allocate_shared_memory(gl.int32, [STAGES * GROUPS, R, WORDS], w_desc.layout)
    sf_bufs = gl.allocate_shared_memory(gl.int32, [STAGES * GROUPS, 1, 2, 128], sf_desc.layout)
    alpha_buf = gl.allocate_shared_memory(
        gl.float32, [power_of_2(WIDEST)], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    await_previous(ARCH)
    strips = (N + R - 1) // R
    total = strips * ((M + WIDEST - 1) // WIDEST)
    steps = (K + GROUPS * 128 - 1) // (GROUPS * 128)
    SHARED: gl.constexpr = sums_ptr is not None
    # The consumers are the default partition: ptxas serializes the wgmma of any other.
    gl.warp_specialize(
        [
            (
                _consume_dense,
                (
                    x_bufs, w_bufs, sf_bufs, alpha_buf, full, empty, alpha_ptr, out_ptr, sums_ptr,
                    ready_ptr, M, N, total, strips, steps, BY_ROW, WIDTHS, STAGES, GROUPS, ARCH,
                ),
            ),
            (
                _produce_dense,
                (
                    x_desc, w_desc, sf_desc, x_bufs, w_bufs, sf_bufs, full, empty, M, total, strips,
                    steps, SHARED, WIDTHS, STAGES, GROUPS, ARCH,
                ),
            ),
        ],
        [1],
        [24],
    )  # fmt: skip
