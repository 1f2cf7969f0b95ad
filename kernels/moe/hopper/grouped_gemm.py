"""The grouped GEMM for sm_90: weights decoded into the A operand of wgmma, tokens on its N side.

Programs stay and take tile after tile: 128 rows of one expert's weights times up to WIDTHS[0] of its
tokens. One warp brings codes, block scales and tokens into a ring of stages in shared memory (TMA);
where tokens are gathered, three more copy their rows there. Eight warps decode the codes of 64 columns
into one set of registers while the tensor cores multiply the other. A stage holds GROUPS times 128
columns. An expert's last tile is as narrow as its rows allow. A tile whose width is no power of two,
such as 96, has the sums of several parts, 64 and 32 tokens, and multiplies each fragment by all of them.

The order of a sum depends on nothing but K: 16 columns a step, in the order of `fragments.py` within
each 128. So the bits of a token's result are the same in every tile and every batch.
"""

# SPDX-License-Identifier: Apache-2.0
from ...jit.arithmetic import to_bf16
from ...jit.pdl import await_previous
from ..activation import activated, is_gated, limit_of_expert, of_expert
from .fragments import ROWS, WARPS, WORDS, fragment, halves, load_codes, warps_of
from .gather import COPIERS, copy_eight, eights_of, load_slots, rows_of_copier
from .gluon import (
    async_copy,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpreted,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


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


@gluon.constexpr_function
def parts_of(width):
    """Return the powers of two whose sum is a width, from the largest: the sizes of a tile's tensors."""
    return tuple(1 << bit for bit in range(width.bit_length() - 1, -1, -1) if width >> bit & 1)


@gluon.constexpr_function
def tokens_before(parts, i):
    """Return the tokens of a tile's parts before part i."""
    return sum(parts[:i])


@gluon.constexpr_function
def power_of_2(width):
    """Return the smallest power of two that is no less."""
    return 1 << (width - 1).bit_length()


@gluon.jit
def _tile(tile_ptr, tile, live):
    """Load a tile's record: (expert, first row, rows, tiles in use of all); zeros if it is not live."""
    # One load of 16 bytes gives every thread the whole record, so that no field changes threads.
    i = gl.arange(0, 4, layout=gl.BlockedLayout([4], [32], [gl.num_warps()], [0]))
    record = gl.load(tile_ptr + tile * 4 + i, live, other=0)
    return (
        gl.sum(gl.where(i == 0, record, 0), 0),
        gl.sum(gl.where(i == 1, record, 0), 0),
        gl.sum(gl.where(i == 2, record, 0), 0),
        gl.sum(gl.where(i == 3, record, 0), 0),
    )


@gluon.jit
def _first_tile(tile_ptr, strips):
    """Load (expert, first row, rows) of a program's first piece, and the number of all pieces."""
    expert, first, rows, used = _tile(tile_ptr, gl.program_id(0) // strips, True)
    return expert, first, rows, used * strips


@gluon.jit
def _next_tile(tile_ptr, t, total, strips):
    """Load (expert, first row, rows) of a program's piece after t; where it has none, load nothing."""
    piece = t + gl.num_programs(0)
    expert, first, rows, _ = _tile(tile_ptr, piece // strips, piece < total)
    return expert, first, rows


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def fill_ring(
    x_desc, w_desc, sf_desc, x_bufs, w_bufs, sf_bufs, full, empty, stage, phase, row, first, begin,
    end, N: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, GATHERED: gl.constexpr = False,
):  # fmt: skip
    """Bring one tile's columns of steps `begin` to `end` into the ring. TMA gives zeros beyond K.

    With GATHERED others bring the rows of tokens.
    """
    BOX: gl.constexpr = x_desc.block_shape[0]
    R: gl.constexpr = w_desc.block_shape[0]
    BYTES: gl.constexpr = GROUPS * (R * WORDS * 4 + ROWS * 8 + (0 if GATHERED else N * 256))
    BOXES: gl.constexpr = x_bufs.shape[0] // (STAGES * GROUPS * 2)
    for k in range(begin, end):
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
            if not GATHERED:
                for half in gl.static_range(2):
                    for i in gl.static_range(N // BOX):
                        tma.async_copy_global_to_shared(
                            x_desc, [first + i * BOX, at * 128 + half * 64], bar,
                            x_bufs.index((buffer * 2 + half) * BOXES + i),
                        )  # fmt: skip
        stage, phase = _next(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def _produce(
    x_desc, w_desc, sf_desc, x_bufs, w_bufs, sf_bufs, full, empty, tile_ptr, strips, M, steps,
    GATHERED: gl.constexpr, WIDTHS: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
    ARCH: gl.constexpr,
):  # fmt: skip
    await_previous(ARCH)
    stage = 0
    phase = 1
    expert, first, rows, total = _first_tile(tile_ptr, strips)
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        ahead, ahead_first, ahead_rows = _next_tile(tile_ptr, t, total, strips)
        row = expert * M + t % strips * ROWS
        for i in gl.static_range(count_of(WIDTHS)):
            if (rows <= width_of(WIDTHS, i)) & (rows > narrower(WIDTHS, i)):
                stage, phase = fill_ring(
                    x_desc, w_desc, sf_desc, x_bufs, w_bufs, sf_bufs, full, empty, stage, phase,
                    row, first, 0, steps, width_of(WIDTHS, i), STAGES, GROUPS, GATHERED,
                )  # fmt: skip
        expert = ahead
        first = ahead_first
        rows = ahead_rows


@gluon.jit
def _copy_rows(
    x_ptr, x_bufs, place_buf, full, empty, stage, phase, K, steps,
    PART: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """Bring a copier's rows of one tile, all steps of them, into the ring."""
    for k in range(steps):
        mbarrier.wait(empty.index(stage), phase)
        for i in gl.static_range(eights_of(PART, N)):
            copy_eight(
                x_ptr, x_bufs, place_buf.slice(i * 8, 8), stage, k, K, (i * COPIERS + PART) * 8,
                STAGES, GROUPS,
            )  # fmt: skip
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
        stage, phase = _next(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def _gather(
    x_ptr, x_bufs, place_bufs, full, empty, expanded_ptr, tile_ptr, slots, top_k, strips, K, steps,
    PART: gl.constexpr, GATHERED: gl.constexpr, WIDTHS: gl.constexpr, STAGES: gl.constexpr,
    GROUPS: gl.constexpr, ARCH: gl.constexpr,
):  # fmt: skip
    """Bring a copier's rows of every tile into the ring, each from where its token's row lies.

    A place in x is counted in eights of columns, the 16 bytes that a lane copies.
    """
    if GATHERED:
        await_previous(ARCH)
        place_buf = place_bufs.index(PART)
        eights = (K + 127) // 128 * 16  # of a row of x
        stage = 0
        phase = 1
        _, first, rows, total = _first_tile(tile_ptr, strips)
        n = gl.arange(0, place_buf.shape[0], layout=gl.BlockedLayout([1], [32], [1], [0]))
        n = (n // 8 * COPIERS + PART) * 8 + n % 8
        slot = load_slots(expanded_ptr, first + n, slots)
        for t in range(gl.program_id(0), total, gl.num_programs(0)):
            place_buf.store(gl.where(n < rows, slot // top_k * eights, -1))
            _, first, ahead_rows = _next_tile(tile_ptr, t, total, strips)
            slot = load_slots(expanded_ptr, first + n, slots)
            for i in gl.static_range(count_of(WIDTHS)):
                if (rows <= width_of(WIDTHS, i)) & (rows > narrower(WIDTHS, i)):
                    stage, phase = _copy_rows(
                        x_ptr, x_bufs, place_buf, full, empty, stage, phase, K, steps, PART,
                        width_of(WIDTHS, i), STAGES, GROUPS,
                    )  # fmt: skip
            rows = ahead_rows


@gluon.constexpr_function
def sums_layout(rows, tokens):
    """Lay out sums [rows, tokens] as wgmma has them."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[warps_of(rows), 1], instr_shape=[16, tokens, 16]
    )


@gluon.jit
def _zeros(R: gl.constexpr, N: gl.constexpr):
    return gl.zeros((R, N), gl.float32, layout=sums_layout(R, N))


@gluon.jit
def no_sums(R: gl.constexpr, PARTS: gl.constexpr):
    """Return zeros as the sums of a tile: [R, tokens] fp32 of each part."""
    sums = ()  # type: tuple
    for i in gl.static_range(count_of(PARTS)):
        sums = sums + (_zeros(R, width_of(PARTS, i)),)  # noqa: RUF005, Triton has no star
    return sums


@gluon.jit
def allocate_tokens(x_desc, halves: gl.constexpr, WIDTH: gl.constexpr):
    """Allocate WIDTH tokens for each of the ring's halves of 128 columns, box after box."""
    BOX: gl.constexpr = x_desc.block_shape[0]
    return gl.allocate_shared_memory(gl.bfloat16, [halves * (WIDTH // BOX), BOX, 64], x_desc.layout)


@gluon.jit
def _multiply_part(a, acc, x_bufs, first_box):
    """Begin to add the products of a fragment and a part's tokens to sums [R, N]; return them."""
    R: gl.constexpr = acc.shape[0]
    N: gl.constexpr = acc.shape[1]
    L: gl.constexpr = x_bufs.layout
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=sums_layout(R, N), k_width=2)
    x = reinterpreted(x_bufs.index(first_box), gl.bfloat16, [N, 64], L)
    own = gl.convert_layout(a, A, assert_trivial=True)
    return warpgroup_mma(own, x.permute((1, 0)), acc, is_async=True)


@gluon.jit
def _multiply(a, sums, x_bufs, first_box, PARTS: gl.constexpr):
    BOX: gl.constexpr = x_bufs.shape[1]
    begun = ()  # type: tuple
    for i in gl.static_range(count_of(PARTS)):
        of_part = _multiply_part(a, sums[i], x_bufs, first_box + tokens_before(PARTS, i) // BOX)
        begun = begun + (of_part,)  # noqa: RUF005, Triton has no star
    return begun


@gluon.jit
def _wait(pending: gl.constexpr, sums, a):
    """Wait until all but so many of the begun groups of wgmma are done, and so with a fragment."""
    done = warpgroup_mma_wait(pending, deps=sums + (a,))  # noqa: RUF005, Triton has no star
    return done[:-1], done[-1]


@gluon.jit
def _load_groups(w_bufs, sf_bufs, buffer, GROUPS: gl.constexpr, upper):
    """Load (codes, scales, codes, scales ...) of successive groups of 128 columns."""
    loaded = ()  # type: tuple
    for g in gl.static_range(GROUPS):
        of_group = load_codes(w_bufs.index(buffer + g), sf_bufs.index(buffer + g), upper)
        loaded = loaded + of_group
    return loaded


@gluon.jit
def ring_sums(
    sums, x_bufs, w_bufs, sf_bufs, full, empty, stage, phase, steps, PARTS: gl.constexpr,
    STAGES: gl.constexpr, GROUPS: gl.constexpr, GATHERED: gl.constexpr = False,
    AHEAD: gl.constexpr = False, upper=False,
):  # fmt: skip
    """Add steps to each part's sums, times 2^-8; return them, and the ring's next stage and phase.

    With AHEAD all codes of a stage are loaded before the first of them is decoded. `upper` is of half
    tiles (`load_codes`).
    """
    R: gl.constexpr = w_bufs.shape[1]
    COUNT: gl.constexpr = count_of(PARTS)  # of parts, and of groups of wgmma that a fragment begins
    N: gl.constexpr = width_of(PARTS, 0)
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=sums_layout(R, N), k_width=2)
    BOXES: gl.constexpr = x_bufs.shape[0] // (STAGES * GROUPS * 2)
    AT_ONCE: gl.constexpr = GROUPS if AHEAD else 1
    odd = gl.zeros((R, 64), gl.bfloat16, layout=A)
    # Not `stage`: Triton carries no name through a loop that begins as the value it is assigned there.
    before = 0
    for k in range(steps):
        mbarrier.wait(full.index(stage), phase)
        if GATHERED:
            # Rows were copied by the generic proxy, and wgmma reads by the async one. A copy ends after
            # its thread's last instruction for the stage, so that only who waits for it can fence.
            fence_async_shared()
        for g in gl.static_range(GROUPS):
            buffer = stage * GROUPS + g
            if g % AT_ONCE == 0:
                loaded = _load_groups(w_bufs, sf_bufs, buffer, AT_ONCE, upper)
            w0, s0, w1, s1 = halves(loaded[g % AT_ONCE * 2], loaded[g % AT_ONCE * 2 + 1])
            even = fragment(w0, s0, A)
            sums = _multiply(even, sums, x_bufs, buffer * 2 * BOXES, PARTS)
            sums, odd = _wait(COUNT, sums, odd)
            if g == 0:
                mbarrier.arrive(empty.index(before), count=1, pred=k > 0)
            odd = fragment(w1, s1, A)
            sums = _multiply(odd, sums, x_bufs, (buffer * 2 + 1) * BOXES, PARTS)
            sums, even = _wait(COUNT, sums, even)
        before = stage
        stage, phase = _next(stage, phase, STAGES)
    sums, odd = _wait(0, sums, odd)
    mbarrier.arrive(empty.index(before), count=1)
    return sums, stage, phase


@gluon.constexpr_function
def tokens_at_once(columns, bits, tokens):
    """Return the tokens whose results are finished at a time: 4 KiB of results."""
    return min(tokens, 4096 * 8 // (columns * bits))


@gluon.constexpr_function
def results_layout(columns, rows):
    """Lay out results [columns, tokens] of `rows` of weights: a thread has eight columns of a token."""
    lanes = columns // 8
    return gl.BlockedLayout([8, 1], [lanes, 32 // lanes], [1, warps_of(rows)], [0, 1])


@gluon.jit
def _in_fragments(y):
    """Put the columns [R, N] of one strip into the order of `fragments.py` among themselves."""
    N: gl.constexpr = y.shape[1]
    if y.shape[0] == ROWS:
        bits = gl.reshape(y, (2, 2, 2, 2, 2, 4, N))  # c1 c0 j1 j0 b i
        y = gl.reshape(gl.permute(bits, (2, 3, 5, 0, 1, 4, 6)), (ROWS, N))
    else:  # half of 128 columns, all with the same c1
        bits = gl.reshape(y, (2, 2, 2, 2, 4, N))
        y = gl.reshape(gl.permute(bits, (1, 2, 4, 0, 3, 5)), (ROWS // 2, N))
    return y


@gluon.jit
def _finish(
    acc, scales_buf, bias, scale, gate_scale, alpha, beta, limit, out_ptr, strip, first, end, width,
    FROM: gl.constexpr, SCALED: gl.constexpr, ACT: gl.constexpr, FRAGMENTS: gl.constexpr,
    ARCH: gl.constexpr,
):  # fmt: skip
    """Finish sums [ROWS, N], of tokens from FROM of the tile, as `moe/grouped_gemm.py` does; store them.

    Only rows from `first` up to `end` are stored.
    """
    N: gl.constexpr = acc.shape[1]
    R: gl.constexpr = ROWS // 2 if is_gated(ACT) else ROWS
    AT_ONCE: gl.constexpr = tokens_at_once(R, out_ptr.dtype.element_ty.primitive_bitwidth, N)
    if N > AT_ONCE:
        halves = gl.permute(gl.reshape(acc, (ROWS, 2, N // 2)), (0, 2, 1))
        low, high = gl.split(halves)
        _finish(
            low, scales_buf, bias, scale, gate_scale, alpha, beta, limit, out_ptr, strip, first,
            end, width, FROM, SCALED, ACT, FRAGMENTS, ARCH,
        )  # fmt: skip
        _finish(
            high, scales_buf, bias, scale, gate_scale, alpha, beta, limit, out_ptr, strip, first,
            end, width, FROM + N // 2, SCALED, ACT, FRAGMENTS, ARCH,
        )  # fmt: skip
    else:
        L: gl.constexpr = acc.type.layout
        acc = acc * 256.0
        if SCALED:
            token_scale = scales_buf.slice(FROM, N).load(gl.SliceLayout(0, L))
            acc = acc * gl.expand_dims(token_scale, 0)
        if bias is not None:
            bias = gl.convert_layout(bias, gl.SliceLayout(1, L), assert_trivial=True)
            acc = acc + gl.expand_dims(bias, 1)
        G: gl.constexpr = ROWS // 32
        if is_gated(ACT):
            pairs = gl.permute(gl.reshape(acc, (G, 2, 2, 8, N)), (0, 3, 1, 4, 2))
            up, gate = gl.split(gl.reshape(pairs, (R, N, 2)))
        else:
            gate = gl.reshape(gl.permute(gl.reshape(acc, (G, 4, 8, N)), (0, 2, 1, 3)), (ROWS, N))
            up = gate
        y = activated(up, gate, scale, gate_scale, alpha, beta, limit, ACT)
        if out_ptr.dtype.element_ty == gl.bfloat16:
            y = to_bf16(y, ARCH)
        if FRAGMENTS:
            y = _in_fragments(y)
        OUT: gl.constexpr = results_layout(R, ROWS)
        y = gl.convert_layout(y, OUT)
        row = first + FROM + gl.arange(0, N, layout=gl.SliceLayout(0, OUT))
        column = gl.arange(0, R, layout=gl.SliceLayout(1, OUT))
        if FRAGMENTS and R != ROWS:
            column = column // 4 * 8 + column % 4 + strip // 2 * ROWS + strip % 2 * 4
        else:
            column = strip * R + column
        out = out_ptr + gl.expand_dims(row.to(gl.int64) * width, 0) + gl.expand_dims(column, 1)
        live = gl.expand_dims(row < end, 0) & gl.expand_dims(column >= 0, 1)
        gl.store(out, y, live)


@gluon.jit
def _zero_half(out_ptr, strip, first, rows, width):
    """Store zeros beside an even strip, in the other half of its 128 columns of `rows` rows."""
    R: gl.constexpr = ROWS // 2
    OUT: gl.constexpr = results_layout(R, ROWS)
    column = gl.arange(0, R, layout=gl.SliceLayout(1, OUT))
    column = column // 4 * 8 + column % 4 + strip * R + 4
    zeros = gl.zeros((R, 32), out_ptr.dtype.element_ty, layout=OUT)
    for n in range(0, rows, 32):
        row = n + gl.arange(0, 32, layout=gl.SliceLayout(0, OUT))
        out = out_ptr + gl.expand_dims((first + row).to(gl.int64) * width, 0)
        live = gl.expand_dims(row < rows, 0) & gl.expand_dims(column >= 0, 1)
        gl.store(out + gl.expand_dims(column, 1), zeros, live)


@gluon.jit
def _consume(
    x_bufs, w_bufs, sf_bufs, scales_buf, full, empty, token_scale_ptr, bias_ptr, scale_ptr,
    gate_scale_ptr, alpha_ptr, beta_ptr, limit_ptr, out_ptr, expanded_ptr, tile_ptr, slots, top_k,
    strips, M, steps, GATHERED: gl.constexpr, ACT: gl.constexpr, FRAGMENTS: gl.constexpr,
    ODD: gl.constexpr, WIDTHS: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
    AHEAD: gl.constexpr, ARCH: gl.constexpr,
):  # fmt: skip
    INDEXED: gl.constexpr = GATHERED and token_scale_ptr is not None
    N: gl.constexpr = power_of_2(width_of(WIDTHS, 0))
    width = M // 2 if is_gated(ACT) else M
    if ODD:
        width += ROWS // 2
    stage = 0
    phase = 0
    expert, first, rows, total = _first_tile(tile_ptr, strips)
    n = gl.arange(0, N, layout=gl.BlockedLayout([1], [32], [WARPS.value], [0]))
    if INDEXED:
        slot = load_slots(expanded_ptr, first + n, slots)
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        ahead, ahead_first, ahead_rows = _next_tile(tile_ptr, t, total, strips)
        strip = t % strips
        if ODD:
            if strip == strips - 1:
                _zero_half(out_ptr, strip, first, rows, width)
        # What the results need is on its way while the sums are made.
        scale = of_expert(scale_ptr, expert)
        gate_scale = of_expert(gate_scale_ptr, expert)
        alpha = of_expert(alpha_ptr, expert)
        beta = of_expert(beta_ptr, expert)
        limit = limit_of_expert(limit_ptr, gate_scale, expert, ACT)
        if bias_ptr is None:
            bias = None
        else:
            m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, sums_layout(ROWS, 16)))
            bias = gl.load(bias_ptr + expert.to(gl.int64) * M + strip * ROWS + m)
        if token_scale_ptr is None:
            token_scale = None
        else:
            if INDEXED:
                source = slot // top_k
                slot = load_slots(expanded_ptr, ahead_first + n, slots)
            else:
                source = first + n
            token_scale = gl.load(token_scale_ptr + source, n < rows, other=0.0)
        for i in gl.static_range(count_of(WIDTHS)):
            if (rows <= width_of(WIDTHS, i)) & (rows > narrower(WIDTHS, i)):
                PARTS: gl.constexpr = parts_of(width_of(WIDTHS, i))
                sums, stage, phase = ring_sums(
                    no_sums(ROWS, PARTS), x_bufs, w_bufs, sf_bufs, full, empty, stage, phase, steps,
                    PARTS, STAGES, GROUPS, GATHERED, AHEAD,
                )  # fmt: skip
                if token_scale_ptr is not None:
                    scales_buf.store(token_scale)
                for part in gl.static_range(count_of(PARTS)):
                    _finish(
                        sums[part], scales_buf, bias, scale, gate_scale, alpha, beta, limit, out_ptr,
                        strip, first, first + rows, width, tokens_before(PARTS, part),
                        token_scale_ptr is not None, ACT, FRAGMENTS, ARCH,
                    )  # fmt: skip
        expert = ahead
        first = ahead_first
        rows = ahead_rows


@gluon.jit(do_not_specialize=["slots", "top_k", "strips"])
def expert_gemm_kernel(
    x_desc,  # [rows, >= K] bf16 by permuted row, columns in the order of `fragments.py`; box [<= N, 64]
    w_desc,  # [E * M, K / 8] int32, words of 8 codes; box [ROWS, WORDS]
    sf_desc,  # [E * M / 128, K / 64, 128] int32, 128x4; box [1, 2, 128], which gives 0 beyond K
    x_ptr,  # the memory of `x_desc`; with GATHERED [tokens, K rounded up to 128]
    token_scale_ptr,  # fp32, one for each row of x, or None
    bias_ptr,  # [E, M] fp32, or None
    scale_ptr,  # [E] fp32: of up, or of the result
    gate_scale_ptr,  # [E] fp32, with an activation
    alpha_ptr, beta_ptr, limit_ptr,  # [E] fp32, or None
    out_ptr,  # [rows, M / 2 or M, 64 more with ODD] bf16 or fp32, by permuted row
    expanded_ptr,  # [slots] int32: the expanded index, token * top_k + slot, of a permuted row
    tile_ptr,  # [tiles, 4] int32: a tile's expert, first permuted row, rows, and the tiles in use of all
    slots,
    top_k,
    strips,  # M / ROWS
    M,
    K,
    GATHERED: gl.constexpr,  # x has a row for each token, found by `expanded_ptr`
    ACT: gl.constexpr,
    FRAGMENTS: gl.constexpr,  # the result's columns in the order of `fragments.py`
    ODD: gl.constexpr,  # with FRAGMENTS, of an odd number of strips: zeros complete the last 128 columns
    WIDTHS: gl.constexpr,  # tokens of a tile, from the widest, for which `tile_ptr` was made
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,  # of 128 columns, in a stage
    AHEAD: gl.constexpr,  # as `ring_sums` takes it
    ARCH: gl.constexpr,
):  # fmt: skip
    N: gl.constexpr = width_of(WIDTHS, 0)
    x_bufs = allocate_tokens(x_desc, STAGES * GROUPS * 2, N)
    w_bufs = gl.allocate_shared_memory(gl.int32, [STAGES * GROUPS, ROWS, WORDS], w_desc.layout)
    sf_bufs = gl.allocate_shared_memory(gl.int32, [STAGES * GROUPS, 1, 2, 128], sf_desc.layout)
    scales_buf = gl.allocate_shared_memory(
        gl.float32, [power_of_2(N)], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    place_bufs = gl.allocate_shared_memory(
        gl.int32, [COPIERS, rows_of_copier(N)], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        # The thread that starts TMA, and each thread that copies rows.
        mbarrier.init(full.index(i), count=1 + (COPIERS * 32 if GATHERED else 0))
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
                    x_bufs, w_bufs, sf_bufs, scales_buf, full, empty, token_scale_ptr, bias_ptr,
                    scale_ptr, gate_scale_ptr, alpha_ptr, beta_ptr, limit_ptr, out_ptr, expanded_ptr,
                    tile_ptr, slots, top_k, strips, M, steps, GATHERED, ACT, FRAGMENTS, ODD, WIDTHS,
                    STAGES, GROUPS, AHEAD, ARCH,
                ),
            ),
            (
                _produce,
                (
                    x_desc, w_desc, sf_desc, x_bufs, w_bufs, sf_bufs, full, empty, tile_ptr, strips,
                    M, steps, GATHERED, WIDTHS, STAGES, GROUPS, ARCH,
                ),
            ),
            (
                _gather,
                (
                    x_ptr, x_bufs, place_bufs, full, empty, expanded_ptr, tile_ptr, slots, top_k,
                    strips, K, steps, 0, GATHERED, WIDTHS, STAGES, GROUPS, ARCH,
                ),
            ),
            (
                _gather,
                (
                    x_ptr, x_bufs, place_bufs, full, empty, expanded_ptr, tile_ptr, slots, top_k,
                    strips, K, steps, 1, GATHERED, WIDTHS, STAGES, GROUPS, ARCH,
                ),
            ),
            (
                _gather,
                (
                    x_ptr, x_bufs, place_bufs, full, empty, expanded_ptr, tile_ptr, slots, top_k,
                    strips, K, steps, 2, GATHERED, WIDTHS, STAGES, GROUPS, ARCH,
                ),
            ),
        ],
        [1, 1, 1, 1],
        [24, 24, 24, 24],
    )  # fmt: skip
