"""The grouped GEMM for sm_90: weights decoded into the A operand of wgmma, tokens on its N side.

Programs stay and take tile after tile: 128 rows of one expert's weights times up to WIDTHS[0] of its
tokens. One warp brings codes, block scales and tokens into a ring of stages in shared memory (TMA).
Eight warps decode the codes of 64 columns into one set of registers while the tensor cores multiply the
other. A stage holds GROUPS times 128 columns. An expert's last tile is as narrow as its rows allow.

The order of a sum depends on nothing but K: 16 columns a step, in the order of `fragments.py` within
each 128. So the bits of a token's result are the same in every tile and every batch.
"""

# SPDX-License-Identifier: Apache-2.0
from ...jit.arithmetic import to_bf16
from ...jit.pdl import await_previous
from ..activation import finished, is_gated
from .fragments import (
    ROWS,
    WARPS,
    WORDS,
    fragment,
    gated_columns,
    load_codes,
    memory_row,
    natural_columns,
    place_of,
)
from .gluon import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

_STORED_AT_ONCE = gl.constexpr(32)
"""Tokens whose results are finished at a time, which bounds the registers of the epilogue."""


@gluon.constexpr_function
def width_of(widths, i):
    return widths[i]


@gluon.constexpr_function
def narrower(widths, i):
    """Return the next narrower tile's tokens, 0 for the narrowest."""
    return widths[i + 1] if i + 1 < len(widths) else 0


@gluon.constexpr_function
def count_of(widths):
    return len(widths)


