"""The kernel that counts a call and, if it is due, copies some of its rows: one program."""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl

from ...jit.pdl import await_previous


@triton.jit
def _copy(source_ptr, target_ptr, stride, width, first, tokens, row, CHUNK: tl.constexpr):
    """Copy one row of 16-bit words."""
    source = source_ptr + ((first + row) % tokens) * stride
    target = target_ptr + row * width
    for start in range(0, width, CHUNK):
        offset = start + tl.arange(0, CHUNK)
        inside = offset < width
        tl.store(target + offset, tl.load(source + offset, inside), inside)


@triton.jit(do_not_specialize=["tokens", "period", "phase"])
def take_kernel(
    counts_ptr,
    states_ptr, ids_ptr, weights_ptr, output_ptr,
    kept_states_ptr, kept_ids_ptr, kept_weights_ptr, kept_output_ptr,
    states_stride, ids_stride, weights_stride, output_stride,
    states_width, ids_width, weights_width, output_width,
    tokens,
    period,
    phase,
    ROWS: tl.constexpr,
    STRIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    ARCH: tl.constexpr,
):  # fmt: skip
    await_previous(ARCH)
    calls = tl.load(counts_ptr)
    taken = tl.load(counts_ptr + 1)
    tl.debug_barrier()  # every warp has read before one writes
    tl.store(counts_ptr, calls + 1)
    if (calls == 0) | (calls % period == phase):
        # Exchanges order the copies between them for a reader on another stream.
        tl.atomic_xchg(counts_ptr + 1, taken + 1, sem="acq_rel", scope="sys")
        tl.debug_barrier()
        first = taken * STRIDE % tokens
        for row in range(ROWS):
            if row < tokens:
                _copy(
                    states_ptr, kept_states_ptr, states_stride, states_width, first, tokens, row,
                    CHUNK,
                )  # fmt: skip
                _copy(ids_ptr, kept_ids_ptr, ids_stride, ids_width, first, tokens, row, CHUNK)
                _copy(
                    weights_ptr, kept_weights_ptr, weights_stride, weights_width, first, tokens, row,
                    CHUNK,
                )  # fmt: skip
                _copy(
                    output_ptr, kept_output_ptr, output_stride, output_width, first, tokens, row,
                    CHUNK,
                )  # fmt: skip
        tl.store(counts_ptr + 3, tokens.to(tl.int64))
        tl.store(counts_ptr + 4, first)
        tl.debug_barrier()
        tl.atomic_xchg(counts_ptr + 2, taken + 1, sem="acq_rel", scope="sys")
