"""The bits of `Recipe.code`, the compile-time constant that selects a kernel's arithmetic."""

# SPDX-License-Identifier: Apache-2.0
import triton

from ...reference import recipe


@triton.constexpr_function
def flushes(code):
    """True for the "cuda" build: fp32 operations take subnormal numbers for zeros."""
    return not code & recipe.NO_FTZ


@triton.constexpr_function
def is_exact(code):
    """True for math "exact": IEEE quotients in place of approximate reciprocals."""
    return bool(code & recipe.EXACT)


@triton.constexpr_function
def tests_rounded_scale(code):
    """True if fast math tests a block's scale for zero after e4m3, not the block's maximum."""
    return bool(code & (recipe.NO_FTZ | recipe.SINCE_0_7_4))


@triton.constexpr_function
def is_four_over_six(code):
    """True if a block's maximum may stand at 4 as well as at 6."""
    return bool(code & recipe.FOUR_OVER_SIX)


@triton.constexpr_function
def squares_error(code):
    """True if 4over6 compares squared differences, not absolute ones."""
    return bool(code & recipe.SQUARED_ERROR)


@triton.constexpr_function
def has_fast_error(code):
    """True if 4over6 takes its differences in the scaled domain, not in the input's."""
    return bool(code & recipe.FAST_ERROR)


@triton.constexpr_function
def compares_inputs(code):
    """True for 4over6 that takes its differences in the input's domain."""
    return is_four_over_six(code) and not has_fast_error(code)


@triton.constexpr_function
def largest_value(code):
    """6 times the largest block scale of 4over6."""
    return 6.0 * (256 if code & recipe.E4M3_MAX_256 else 448)
