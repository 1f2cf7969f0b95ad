"""Generated mutants of the kernels alone that nothing can catch, and why."""

# SPDX-License-Identifier: Apache-2.0

OF_KERNELS: dict[str, tuple[str, ...]] = {
    "The other factor of the product is 0 there.": (
        "kernels decode_kernel: constant: 0 -> 1",
        "kernels decode_kernel: constant: 0 -> 1 (2)",
        "kernels decode_row_to_places: constant: 0 -> 1",
        "kernels decode_row_to_places: constant: 0 -> 1 (2)",
        "kernels row_dots_kernel: constant: 0.0 -> 1.0",
        "kernels row_dots_kernel: constant: 0.0 -> 1.0 (2)",
        "kernels row_dots_kernel: constant: 0.0 -> 1.0 (3)",
    ),
    "The store has the same mask: what is loaded outside of it is not used.": (
        "kernels finalize_kernel: constant: 0.0 -> 1.0",
        "kernels _expert_tile: constant: 0.0 -> 1.0",
        "kernels _consume_dense: constant: 0.0 -> 1.0",
        "kernels _raw: constant: 0.0 -> 1.0",
        "kernels _raw: constant: 0.0 -> 1.0 (2)",
        "kernels activation_gradient_kernel: constant: 0.0 -> 1.0",
        "kernels weight_values_kernel: constant: 0 -> 1",
        "kernels weight_values_kernel: constant: 0 -> 1 (2)",
        "kernels weight_values_kernel: constant: 0 -> 1 (3)",
    ),
    "Behind K codes and scales of both operands are masked, so that 0 remains a factor.": (
        "kernels sums: constant: 0 -> 1",
        "kernels sums: constant: 0 -> 1 (2)",
        "kernels sums: constant: 0.0 -> 1.0",
        "kernels sums: constant: 0.0 -> 1.0 (2)",
        "kernels sums: constant: 0.0 -> 1.0 (3)",
        "kernels sums: constant: 0.0 -> 1.0 (4)",
        "kernels sums: constant: tl.where((column < (K4 - k) // 4)[None, :], sf, 0) -> "
        "tl.where((column < (K4 - k) // 4)[None, :], sf, 1)",
        "kernels native_sums: constant: 0 -> 1",
        "kernels native_sums: constant: 0 -> 1 (2)",
        "kernels native_sums: constant: 0 -> 1 (3)",
        "kernels native_sums: constant: 0 -> 1 (4)",
    ),
    "Experts decoded at a time hold fewer than 2^27 elements, or are one, whose place is 0.": (
        "kernels _expert_tile: rounding: place.to(tl.int64) -> place",
    ),
    "Any number that is no activation stands for the second GEMM, here and in the launch.": (
        "kernels NONE: constant: -1 -> -2",
    ),
    "Any id next to those of the local experts is no local expert's.": (
        "kernels permute_kernel: constant: first_expert - 1 -> first_expert - 2",
        "kernels permute_kernel: constant: first_expert - 1 -> first_expert - 2 (2)",
        "kernels count_kernel: constant: first_expert - 1 -> first_expert - 2",
        "kernels place_kernel: constant: first_expert - 1 -> first_expert - 2",
        "kernels slot_places: constant: first_expert - 1 -> first_expert - 2",
    ),
    "The one launch has a chunk for all slots, so that its loops end after one.": (
        "kernels permute_kernel: index: range(0, N, CHUNK) -> range(0, N, CHUNK + 1)",
        "kernels permute_kernel: index: range(0, N, CHUNK) -> range(0, N, CHUNK + 1) (2)",
        "kernels permute_kernel: operator: row += tl.sum(here) -> row -= tl.sum(here)",
    ),
    "Bins before an expert alone are summed, and none behind the last expert is read.": (
        "kernels masked_rows_kernel: constant: 0 -> 1",
        "kernels permute_kernel: comparison: local < E -> local <= E",
        "kernels count_kernel: comparison: local < E -> local <= E",
    ),
    "A tile is asked only whether it has 8 rows; any other number stands for 128.": (
        "kernels tiled_scale_offset: constant: 128 -> 129",
        "kernels scale_offset: constant: 128 if LAYOUT == LAYOUT_128X4 else 8 -> 129 if LAYOUT == "
        "LAYOUT_128X4 else 8",
    ),
    "Any negative row is no row.": (
        "kernels finalize_kernel: constant: -1 -> -2",
        "kernels load_places: constant: -1 -> -2",
        "kernels load_places: constant: -1 -> -2 (2)",
        "kernels slot_places: constant: -1 -> -2",
    ),
    "The number takes the type of the tensor.": (
        "kernels store_fragments: rounding: tl.where(column < K, x, 0.0).to(x.dtype) -> "
        "tl.where(column < K, x, 0.0)",
    ),
    "With one slot both sides are 1.": (
        "kernels store_at_places: constant: SLOTS > 0 -> SLOTS > 1",
    ),
    "In the end NaN is given back as it came.": (
        "kernels ex2_approx: constant: tl.where(x == x, tl.where(tl.abs(x) < 1000.0, tl.abs(x), "
        "1000.0), 0.0) -> tl.where(x == x, tl.where(tl.abs(x) < 1000.0, tl.abs(x), 1000.0), 1.0)",
    ),
    "BK divides K, so that there are as many steps.": (
        "kernels decoded_sums: constant: tl.range(0, K, BK, num_stages=STAGES) -> tl.range(1, K, BK, "
        "num_stages=STAGES)",
    ),
    "An ulp of a sum of two products or more, whose order is free: the interval is wider.": (
        "kernels decoded_sums: constant: acc * 256.0 -> acc * 256.0000305175781",
        "kernels sums: constant: acc * 256.0 -> acc * 256.0000305175781",
        "kernels _finish: constant: acc * 256.0 -> acc * 256.0000305175781",
        "kernels _finish_dense: constant: acc * 256.0 -> acc * 256.0000305175781",
    ),
    "The two zeros lie in the same interval.": (
        "kernels activated: comparison: g <= 0 -> g < 0",
        "kernels activated: comparison: g <= 0 -> g < 0 (2)",
        "kernels with_slope: comparison: g <= 0 -> g < 0",
        "kernels with_slope: comparison: g <= 0 -> g < 0 (2)",
    ),
    "At 0 the hyperbolic tangent is 0, whose sign is lost when 0.5 is added.": (
        "kernels _sigmoid: comparison: x < 0 -> x <= 0",
    ),
    "Keys of experts that are not there are below all others, whatever their scores.": (
        "kernels route_kernel: constant: 0.0 -> 1.0",
    ),
    "All NaN have one key, above that of infinity, with either pattern.": (
        "kernels _key: constant: tl.where(x == x, bits, 2143289344) -> tl.where(x == x, bits, "
        "2143289345)",
    ),
    "Slots behind K are not stored, and add zeros to a sum.": (
        "kernels slots_of: constant: 1 << (k - 1).bit_length() -> 2 << (k - 1).bit_length()",
        "kernels slots_of: operator: k - 1 -> k + 1",
        "kernels store_weights: constant: 0 -> 1",
        "kernels route_kernel: index: tl.static_range(K) -> tl.static_range(K + 1)",
        "kernels store_experts: index: tl.static_range(K) -> tl.static_range(K + 1)",
    ),
    "The next operation has an operand of the wider type, to which Triton promotes exactly.": (
        "kernels finalize_kernel: rounding: tl.load(weights_ptr + token * K + k).to(tl.float32) -> "
        "tl.load(weights_ptr + token * K + k)",
        "kernels ex2_approx: rounding: tl.load(table_ptr + (steps & 8388607)).to(tl.float64) -> "
        "tl.load(table_ptr + (steps & 8388607))",
        "kernels rcp: rounding: tl.load(rcp_delta_ptr + significand).to(tl.int32) -> "
        "tl.load(rcp_delta_ptr + significand)",
        "kernels _raw: rounding: tl.load(sums_ptr + row + column, inside, "
        "other=0.0).to(tl.float32) -> tl.load(sums_ptr + row + column, inside, other=0.0)",
        "kernels activation_gradient_kernel: rounding: tl.load(d_ptr + n * columns + column, "
        "inside, other=0.0).to(tl.float32) -> tl.load(d_ptr + n * columns + column, inside, "
        "other=0.0)",
        "kernels row_dots_kernel: rounding: tl.load(sums_ptr + n * columns + column, inside, "
        "other=0.0).to(tl.float32) -> tl.load(sums_ptr + n * columns + column, inside, other=0.0)",
        "kernels row_dots_kernel: rounding: to_bf16(row * scale, ARCH).to(tl.float32) -> "
        "to_bf16(row * scale, ARCH)",
        "kernels row_dots_kernel: rounding: tl.load(grads + column, inside, "
        "other=0.0).to(tl.float32) -> tl.load(grads + column, inside, other=0.0)",
    ),
    "Triton adds up truth values as int32.": (
        "kernels permute_kernel: rounding: (local == expert).to(tl.int32) -> local == expert",
        "kernels write_tiles: rounding: (last > 0).to(tl.int32) -> last > 0",
        "kernels write_tiles: rounding: before.to(tl.int32) -> before",
        "kernels place_kernel: rounding: same.to(tl.int32) -> same",
    ),
    "What is loaded or computed for a slot of no local expert, or behind the last slot, is not used.": (
        "kernels place_kernel: constant: 0 -> 1",
        "kernels place_kernel: constant: 0 -> 1 (2)",
        "kernels place_kernel: constant: 0 -> 1 (3)",
        "kernels place_kernel: constant: BINS - 1 -> BINS - 2",
    ),
    "The part more is not read again, and what it loads is masked.": (
        "kernels _load_parts: index: tl.static_range(PARTS) -> tl.static_range(PARTS + 1)",
    ),
    "Rows that are not live stay so, and nothing of them is stored.": (
        "kernels quantize_kernel: operator: -1 -> 1",
        "kernels quantize_kernel: constant: -1 -> -2",
        "kernels quantize_kernel: constant: 1.0 -> 1.0000001192092896",
    ),
    "Zeros are taken away in place of added.": (
        "kernels rows_kernel: operator: tl.program_id(0).to(tl.int64) + tl.zeros((1, 1), tl.int64) -> "
        "tl.program_id(0).to(tl.int64) - tl.zeros((1, 1), tl.int64)",
        "kernels quantize_kernel: operator: scale_ptr + tl.zeros_like(row) -> scale_ptr - "
        "tl.zeros_like(row)",
        "kernels load_weights_kernel: operator: flush(encode, FTZ, ARCH) + tl.zeros((1, 1), "
        "tl.float32) -> flush(encode, FTZ, ARCH) - tl.zeros((1, 1), tl.float32)",
        "kernels slot_places: operator: place + tl.zeros((1, 1), tl.int32) -> place - tl.zeros((1, "
        "1), tl.int32)",
        "kernels prologue_kernel: operator: token.to(tl.int64) + tl.zeros((1, 1), tl.int64) -> "
        "token.to(tl.int64) - tl.zeros((1, 1), tl.int64)",
    ),
    "Without per-token scales READ is 0; with them nothing reads what is loaded more.": (
        "kernels quantize_kernel: comparison: MODE != PER_TOKEN -> MODE == PER_TOKEN",
    ),
    "Every use flushes it, or the row's blocks are zeros, which have code and scale 0.": (
        "kernels quantize_kernel: rounding: flush(row_amax, FTZ, ARCH) -> row_amax",
        "kernels quantize_kernel: rounding: flush(encode, FTZ, ARCH) -> encode",
        "kernels _quantize_rows: rounding: flush(or_zero(tl.max(or_zero(amax), 1)), FTZ, ARCH) -> "
        "or_zero(tl.max(or_zero(amax), 1))",
        "kernels quantize_row_to_places: rounding: flush(row_amax, FTZ, ARCH) -> row_amax",
    ),
    "Every program of a row stores the same.": (
        "kernels quantize_kernel: constant: tl.program_id(1) -> tl.program_id(2) (3)",
        "kernels decode_kernel: constant: tl.program_id(1) -> tl.program_id(2) (3)",
    ),
    "The loop over the row and the parts that were kept write the same.": (
        "kernels quantize_kernel: operator: MODE == PER_TOKEN and READ != 0 and (SPLITS == 1) -> MODE "
        "== PER_TOKEN or READ != 0 or SPLITS == 1",
        "kernels quantize_kernel: constant: READ != 0 -> READ != 1",
    ),
    "At 0 both sides are 0.": ("kernels or_zero: comparison: amax > 0 -> amax >= 0",),
    "Blocks of a row of zeros have code and scale 0 whatever the row's, and those of NaN are NaN.": (
        "kernels row_scales: constant: 0.0 if is_four_over_six(RECIPE) else FLT_MAX -> 1.0 if "
        "is_four_over_six(RECIPE) else FLT_MAX",
    ),
    "The third candidate is the second again, whose error is not the smaller.": (
        "kernels _four_over_six: constant: tl.range(0, 2) -> tl.range(0, 3)",
    ),
    "All elements are zeros or NaN there, whose products with 1 and with 0 are the same.": (
        "kernels quantize_block: constant: tl.where(unrounded == 0, 0.0, output_scale) -> "
        "tl.where(unrounded == 0, 1.0, output_scale)",
        "kernels quantize_block: constant: tl.where(amax == 0, 0.0, output_scale) -> tl.where(amax == "
        "0, 1.0, output_scale)",
    ),
    "The way for any row is right for all; the quick one is, with a factor of 2 to spare, from 2^-60 "
    "to 2^16.": (
        "kernels quantize_block: constant: row_amax != 0 -> row_amax != 1",
        "kernels quantize_block: operator: (row_amax != 0) & ((row_amax < 2.0 ** (-60)) | (row_amax > "
        "2.0 ** 16)) -> (row_amax != 0) | ((row_amax < 2.0 ** (-60)) | (row_amax > 2.0 ** 16))",
        "kernels quantize_block: comparison: row_amax < 2.0 ** (-60) -> row_amax <= 2.0 ** (-60)",
        "kernels quantize_block: constant: 2.0 ** (-60) -> 2.000000238418579 ** (-60)",
        "kernels quantize_block: operator: -60 -> 60",
        "kernels quantize_block: constant: -60 -> -61",
        "kernels quantize_block: comparison: row_amax > 2.0 ** 16 -> row_amax >= 2.0 ** 16",
        "kernels quantize_block: operator: 2.0 ** 16 -> 2.0 * 16",
        "kernels quantize_block: constant: 2.0 ** 16 -> 2.000000238418579 ** 16",
        "kernels quantize_block: constant: 2.0 ** 16 -> 2.0 ** 17",
    ),
    "A program may take the minimum with 6 without need: it changes no magnitude that rounds to 6 or "
    "less, and of NaN neither the code nor the error.": (
        "kernels may_saturate: operator: (least * sixth >= 2.0 ** (-7)) | (row_amax == 0) -> (least * "
        "sixth >= 2.0 ** (-7)) & (row_amax == 0)",
        "kernels may_saturate: comparison: least * sixth >= 2.0 ** (-7) -> least * sixth > 2.0 ** (-7)",
        "kernels may_saturate: operator: -7 -> 7",
        "kernels may_saturate: comparison: row_amax * sixth <= 450.0 -> row_amax * sixth < 450.0",
        "kernels e2m1_encode_magnitudes: comparison: ARCH < 89 -> ARCH <= 89",
        "kernels e2m1_encode_magnitudes: constant: ARCH < 89 -> ARCH < 90",
    ),
    "A block scale next to 4 steps of 2^-9 rounds to 4 steps, and 3/2 of it to 6: the largest magnitude "
    "is next to 6, or to 4.": (
        "kernels may_saturate: constant: 2.0 ** (-7) -> 2.000000238418579 ** (-7)",
    ),
    "Of a block scale next to 450, which saturates at 448, magnitudes are at most 6.03 under both.": (
        "kernels may_saturate: constant: row_amax * sixth <= 450.0 -> row_amax * sixth <= "
        "450.0000305175781",
    ),
    "A row has one truth value, over which the largest is the least.": (
        "kernels may_saturate: operator: tl.min(inside.to(tl.int32), 1) -> tl.max(inside.to(tl.int32), "
        "1)",
    ),
    "Triton takes the minimum of truth values as int32.": (
        "kernels may_saturate: rounding: inside.to(tl.int32) -> inside",
    ),
    "A row has one maximum, over which the least is the largest.": (
        "kernels quantize_block: operator: tl.max(far.to(tl.int32), 1) -> tl.min(far.to(tl.int32), 1)",
    ),
    "Any number that is no other mode's stands for this one, here and in the launch.": (
        "kernels ROW_SCALES: constant: tl.constexpr(2) -> tl.constexpr(3)",
    ),
    "Both ways give the same maxima; a GPU of compute capability 8.6 takes the other.": (
        "kernels block_maxima: comparison: ARCH < 86 -> ARCH <= 86",
        "kernels block_maxima: constant: ARCH < 86 -> ARCH < 87",
    ),
    "The store converts to the type of its elements.": (
        "kernels masked_rows_kernel: rounding: tl.minimum(tl.maximum(given, 0), max_m).to(tl.int32) -> "
        "tl.minimum(tl.maximum(given, 0), max_m)",
        "kernels dense_gemm_kernel: rounding: acc.to(out_ptr.dtype.element_ty) -> acc",
        "kernels _finish: rounding: to_bf16(y, ARCH) -> y",
        "kernels _finish_dense: rounding: to_bf16(acc, ARCH) -> acc",
        "kernels _finish_dense: rounding: acc.to(out_ptr.dtype.element_ty) -> acc",
        "kernels store_codes: rounding: tl.where(mask, byte, 0).to(tl.uint8) -> tl.where(mask, byte, "
        "0)",
        "kernels take_kernel: rounding: tokens.to(tl.int64) -> tokens",
        "kernels zero_empty_groups_kernel: rounding: tl.zeros((BLOCK,), "
        "tl.float32).to(t_ptr.dtype.element_ty) -> tl.zeros((BLOCK,), tl.float32)",
    ),
    "The word behind the last is of the first row of the tile, which is no padding.": (
        "kernels zero_padding_rows: comparison: word < TILE * (padded_columns // 4) -> word <= TILE * "
        "(padded_columns // 4)",
    ),
    "Of two equal magnitudes either is taken, and magnitudes have no -0.": (
        "kernels larger: comparison: a > b -> a >= b",
        "kernels smaller: comparison: a < b -> a <= b",
    ),
    "The shift by 16 drops the bit.": (
        "kernels to_bf16: constant: tl.where(x == x, rounded, 2143289344) -> tl.where(x == x, "
        "rounded, 2143289345)",
    ),
    "Triton takes the maximum of truth values as int32.": (
        "kernels quantize_kernel: rounding: live.to(tl.int32) -> live",
        "kernels quantize_block: rounding: far.to(tl.int32) -> far",
    ),
    "rcp.approx.ftz gives nothing subnormal; the flush keeps the assembler from cancelling two of it.": (
        "kernels quantize_kernel: rounding: flush(rcp(given, rcp_delta_ptr, ARCH), True, ARCH) -> "
        "rcp(given, rcp_delta_ptr, ARCH)",
    ),
    "The minuend is flushed before; a subnormal magnitude has code 0; the sum flushes the errors.": (
        "kernels sub: rounding: flush(flush(a, FTZ, ARCH) - flush(b, FTZ, ARCH), FTZ, ARCH) -> "
        "flush(a, FTZ, ARCH) - flush(b, FTZ, ARCH)",
        "kernels sub: rounding: flush(a, FTZ, ARCH) -> a",
        "kernels sub: rounding: flush(b, FTZ, ARCH) -> b",
    ),
    "The first operand of every sum has been flushed, or is a sigmoid, which is 0 or at least 2^-25.": (
        "kernels add: rounding: flush(a, FTZ, ARCH) -> a",
    ),
    "A dividend has been flushed, or its divisor is at least 1, so that the quotient is flushed.": (
        "kernels div: rounding: flush(a, FTZ, ARCH) -> a",
    ),
    "Widths are powers of two, and 32 of them are one warp in either way.": (
        "kernels _sum_of_all: comparison: x.shape[0] > 32 -> x.shape[0] >= 32",
        "kernels _sum_of_all: constant: x.shape[0] > 32 -> x.shape[0] > 33",
    ),
    "The warp more has no lanes, and 0 is added to a sum that has a 1 in it.": (
        "kernels _sum_of_all: index: tl.static_range(1, WARPS) -> tl.static_range(1, WARPS + 1)",
    ),
    "Both ways give the same maxima.": (
        "kernels block_maxima: operator: DTYPE != BF16 and DTYPE != FP16 -> DTYPE != BF16 or DTYPE != "
        "FP16",
    ),
    "The quotient is right for every significand with either reciprocal (`test_harmless_mutants.py`).": (
        "kernels _quotients: constant: 1.0 / D -> 1.0000001192092896 / D",
    ),
    "The quotient is right for every significand (`test_harmless_mutants.py`). In rows from 2^-60 to "
    "2^16 nothing is subnormal or overflows with this factor, either.": (
        "kernels _candidate: operator: 2.0 ** (-26) -> 2.0 * -26",
        "kernels _candidate: operator: -26 -> 26",
        "kernels _candidate: constant: -26 -> -27",
    ),
    "The first quotient is near 0, and the second is that of the whole dividend. The result is right "
    "for every significand (`test_harmless_mutants.py`).": (
        "kernels _quotients: operator: p * INVERSE -> p / INVERSE",
    ),
    "The polynomial has the same value for every argument (`test_harmless_mutants.py`).": (
        "kernels _exp: constant: 1.0 / 5040 -> 1.0000001192092896 / 5040",
    ),
    "It is rounded to bf16, in which the number is the same.": (
        "kernels operand_scale: constant: 2.0 ** 118 -> 2.000000238418579 ** 118",
        "kernels decode_values: constant: 2.0 ** 126 -> 2.000000238418579 ** 126",
        "kernels decode_kernel: constant: x * 256.0 -> x * 256.0000305175781",
        "kernels decode_kernel: constant: value * 256.0 -> value * 256.0000305175781",
        "kernels decode_row_to_places: constant: x * 256.0 -> x * 256.0000305175781",
    ),
    "The product is exact in bf16, and the store converts to the type of its elements.": (
        "kernels decode_kernel: rounding: (x * 256.0).to(tl.bfloat16) -> x * 256.0",
        "kernels decode_row_to_places: rounding: (x * 256.0).to(tl.bfloat16) -> x * 256.0",
        "kernels decode_values: rounding: (value * scale).to(tl.bfloat16) -> value * scale",
    ),
    "Both factors are exact in bf16 and in fp32, and so is their product.": (
        "kernels decode_values: rounding: decode_fourth(words, WHICH, ARCH).to(tl.float32) -> "
        "decode_fourth(words, WHICH, ARCH)",
    ),
    "The interpreter's product of fp32 and bf16 is that of two fp32 numbers; no GPU is number 1.": (
        "kernels scaled: constant: ARCH == 0 -> ARCH == 1",
        "kernels scaled: rounding: scale.to(tl.float32) -> scale",
    ),
    "Rows that are not live go nowhere.": ("kernels decode_kernel: constant: 0.0 -> 1.0",),
    "Shifts of 3 to 31 are the same numbers, which Triton promotes to uint32.": (
        "kernels e2m1_signs: rounding: (tl.arange(0, 8) * 4 + 3)[None, None, None, :].to(tl.uint32) -> "
        "(tl.arange(0, 8) * 4 + 3)[None, None, None, :]",
    ),
    "Of a number that is none only the sign is read.": (
        "kernels e2m1_signs: constant: tl.where(y == y, bits, 0) -> tl.where(y == y, bits, 1)",
    ),
    "The instruction and the integer arithmetic give the same byte, and the same number for it.": (
        "kernels e4m3_round: comparison: ARCH >= 89 -> ARCH > 89",
        "kernels e4m3_round: constant: ARCH >= 89 -> ARCH >= 90",
        "kernels e4m3_encode: comparison: ARCH >= 89 -> ARCH > 89",
        "kernels e4m3_encode: constant: ARCH >= 89 -> ARCH >= 90",
    ),
    "64 (r + 2) is a number of e4m3 or over 448. Numbers of e4m3 lie 16 apart there, and it changes "
    "by less than 2^-13.": (
        "kernels _pack: constant: tl.fma(rounded, 64.0, 128.0) -> tl.fma(rounded, 64.00000762939453, "
        "128.0)",
        "kernels _pack: constant: tl.fma(rounded, 64.0, 128.0) -> tl.fma(rounded, 64.0, "
        "128.00001525878906)",
    ),
    "A magnitude next to 6 rounds to 6.": (
        "kernels e2m1_encode: constant: smaller(a, 6.0, ARCH) -> smaller(a, 6.000000476837158, ARCH)",
        "kernels e2m1_encode_magnitudes: constant: 6.0 * UNIT -> 6.000000476837158 * UNIT",
        "kernels e2m1_encode_magnitudes: constant: 6.0 * UNIT -> 6.000000476837158 * UNIT (2)",
    ),
    "By the conversion to e4m3, magnitudes above 6 and NaN have the code of 6 without a minimum.": (
        "kernels e2m1_encode: comparison: ARCH < 89 -> ARCH <= 89",
        "kernels e2m1_encode: constant: ARCH < 89 -> ARCH < 90",
    ),
    "Both ways give the signs: a GPU's arithmetic makes positive NaN only.": (
        "kernels e2m1_signs: comparison: ARCH >= 89 -> ARCH > 89",
        "kernels e2m1_signs: constant: ARCH >= 89 -> ARCH >= 90",
    ),
    "Of 2^-6 both ways give the byte 8.": (
        "kernels e4m3_encode: comparison: x < 0.015625 -> x <= 0.015625",
        "kernels e4m3_encode: constant: x < 0.015625 -> x < 0.01562500186264515",
    ),
    "Of a power of two, and of that power and a sixteenth more, the logarithm is rounded to the same.": (
        "kernels _sum_of_squares: constant: x.shape[1] * 16 -> x.shape[1] * 17",
    ),
    "A step more reads words of the same expert, or none.": (
        "kernels amax_kernel: index: tl.static_range(STEPS) -> tl.static_range(STEPS + 1)",
    ),
    "An encode scale of weights is at least 2^-117: of fp16 and bf16, and of what a bias allows.": (
        "kernels load_weights_kernel: rounding: flush(encode, FTZ, ARCH) -> encode",
    ),
    "The row is 0, by which the number of blocks is multiplied.": (
        "kernels load_weights_kernel: constant: load_blocks(source, tl.zeros((1, 1), tl.int64), "
        "index, live, 0, DTYPE) -> load_blocks(source, tl.zeros((1, 1), tl.int64), index, live, 1, "
        "DTYPE)",
    ),
    "The factor is 1.": (
        "kernels store_weights: operator: mul(x, tl.zeros_like(x) + 1.0, False, ARCH) -> div(x, "
        "tl.zeros_like(x) + 1.0, False, ARCH)",
    ),
    "Any number that is no other form's stands for this one, here and in the launch.": (
        "kernels CODES: constant: tl.constexpr(2) -> tl.constexpr(3)",
    ),
    "Any number but 0 marks a chosen group.": (
        "kernels _in_best_groups: constant: tl.where(group == largest, 1, chosen) -> tl.where(group "
        "== largest, 2, chosen)",
    ),
    "Every launch gives the argument.": (
        "kernels route_kernel: constant: 1 -> 2",
        "kernels route_kernel: constant: 1 -> 2 (2)",
    ),
    "The one group is chosen.": (
        "kernels route_kernel: comparison: GROUPS > 1 -> GROUPS >= 1 (2)",
    ),
    "Calls on one stream have done every copy that they have begun.": (
        "kernels take_kernel: index: tl.load(counts_ptr + 1) -> tl.load(counts_ptr + 1 + 1)",
        "kernels take_kernel: constant: counts_ptr + 1 -> counts_ptr + 2",
    ),
    "An ulp of a factor of a derivative, which is rounded to bf16 and has no bits of the contract.": (
        "kernels _bounded: constant: 1.0 - t * t -> 1.0000001192092896 - t * t",
        "kernels with_slope: constant: tl.where(tl.abs(g) < 2.0 ** (-30), 0.5, y / g) -> "
        "tl.where(tl.abs(g) < 2.0 ** (-30), 0.5000000596046448, y / g)",
        "kernels with_slope: constant: 0.3989422804014327 * tl.exp(g * g * -0.5) -> "
        "0.39894232153892517 * tl.exp(g * g * -0.5)",
        "kernels with_slope: constant: -0.5 -> -0.5000000596046448",
        "kernels with_slope: constant: 1.5957691216057308 * (g + 0.044715 * g * g * g) -> "
        "1.5957692861557007 * (g + 0.044715 * g * g * g)",
        "kernels with_slope: constant: 0.044715 * g -> 0.04471500217914581 * g",
        "kernels with_slope: constant: 1.5957691216057308 * (1.0 + 0.134145 * g * g) -> "
        "1.5957692861557007 * (1.0 + 0.134145 * g * g)",
        "kernels with_slope: constant: 1.0 + 0.134145 * g * g -> 1.0000001192092896 + 0.134145 * g * g",
        "kernels with_slope: constant: 0.134145 * g -> 0.13414502143859863 * g",
        "kernels with_slope: constant: 2.0 * y -> 2.000000238418579 * y",
        "kernels with_slope: constant: tl.full(g.shape, 1.0, tl.float32) -> tl.full(g.shape, "
        "1.0000001192092896, tl.float32)",
        "kernels gated_with_slopes: constant: tl.full(gate.shape, 1.0, tl.float32) -> "
        "tl.full(gate.shape, 1.0000001192092896, tl.float32)",
        "kernels activation_gradient_kernel: constant: tl.full((), 7.0, tl.float32) -> tl.full((), "
        "7.000000476837158, tl.float32)",
    ),
    "From 2^-31 to 2^-30 the quotient is 1/2 too, but for a few ulp.": (
        "kernels with_slope: comparison: tl.abs(g) < 2.0 ** (-30) -> tl.abs(g) <= 2.0 ** (-30)",
        "kernels with_slope: constant: 2.0 ** (-30) -> 2.000000238418579 ** (-30)",
        "kernels with_slope: constant: -30 -> -31",
    ),
    "At the limit both sides are the limit.": (
        "kernels _limited: comparison: tl.abs(x) > limit -> tl.abs(x) >= limit",
        "kernels _limited_above: comparison: x > limit -> x >= limit",
    ),
    "Zero is within every limit.": ("kernels _limited: comparison: x < 0 -> x <= 0",),
    "Triton multiplies fp32 by a truth value as by 0.0 or 1.0.": (
        "kernels _limited: rounding: (tl.abs(x) <= limit).to(tl.float32) -> tl.abs(x) <= limit",
        "kernels _limited_above: rounding: (x <= limit).to(tl.float32) -> x <= limit",
        "kernels with_slope: rounding: (g > 0).to(tl.float32) -> g > 0",
    ),
}
"""Keys of `rules.Generated`, by reason."""
