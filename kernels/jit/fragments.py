"""Tokens in the order in which sm_90's grouped GEMM multiplies columns.

Column k of 128, with bits i0 i1 b j0 j1 c0 c1 from the lowest, has place b c0 c1 i0 i1 j0 j1:
`moe/hopper/fragments.py` says why. A row may be wanted at several places, one for each of its experts.
"""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl


def padded_to_fragments(columns: int) -> int:
    """Round columns up to the 128 that change places among themselves."""
    return -(-columns // 128) * 128


@triton.jit
def fragment_order(x):
    """Put [R, C] in natural order into the order above; 128 divides C."""
    GROUPS: tl.constexpr = x.shape[1] // 128
    bits = tl.reshape(x, (x.shape[0], GROUPS, 2, 2, 2, 2, 2, 2, 2))  # c1 c0 j1 j0 b i1 i0
    places = tl.permute(bits, (0, 1, 4, 5, 7, 8, 2, 3, 6))  # j1 j0 i1 i0 c1 c0 b
    return tl.reshape(places, (x.shape[0], x.shape[1]))


@triton.jit
def join_fourths(v0, v1, v2, v3):
    """Join columns 0, 4, 8 ..., columns 1, 5, 9 ... of B blocks, [R, B, 4] each: [R, 16 B], natural."""
    pairs = tl.join(tl.join(v0, v2), tl.join(v1, v3))  # [R, B, 4, i1, i0]
    return tl.reshape(pairs, (v0.shape[0], v0.shape[1] * 16))


@triton.jit
def load_places(place_ptr, row, live, SLOTS: tl.constexpr):
    """Load where rows [R, 1] go, a tuple: `place_ptr`[r, SLOTS], or r without SLOTS; -1: nowhere.

    A kernel does it before it needs them: no load may pass a store.
    """
    places = ()  # type: tuple
    if SLOTS == 0:
        places = (tl.where(live, row, -1),)
    for slot in tl.static_range(SLOTS):
        place = tl.load(place_ptr + row * SLOTS + slot, live, other=-1).to(tl.int64)
        places = places + (place,)  # noqa: RUF005, Triton has no star
    return places


@triton.jit
def store_fragments(x, out_ptr, places, first, K, SLOTS: tl.constexpr):
    """Write columns from `first` of rows, natural, to `places` of out [rows, P], zeros beyond K.

    P is K rounded up to 128.
    """
    column = first + tl.arange(0, x.shape[1])[None, :]
    x = fragment_order(tl.where(column < K, x, 0.0).to(x.dtype))
    P = (K + 127) // 128 * 128
    store_at_places(x, out_ptr + column, places, column < P, P, SLOTS)


@triton.jit
def store_at_places(x, ptr, places, live, width, SLOTS: tl.constexpr):
    """Write x, where live, to the rows `places` of `width` elements that begin at `ptr`."""
    for slot in tl.static_range(SLOTS if SLOTS > 0 else 1):
        tl.store(ptr + places[slot] * width, x, live & (places[slot] >= 0))
