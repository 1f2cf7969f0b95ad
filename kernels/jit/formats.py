"""Compile-time numbers: the dtype of an input, the kind of its scale, the layout of block scales.

The layouts have the numbers of `reference.recipe.SfLayout`.
"""

# SPDX-License-Identifier: Apache-2.0
import triton.language as tl

BF16 = tl.constexpr(0)
FP16 = tl.constexpr(1)
E4M3 = tl.constexpr(2)
FP32 = tl.constexpr(3)

PER_TOKEN = tl.constexpr(0)
GLOBAL_SCALE = tl.constexpr(1)
ROW_SCALES = tl.constexpr(2)  # global scales, one a row

LAYOUT_128X4 = tl.constexpr(0)
LAYOUT_LINEAR = tl.constexpr(2)