@gluon.jit
def _tile(t, total, tile_ptr, end_ptr, tiles, strips, WIDTHS: gl.constexpr):
    """Load (expert, first row, rows from there) of piece t of the work; of the last one beyond it."""
    tile = gl.maximum(gl.minimum(t, total - 1), 0) // strips
    expert = gl.maximum(gl.load(tile_ptr + tile), 0)
    first = gl.load(tile_ptr + tiles + tile)
    rows = gl.load(end_ptr + expert) - first
    return expert, first, gl.minimum(rows, width_of(WIDTHS, 0))


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def _fill(
    x_desc, w_desc, sf_desc, x_bufs, w_bufs, sf_bufs, full, empty, stage, phase, row, first, steps,
    N: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """Bring one tile's columns into the ring. TMA gives zeros beyond K."""
    BOX: gl.constexpr = x_desc.block_shape[0]
    BYTES: gl.constexpr = GROUPS * (ROWS * WORDS * 4 + ROWS * 8 + N * 256)
    for k in range(steps):
        mbarrier.wait(empty.index(stage), phase)
        bar = full.index(stage)
        mbarrier.expect(bar, BYTES)
        for g in gl.static_range(GROUPS):
            at = k * GROUPS + g
            buffer = stage * GROUPS + g
            tma.async_copy_global_to_shared(w_desc, [row, at * WORDS], bar, w_bufs.index(buffer))
            tma.async_copy_global_to_shared(
                sf_desc, [row // ROWS, at * 2, 0], bar, sf_bufs.index(buffer)
            )
            for half in gl.static_range(2):
                x = x_bufs.index(buffer * 2 + half)
                for i in gl.static_range(N // BOX):
                    tma.async_copy_global_to_shared(
                        x_desc, [first + i * BOX, at * 128 + half * 64], bar,
                        x.slice(i * BOX, BOX, dim=0),
                    )  # fmt: skip
        stage, phase = _next(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def _produce(
    x_desc, w_desc, sf_desc, x_bufs, w_bufs, sf_bufs, full, empty, tile_ptr, end_ptr, tiles, strips,
    M, steps, WIDTHS: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, ARCH: gl.constexpr,
):  # fmt: skip
    await_previous(ARCH)
    total = gl.load(tile_ptr + 2 * tiles) * strips
    stage = 0
    phase = 1
    expert, first, rows = _tile(gl.program_id(0), total, tile_ptr, end_ptr, tiles, strips, WIDTHS)
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        ahead, ahead_first, ahead_rows = _tile(
            t + gl.num_programs(0), total, tile_ptr, end_ptr, tiles, strips, WIDTHS
        )
        row = expert * M + t % strips * ROWS
        for i in gl.static_range(count_of(WIDTHS)):
            if (rows <= width_of(WIDTHS, i)) & (rows > narrower(WIDTHS, i)):
                stage, phase = _fill(
                    x_desc, w_desc, sf_desc, x_bufs, w_bufs, sf_bufs, full, empty, stage, phase,
                    row, first, steps, width_of(WIDTHS, i), STAGES, GROUPS,
                )  # fmt: skip
        expert = ahead
        first = ahead_first
        rows = ahead_rows


@gluon.jit
def _sums(
    x_bufs, w_bufs, sf_bufs, full, empty, stage, phase, steps,
    N: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """Return sums [ROWS, N] fp32, times 2^-8, and the ring's next stage and phase."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, N, 16]
    )
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=MMA, k_width=2)
    acc = gl.zeros((ROWS, N), gl.float32, layout=MMA)
    odd = gl.zeros((ROWS, 64), gl.bfloat16, layout=A)
    # Not `stage`: Triton carries no name through a loop that begins as the value it is assigned there.
    before = 0
    for k in range(steps):
        mbarrier.wait(full.index(stage), phase)
        for g in gl.static_range(GROUPS):
            buffer = stage * GROUPS + g
            w0, s0, w1, s1 = load_codes(w_bufs.index(buffer), sf_bufs.index(buffer))
            even = fragment(w0, s0, A)
            x = x_bufs.index(buffer * 2).slice(0, N, dim=0).permute((1, 0))
            acc = warpgroup_mma(even, x, acc, is_async=True)
            acc, odd = warpgroup_mma_wait(1, deps=(acc, odd))
            if g == 0:
                mbarrier.arrive(empty.index(before), count=1, pred=k > 0)
            odd = fragment(w1, s1, A)
            x = x_bufs.index(buffer * 2 + 1).slice(0, N, dim=0).permute((1, 0))
            acc = warpgroup_mma(odd, x, acc, is_async=True)
            acc, even = warpgroup_mma_wait(1, deps=(acc, even))
        before = stage
        stage, phase = _next(stage, phase, STAGES)
    acc, odd = warpgroup_mma_wait(0, deps=(acc, odd))
    mbarrier.arrive(empty.index(before), count=1)
    return acc, stage, phase


@gluon.jit
def _store(
    acc, token_scale_ptr, bias_ptr, scale_ptr, gate_scale_ptr, alpha_ptr, beta_ptr, limit_ptr,
    out_ptr, expert, strip, first, end, M,
    ACT: gl.constexpr, FRAGMENTS: gl.constexpr, ARCH: gl.constexpr,
):  # fmt: skip
    """Finish sums as `moe/grouped_gemm.py` does, and store those of rows from `first` up to `end`."""
    N: gl.constexpr = acc.shape[1]
    if N > _STORED_AT_ONCE:
        halves = gl.permute(gl.reshape(acc, (ROWS, 2, N // 2)), (0, 2, 1))
        low, high = gl.split(halves)
        _store(
            low, token_scale_ptr, bias_ptr, scale_ptr, gate_scale_ptr, alpha_ptr, beta_ptr,
            limit_ptr, out_ptr, expert, strip, first, end, M, ACT,
            FRAGMENTS, ARCH,
        )  # fmt: skip
        _store(
            high, token_scale_ptr, bias_ptr, scale_ptr, gate_scale_ptr, alpha_ptr, beta_ptr,
            limit_ptr, out_ptr, expert, strip, first + N // 2, end, M,
            ACT, FRAGMENTS, ARCH,
        )  # fmt: skip
    else:
        L: gl.constexpr = acc.type.layout
        if token_scale_ptr is None:
            acc = acc * 256.0
        else:
            n = first + gl.arange(0, N, layout=gl.SliceLayout(0, L))
            token_scale = gl.load(token_scale_ptr + n, n < end, other=0.0) * 256.0
            acc = acc * gl.expand_dims(token_scale, 0)
        if bias_ptr is not None:
            m = memory_row(gl.arange(0, ROWS, layout=gl.SliceLayout(1, L))) + strip * ROWS
            acc = acc + gl.expand_dims(gl.load(bias_ptr + expert.to(gl.int64) * M + m), 1)
        if is_gated(ACT):
            R: gl.constexpr = ROWS // 2
            up, gate = gated_columns(acc)
            width = M // 2
        else:
            R: gl.constexpr = ROWS
            gate = natural_columns(acc)
            up = gate
            width = M
        y = finished(
            up, gate, scale_ptr, gate_scale_ptr, alpha_ptr, beta_ptr, limit_ptr, expert, ACT
        )
        if out_ptr.dtype.element_ty == gl.bfloat16:
            y = to_bf16(y, ARCH)
        OUT: gl.constexpr = y.type.layout
        row = first + gl.arange(0, N, layout=gl.SliceLayout(0, OUT))
        column = strip * R + gl.arange(0, R, layout=gl.SliceLayout(1, OUT))
        if FRAGMENTS:
            column = place_of(column)
        out = out_ptr + gl.expand_dims(row.to(gl.int64) * width, 0) + gl.expand_dims(column, 1)
        live, out = gl.broadcast(gl.expand_dims(row < end, 0), out)
        gl.store(out, y, live)


@gluon.jit
def _consume(
    x_bufs, w_bufs, sf_bufs, full, empty, token_scale_ptr, bias_ptr, scale_ptr, gate_scale_ptr,
    alpha_ptr, beta_ptr, limit_ptr, out_ptr, tile_ptr, end_ptr, tiles, strips, M,
    steps, ACT: gl.constexpr, FRAGMENTS: gl.constexpr,
    WIDTHS: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, ARCH: gl.constexpr,
):  # fmt: skip
    total = gl.load(tile_ptr + 2 * tiles) * strips
    stage = 0
    phase = 0
    expert, first, rows = _tile(gl.program_id(0), total, tile_ptr, end_ptr, tiles, strips, WIDTHS)
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        ahead, ahead_first, ahead_rows = _tile(
            t + gl.num_programs(0), total, tile_ptr, end_ptr, tiles, strips, WIDTHS
        )
        for i in gl.static_range(count_of(WIDTHS)):
            if (rows <= width_of(WIDTHS, i)) & (rows > narrower(WIDTHS, i)):
                acc, stage, phase = _sums(
                    x_bufs, w_bufs, sf_bufs, full, empty, stage, phase, steps,
                    width_of(WIDTHS, i), STAGES, GROUPS,
                )  # fmt: skip
                _store(
                    acc, token_scale_ptr, bias_ptr, scale_ptr, gate_scale_ptr, alpha_ptr, beta_ptr,
                    limit_ptr, out_ptr, expert, t % strips, first, first + rows, M,
                    ACT, FRAGMENTS, ARCH,
                )  # fmt: skip
        expert = ahead
        first = ahead_first
        rows = ahead_rows


@gluon.jit(do_not_specialize=["tiles", "strips"])
def expert_gemm_kernel(
    x_desc,  # [rows, >= K] bf16 by permuted row, columns in the order of `fragments.py`; box [<= N, 64]
    w_desc,  # [E * M, K / 8] int32, words of 8 codes; box [ROWS, WORDS]
    sf_desc,  # [E * M / 128, K / 64, 128] int32, 128x4; box [1, 2, 128], which gives 0 beyond K
    token_scale_ptr,  # [rows] fp32 by permuted row, or None
    bias_ptr,  # [E, M] fp32, or None
    scale_ptr,  # [E] fp32: of up, or of the result
    gate_scale_ptr,  # [E] fp32, with an activation
    alpha_ptr, beta_ptr, limit_ptr,  # [E] fp32, or None
    out_ptr,  # [rows, M / 2 or M] bf16 or fp32, by permuted row
    tile_ptr,  # [2, tiles] int32: expert and first permuted row of a tile; then how many are used
    end_ptr,  # [E] int32: the expert's last permuted row, + 1
    tiles,
    strips,  # M / ROWS
    M,
    K,
    ACT: gl.constexpr,
    FRAGMENTS: gl.constexpr,  # the result's columns in the order of `fragments.py`
    WIDTHS: gl.constexpr,  # tokens of a tile, from the widest, for which `tile_ptr` was made
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,  # of 128 columns, in a stage
    ARCH: gl.constexpr,
):  # fmt: skip
    N: gl.constexpr = width_of(WIDTHS, 0)
    x_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES * GROUPS * 2, N, 64], x_desc.layout)
    w_bufs = gl.allocate_shared_memory(gl.int32, [STAGES * GROUPS, ROWS, WORDS], w_desc.layout)
    sf_bufs = gl.allocate_shared_memory(gl.int32, [STAGES * GROUPS, 1, 2, 128], sf_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    await_previous(ARCH)
    steps = (K + GROUPS * 128 - 1) // (GROUPS * 128)
    # The consumers are the default partition: ptxas serializes the wgmma of any other.
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    x_bufs, w_bufs, sf_bufs, full, empty, token_scale_ptr, bias_ptr, scale_ptr,
                    gate_scale_ptr, alpha_ptr, beta_ptr, limit_ptr, out_ptr, tile_ptr,
                    end_ptr, tiles, strips, M, steps, ACT, FRAGMENTS, WIDTHS, STAGES,
                    GROUPS, ARCH,
                ),
            ),
            (
                _produce,
                (
                    x_desc, w_desc, sf_desc, x_bufs, w_bufs, sf_bufs, full, empty, tile_ptr,
                    end_ptr, tiles, strips, M, steps, WIDTHS, STAGES, GROUPS, ARCH,
                ),
            ),
        ],
        [1],
        [24],
    )  # fmt: skip
