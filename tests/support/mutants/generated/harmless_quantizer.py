"""Generated mutants of how a GPU quantizes with 4over6 that nothing can catch, and why."""

# SPDX-License-Identifier: Apache-2.0

OF_QUANTIZER: dict[str, tuple[str, ...]] = {
    "Both ways compute the two candidates of 4over6 by one function, and compare the same errors.": (
        "kernels quantize_kernel: comparison: ARCH >= 89 -> ARCH > 89",
        "kernels quantize_kernel: constant: ARCH >= 89 -> ARCH >= 90",
        "kernels quantize_kernel: operator: PARTS > 1 and ARCH >= 89 -> PARTS > 1 or ARCH >= 89",
        "kernels quantize_kernel: comparison: PARTS > 1 -> PARTS >= 1",
        "kernels quantize_kernel: constant: PARTS > 1 -> PARTS > 2",
        "kernels quantize_kernel: comparison: ARCH >= 89 -> ARCH > 89 (2)",
        "kernels quantize_kernel: constant: ARCH >= 89 -> ARCH >= 90 (2)",
    ),
    "More magnitudes are limited to 6, and none that rounds to 6 or less changes. One that is NaN has "
    "the code of 6 in both ways, and the error of its block is NaN, or the block is all zeros.": (
        "kernels _extremes: comparison: maxima[0] > 0 -> maxima[0] >= 0",
        "kernels _extremes: comparison: maxima[i] > 0 -> maxima[i] >= 0",
        "kernels quantize_kernel: comparison: DTYPE != E4M3 -> DTYPE == E4M3",
        "kernels quantize_row_to_places: comparison: DTYPE != E4M3 -> DTYPE == E4M3",
        "kernels compares_inputs: operator: not has_fast_error(code) -> has_fast_error(code)",
    ),
    "4over6 that compares inputs alone reads whether magnitudes saturate.": (
        "kernels compares_inputs: operator: is_four_over_six(code) and (not has_fast_error(code)) -> "
        "is_four_over_six(code) or not has_fast_error(code)",
    ),
    "sm_89 then takes the unit 1, as sm_86 does: a power of two changes no significand.": (
        "kernels magnitude_unit: comparison: 89 <= arch < 100 -> 89 < arch < 100",
        "kernels magnitude_unit: constant: 89 <= arch < 100 -> 90 <= arch < 100",
    ),
    "In place of 1.5 there is 1.5 + 2^-22: 2^22 times it is an even multiple of 1/2, as before. What "
    "lies between the two rounds to 1.5.": (
        "kernels _e2m1_round: constant: 1.0 -> 1.0000001192092896",
    ),
}
"""Keys of `rules.Generated`, by reason."""
