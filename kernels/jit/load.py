"""Blocks of 16 elements from memory: as 32-bit words, as fp32, and their largest magnitudes.

One thread holds whole blocks, which it reads in vectors of 16 bytes.
"""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl

from .arithmetic import larger
from .e4m3 import e4m3_decode
from .formats import BF16, E4M3, FP16, FP32


@triton.jit
def _load_words(x_ptr, row, block, mask, NB, FIRST: tl.constexpr, WORDS: tl.constexpr):
    """Four 32-bit words of each block, [ROWS, NBP, 4], from word FIRST of the block's WORDS."""
    word = (row * NB + block)[:, :, None] * WORDS + tl.arange(0, 4)[None, None, :]
    return tl.load(x_ptr + word + FIRST, mask[:, :, None], other=0)


@triton.jit
def load_blocks(x_ptr, row, block, mask, NB, DTYPE: tl.constexpr, SHIFT: tl.constexpr = 0):
    """Read blocks of x as they lie in memory: a tuple of words [ROWS, NBP, 4], zero outside the mask.

    They are the blocks `block` + SHIFT. SHIFT becomes a part of the instruction, where the sum would
    cost an address of its own.
    """
    WORDS: tl.constexpr = 16 if DTYPE == FP32 else 4 if DTYPE == E4M3 else 8
    words = ()  # type: tuple
    for i in tl.static_range(WORDS // 4):
        words = words + (_load_words(x_ptr, row, block, mask, NB, 4 * i + SHIFT * WORDS, WORDS),)  # noqa: RUF005
    return words


@triton.jit
def block_values(words, DTYPE: tl.constexpr):
    """Convert the words of `load_blocks` to fp32 [ROWS, NBP, 16], in the order of the elements."""
    R: tl.constexpr = words[0].shape[0]
    NBP: tl.constexpr = words[0].shape[1]
    if DTYPE == FP32:
        x = tl.join(tl.join(words[0], words[1]), tl.join(words[2], words[3]))
        # [.., word, 2, 2], the last index the major.
        x = tl.permute(x, (0, 1, 4, 3, 2)).to(tl.float32, bitcast=True)
    elif DTYPE == E4M3:
        x = e4m3_decode(
            (words[0][:, :, :, None] >> (tl.arange(0, 4) * 8)[None, None, None, :]) & 0xFF
        )
    else:
        even, odd = _two_values(tl.join(words[0], words[1]), DTYPE)
        x = tl.permute(tl.join(even, odd), (0, 1, 3, 2, 4))
    return tl.reshape(x, (R, NBP, 16))


@triton.jit
def _two_values(w, DTYPE: tl.constexpr):
    """The (even, odd) elements of words of bf16 or fp16."""
    if DTYPE == BF16:
        even = (w << 16).to(tl.float32, bitcast=True)
        odd = (w & -65536).to(tl.float32, bitcast=True)
    else:
        even = w.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        odd = (w >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return even, odd


@triton.jit
def _max_abs_bf16x2(a, b):
    return tl.inline_asm_elementwise(
        "max.xorsign.abs.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1
    )


@triton.jit
def _max_abs_f16x2(a, b):
    return tl.inline_asm_elementwise(
        "max.xorsign.abs.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1
    )


@triton.jit
def block_maxima(words, DTYPE: tl.constexpr, ARCH: tl.constexpr):
    """Largest magnitudes [ROWS, NBP]. A block whose elements are all NaN gives NaN or 0."""
    if ARCH < 86 or (DTYPE != BF16 and DTYPE != FP16):
        amax = tl.max(tl.abs(block_values(words, DTYPE)), 2)
    else:
        # Two at a time, as they lie in memory: fewer instructions, and half the registers while the
        # row's maximum is awaited.
        if DTYPE == BF16:
            w = tl.reduce(_max_abs_bf16x2(words[0], words[1]), 2, _max_abs_bf16x2)
        else:
            w = tl.reduce(_max_abs_f16x2(words[0], words[1]), 2, _max_abs_f16x2)
        even, odd = _two_values(w, DTYPE)
        amax = larger(tl.abs(even), tl.abs(odd), ARCH)
    return amax
