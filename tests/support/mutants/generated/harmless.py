"""Generated mutants that nothing can catch, since what they change stays inside the contract: why."""

# SPDX-License-Identifier: Apache-2.0

HARMLESS: dict[str, tuple[str, ...]] = {
    "The tensor is a matrix there: its last dimension is the dimension 1.": (
        "reference _softmax_of_all: operator: -1 -> 1",
        "reference activate: operator: -1 -> 1",
        "reference _values: operator: -1 -> 1",
        "reference hidden_values: operator: -1 -> 1",
        "reference silu_and_mul: operator: -1 -> 1",
        "reference _fp32_per_token: operator: -1 -> 1",
        "reference _split: operator: -1 -> 1",
        "reference _softmax: operator: -1 -> 1",
        "reference _warp_sum: operator: -1 -> 1",
        "reference _warp_sum: operator: -1 -> 1 (2)",
    ),
    "An ulp of a factor of an activation, whose last bits are free (`bounds/activation.py`).": (
        "reference STEP_LIMIT: constant: 7.0 -> 7.000000476837158",
        "reference _situ: constant: 1.0 if s.alpha is None else s.alpha -> 1.0000001192092896 if "
        "s.alpha is None else s.alpha",
        "reference _situ: constant: 1.0 if s.beta is None else s.beta -> 1.0000001192092896 if s.beta "
        "is None else s.beta",
        "kernels limit_of_expert: constant: 7.0 / gate_scale -> 7.000000476837158 / gate_scale",
        "kernels sigmoid: constant: tl.where(x < 0, e, 1.0) -> tl.where(x < 0, e, 1.0000001192092896)",
        "kernels sigmoid: constant: 1.0 + e -> 1.0000001192092896 + e",
        "kernels tanh: constant: tl.fma(z, 0.016437575221061707, -0.05267181247472763) -> tl.fma(z, "
        "0.016437577083706856, -0.05267181247472763)",
        "kernels tanh: constant: -0.05267181247472763 -> -0.05267181620001793",
        "kernels tanh: constant: tl.fma(z, p, 0.13320724666118622) -> tl.fma(z, p, 0.1332072615623474)",
        "kernels tanh: constant: -0.3333294689655304 -> -0.3333294987678528",
        "kernels tanh: constant: tl.fma(z, p, 1.0) -> tl.fma(z, p, 1.0000001192092896)",
        "kernels tanh: constant: 1.0 - 2.0 / (1.0 + tl.exp(2.0 * a)) -> 1.0000001192092896 - 2.0 / "
        "(1.0 + tl.exp(2.0 * a))",
        "kernels tanh: constant: 2.0 / (1.0 + tl.exp(2.0 * a)) -> 2.000000238418579 / (1.0 + "
        "tl.exp(2.0 * a))",
        "kernels tanh: constant: 1.0 + tl.exp(2.0 * a) -> 1.0000001192092896 + tl.exp(2.0 * a)",
        "kernels tanh: constant: 2.0 * a -> 2.000000238418579 * a",
        "kernels gelu: constant: 1.0 / tl.fma(tl.abs(x), 0.2121320366859436, 1.0) -> "
        "1.0000001192092896 / tl.fma(tl.abs(x), 0.2121320366859436, 1.0)",
        "kernels gelu: constant: tl.fma(tl.abs(x), 0.2121320366859436, 1.0) -> tl.fma(tl.abs(x), "
        "0.2121320515871048, 1.0)",
        "kernels gelu: constant: tl.fma(tl.abs(x), 0.2121320366859436, 1.0) -> tl.fma(tl.abs(x), "
        "0.2121320366859436, 1.0000001192092896)",
        "kernels gelu: constant: -0.064114511013031 -> -0.0641145184636116",
        "kernels gelu: constant: tl.fma(t, -0.064114511013031, 0.23972533643245697) -> tl.fma(t, "
        "-0.064114511013031, 0.23972535133361816)",
        "kernels gelu: constant: -0.2499992698431015 -> -0.2499992847442627",
        "kernels gelu: constant: tl.fma(t, p, 0.2670243978500366) -> tl.fma(t, p, 0.267024427652359)",
        "kernels gelu: constant: -0.04272272437810898 -> -0.04272272810339928",
        "kernels gelu: constant: tl.fma(t, p, 0.10554798692464828) -> tl.fma(t, p, "
        "0.10554799437522888)",
        "kernels gelu: constant: tl.fma(t, p, 0.07464940845966339) -> tl.fma(t, p, "
        "0.07464941591024399)",
        "kernels gelu: constant: tl.fma(t, p, 0.0852915421128273) -> tl.fma(t, p, 0.0852915495634079)",
        "kernels gelu: constant: tl.fma(t, p, 0.08459782600402832) -> tl.fma(t, p, "
        "0.08459783345460892)",
        "kernels gelu: constant: -0.5 -> -0.5000000596046448",
        "kernels gelu: constant: 1.0 - q -> 1.0000001192092896 - q",
        "kernels gelu_tanh: constant: 1.5957691216057308 * (x + 0.044715 * x * x * x) -> "
        "1.5957692861557007 * (x + 0.044715 * x * x * x)",
        "kernels gelu_tanh: constant: 0.044715 * x -> 0.04471500217914581 * x",
    ),
    "The next operation has an operand of the wider type, to which torch promotes exactly.": (
        "reference fused_moe: rounding: steps['intermediate'].float() -> steps['intermediate']",
        "reference fused_moe: rounding: rows.float() -> rows",
        "reference finalize: rounding: weights.float() -> weights",
        "reference fma: rounding: a.double() -> a",
        "reference fma: rounding: b.double() -> b",
        "reference fma: rounding: c.double() -> c",
        "reference add_rmsnorm: rounding: x.float() -> x",
        "reference add_rmsnorm: rounding: residual.float() -> residual",
        "reference _normalized: rounding: weight.float() -> weight",
        "reference quantize_per_token: rounding: x.float() -> x",
        "reference quantize_global_scale: rounding: x.float() -> x",
        "reference _e4m3_blocks: rounding: values.float() -> values",
        "reference _e4m3_blocks: rounding: values.float() -> values (2)",
        "reference route: rounding: bias.float() -> bias",
        "reference in_raw_units: rounding: value.float() -> value",
        "reference ex2_approx_ftz: rounding: significand.double() -> significand",
    ),
    "It is an fp32 element, by the contract of the argument.": (
        "reference quantize_per_token: rounding: out_scale.float() -> out_scale",
    ),
    "What is between 448 and the next number rounds to 448.": (
        "reference MAX: constant: 448.0 -> 448.0000305175781",
    ),
    "The reciprocal of infinity is subnormal by its exponent, hence flushed to 0 before.": (
        "reference rcp_approx_ftz: constant: magnitude == 2139095040 -> magnitude == 2139095041",
        "kernels rcp: constant: magnitude == 2139095040 -> magnitude == 2139095041",
    ),
    "1 shifted by nothing is 1.": ("reference FOUR_OVER_SIX: operator: 1 << 0 -> 1 >> 0",),
    "As int32 both are the sign bit.": (
        "reference rcp_approx_ftz: operator: -2147483648 -> 2147483648",
    ),
    "The last two sizes of a tensor of one or two dimensions have its number of elements.": (
        "reference to_linear: comparison: scales.dim() > 1 -> scales.dim() >= 1",
        "reference to_linear: constant: scales.dim() > 1 -> scales.dim() > 2",
    ),
    "At 8192 tokens and above the number of blocks is above 1184 with either.": (
        "reference split_k_groups: constant: min(tokens, 8192) -> min(tokens, 8193)",
    ),
    "With 4 slots the loop gives 1, with more than 4 at least 2.": (
        "reference split_k_groups: comparison: 4 < top_k <= 64 -> 4 <= top_k <= 64",
        "reference split_k_groups: constant: 1 -> 2 (2)",
    ),
    "It is read where something was lost alone: the error is not 0 there, nor the sum.": (
        "kernels fma: comparison: error > 0 -> error >= 0",
        "kernels fma: comparison: total > 0 -> total >= 0",
        "reference fma: comparison: error > 0 -> error >= 0",
        "reference fma: comparison: total > 0 -> total >= 0",
    ),
    "At the bound itself both sides are the bound; above 88.73 the exponential is infinite.": (
        "reference (LOWEST, HIGHEST): constant: (-87.0, 89.0) -> (-87.0, 89.00000762939453)",
        "reference exp: comparison: t < LOWEST -> t <= LOWEST",
        "reference exp: comparison: t > HIGHEST -> t >= HIGHEST",
    ),
    "The two exponents differ by multiples of 2^9, which the shift by 23 drops.": (
        "reference exp: operator: shifted.view(torch.int32) - 1262485504 -> shifted.view(torch.int32) "
        "+ 1262485504",
    ),
    "Both factors are powers of two that fp32 holds, with the same product.": (
        "reference exp: constant: power >> 1 -> power >> 2",
    ),
    "More zeros are added, which changes no sum; of a multiple of 16 the bit length is the same.": (
        "reference sum_of_squares: constant: 1 << (x.shape[1] - 1).bit_length() -> 2 << (x.shape[1] - "
        "1).bit_length()",
        "reference sum_of_squares: operator: x.shape[1] - 1 -> x.shape[1] + 1",
        "reference sum_of_squares: constant: x.shape[1] - 1 -> x.shape[1] - 2",
    ),
    "Zeros behind the last lane change no sum of the butterfly.": (
        "reference _warp_sum: constant: 1 << (values.shape[-1] - 1).bit_length() -> 2 << "
        "(values.shape[-1] - 1).bit_length()",
        "reference _warp_sum: operator: values.shape[-1] - 1 -> values.shape[-1] + 1",
    ),
    "No groups, 0 and 1 mean the same.": (
        "reference Routing.__post_init__: constant: self.n_group or 0 -> self.n_group or 1",
        "reference Routing.grouped: constant: self.n_group or 0 -> self.n_group or 1",
    ),
    "Only routings with groups come here, which have both numbers.": (
        "reference indivisible: constant: routing.n_group or 1 -> routing.n_group or 2",
        "reference indivisible: constant: routing.topk_group or 1 -> routing.topk_group or 2",
        "reference _grouped_refusal: constant: routing.n_group or 1 -> routing.n_group or 2",
        "reference _grouped_refusal: constant: routing.topk_group or 1 -> routing.topk_group or 2",
        "reference _limit_to_groups: constant: routing.n_group or 1 -> routing.n_group or 2",
    ),
    "Of what is taken the first two are read.": ("reference _limit_to_groups: constant: :2 -> :3",),
    "torch fills an int32 with its sign, however far it is shifted.": (
        "reference _key: constant: bits >> 31 -> bits >> 32",
    ),
    "A sum of scores is 0 or at least 2^-25, to which 1e-20 adds nothing; of 0 all scores are 0.": (
        "reference route: constant: _warp_sum(chosen) + 1e-20 -> _warp_sum(chosen) + "
        "1.0000000490448792e-20",
        "kernels route_kernel: constant: _warp_sum(tl.where(live, chosen, 0.0)) + 1e-20 -> "
        "_warp_sum(tl.where(live, chosen, 0.0)) + 1.0000000490448792e-20",
        "kernels route_kernel: constant: larger(_warp_sum(tl.where(live, chosen, 0.0)), 1e-20, ARCH) "
        "-> larger(_warp_sum(tl.where(live, chosen, 0.0)), 1.0000000490448792e-20, ARCH)",
    ),
    "Where both sides agree within the last bits, which are free (`bounds/activation.py`).": (
        "reference sigmoid: comparison: x < -88 -> x <= -88",
        "reference silu: comparison: x < -88 -> x <= -88",
        "reference gelu_tanh: comparison: x < -1 -> x <= -1",
        "kernels sigmoid: comparison: x < 0 -> x <= 0",
        "kernels tanh: comparison: a < 0.55 -> a <= 0.55",
        "kernels tanh: constant: a < 0.55 -> a < 0.5500000715255737",
        "kernels tanh: comparison: x < 0 -> x <= 0",
        "kernels gelu: comparison: x < 0 -> x <= 0",
    ),
    "What is clamped otherwise is not chosen; below -100 the sigmoid is 0.": (
        "reference sigmoid: operator: -88 -> 88 (2)",
        "reference silu: operator: -88 -> 88 (2)",
        "reference gelu_tanh: operator: -1 -> 1",
        "reference gelu_tanh: constant: -1 -> -2 (3)",
        "reference gelu_tanh: constant: -100 -> -101",
    ),
    "At the limit itself both sides are the limit, and the ratio of the two is 1.": (
        "reference weight_encode_scale: comparison: encode > MOST_OF_WEIGHTS -> encode >= "
        "MOST_OF_WEIGHTS",
        "reference weight_encode_scale: comparison: encode > most -> encode >= most",
        "reference _finite: comparison: x > LARGEST -> x >= LARGEST",
        "reference raised: comparison: decode < least -> decode <= least",
    ),
    "Where no scale is raised the bytes that were given are kept.": (
        "reference raised: constant: torch.where(low, decode / least, 1.0) -> torch.where(low, decode "
        "/ least, 1.0000001192092896)",
    ),
    "A reload has been refused unless it gives what the experts hold, and nothing else.": (
        "reference _write_static_scales: operator: scale is not None and amax is not None -> scale is "
        "not None or amax is not None",
        "reference _write_parameters: operator: e.gemm1_bias is not None and options.w13_bias is not "
        "None -> e.gemm1_bias is not None or options.w13_bias is not None",
        "reference _write_parameters: operator: e.gemm2_bias is not None and options.w2_bias is not "
        "None -> e.gemm2_bias is not None or options.w2_bias is not None",
    ),
    "The next expert's scalar is written after this one, and there is none behind the last.": (
        "reference write_by_reference: constant: e + 1 -> e + 2",
    ),
    "The division flushes it, and a sum that has a 1 in it does not show it.": (
        "reference Exact.exp: rounding: flush(torch.exp(x.double()).float()) -> "
        "torch.exp(x.double()).float()",
        "kernels _exp: rounding: flush(tl.exp(x.to(tl.float64)).to(tl.float32), True, ARCH) -> "
        "tl.exp(x.to(tl.float64)).to(tl.float32)",
    ),
    "The other factor of the product is 0 there.": (
        "kernels decode_kernel: constant: 0 -> 1",
        "kernels decode_kernel: constant: 0 -> 1 (2)",
    ),
    "The store has the same mask: what is loaded outside of it is not used.": (
        "kernels finalize_kernel: constant: 0.0 -> 1.0",
        "kernels _expert_tile: constant: 0.0 -> 1.0",
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
    "A tile half as wide is taken where it holds the rows, or not at all; the sums are the same.": (
        "kernels expert_gemm_kernel: operator: BN >= 32 and (not NATIVE) and (w_ptr.dtype.element_ty "
        "!= tl.bfloat16) -> BN >= 32 or not NATIVE or w_ptr.dtype.element_ty != tl.bfloat16",
        "kernels expert_gemm_kernel: comparison: BN >= 32 -> BN > 32",
        "kernels expert_gemm_kernel: constant: BN >= 32 -> BN >= 33",
        "kernels expert_gemm_kernel: operator: not NATIVE -> NATIVE",
        "kernels expert_gemm_kernel: comparison: end - first <= BN // 2 -> end - first < BN // 2",
        "kernels expert_gemm_kernel: operator: end - first -> end + first",
        "kernels expert_gemm_kernel: operator: BN // 2 -> BN % 2",
        "kernels expert_gemm_kernel: constant: BN // 2 -> BN // 3",
        "kernels expert_gemm_kernel: comparison: w_ptr.dtype.element_ty != tl.bfloat16 -> "
        "w_ptr.dtype.element_ty == tl.bfloat16",
    ),
    "That tile has codes; the place is of decoded weights, whose tile is whole.": (
        "kernels expert_gemm_kernel: operator: expert - first_expert -> expert + first_expert",
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
    ),
    "The one launch has a chunk for all slots, so that its loops end after one.": (
        "kernels permute_kernel: index: range(0, N, CHUNK) -> range(0, N, CHUNK + 1)",
        "kernels permute_kernel: index: range(0, N, CHUNK) -> range(0, N, CHUNK + 1) (2)",
        "kernels permute_kernel: operator: row += tl.sum(here) -> row -= tl.sum(here)",
    ),
    "0 is added, or to a bin of no expert, which nobody reads.": (
        "kernels count_kernel: comparison: counts > 0 -> counts >= 0",
        "kernels count_kernel: comparison: bins < E -> bins <= E (2)",
        "kernels count_kernel: operator: (bins < E) & (counts > 0) -> (bins < E) | (counts > 0)",
    ),
    "Bins before an expert alone are summed, and none behind the last expert is read.": (
        "kernels masked_rows_kernel: constant: 0 -> 1",
        "kernels permute_kernel: comparison: local < E -> local <= E",
        "kernels count_kernel: comparison: local < E -> local <= E",
    ),
    "Behind the last chunk nothing is stored, and no step follows.": (
        "kernels offset_kernel: constant: 0 -> 1",
    ),
    "Any negative row is no row.": (
        "kernels finalize_kernel: constant: -1 -> -2",
        "kernels load_places: constant: -1 -> -2",
        "kernels load_places: constant: -1 -> -2 (2)",
    ),
    "The number takes the type of the tensor.": (
        "kernels store_fragments: rounding: tl.where(column < K, x, 0.0).to(x.dtype) -> "
        "tl.where(column < K, x, 0.0)",
    ),
    "With one slot both sides are 1.": (
        "kernels store_at_places: constant: SLOTS > 0 -> SLOTS > 1",
    ),
    "Columns behind K are made zero, and rows that are not live go nowhere.": (
        "kernels rows_kernel: constant: 0.0 -> 1.0",
    ),
    "In the end NaN is given back as it came.": (
        "kernels ex2_approx: constant: tl.where(x == x, tl.where(tl.abs(x) < 1000.0, tl.abs(x), "
        "1000.0), 0.0) -> tl.where(x == x, tl.where(tl.abs(x) < 1000.0, tl.abs(x), 1000.0), 1.0)",
    ),
    "How many results are finished at a time changes none of them.": (
        "kernels _at_once: operator: min(tokens, 4096 * 8 // (columns * bits)) -> max(tokens, 4096 * 8 "
        "// (columns * bits))",
        "kernels _at_once: constant: 4096 * 8 -> 4097 * 8",
        "kernels _at_once: constant: 4096 * 8 -> 4096 * 9",
        "kernels _at_once: operator: columns * bits -> columns / bits",
    ),
    "The second number of the version is not read: Triton gives the same code.": (
        "kernels sums_layout: constant: [3, 0] -> [3, 1]",
    ),
    "No stage is released in the first step, and each step sets the next one.": (
        "kernels _sums: constant: 0 -> 1 (2)",
    ),
    "The rows of all experts are fewer than 2^31, since TMA's coordinates have 32 bits.": (
        "kernels _consume: rounding: expert.to(gl.int64) -> expert",
    ),
    "A step more multiplies zeros, which TMA gives beyond K; K is a multiple of 16.": (
        "kernels expert_gemm_kernel: operator: K + GROUPS * 128 - 1 -> K + GROUPS * 128 + 1",
        "kernels expert_gemm_kernel: constant: K + GROUPS * 128 - 1 -> K + GROUPS * 128 - 2",
        "kernels expert_gemm_kernel: constant: GROUPS * 128 -> GROUPS * 129",
    ),
    "It is added to zeros of int64.": (
        "kernels rows_kernel: rounding: tl.program_id(0).to(tl.int64) -> tl.program_id(0)",
    ),
    "Both rows are the same one.": ("kernels rows_kernel: constant: (1, 1) -> (2, 1)",),
    "BK divides K, so that there are as many steps.": (
        "kernels decoded_sums: constant: tl.range(0, K, BK, num_stages=STAGES) -> tl.range(1, K, BK, "
        "num_stages=STAGES)",
    ),
    "The conversion to an integer drops what an ulp adds.": (
        "reference encode: constant: a.round().add_(2.0) -> a.round().add_(2.000000238418579)",
        "reference encode: constant: a.mul_(0.5).round_().add_(4.0) -> "
        "a.mul_(0.5).round_().add_(4.000000476837158)",
    ),
    "A shift by more than all bits of a number leaves its sign, too.": (
        "reference encode: constant: x.view(torch.int32) >> 31 -> x.view(torch.int32) >> 32",
    ),
    "The nearest fp32 number is the same one.": (
        "reference _MAX_SUBNORMAL: constant: 2.0 ** (-149) -> 2.000000238418579 ** (-149)",
    ),
    "Any negative number stands for NaN.": (
        "reference max_ignoring_nan: constant: -1.0 -> -1.0000001192092896",
    ),
    "An ulp of a sum of two products or more, whose order is free: the interval is wider.": (
        "kernels decoded_sums: constant: acc * 256.0 -> acc * 256.0000305175781",
        "kernels sums: constant: acc * 256.0 -> acc * 256.0000305175781",
        "kernels _finish: constant: acc * 256.0 -> acc * 256.0000305175781",
    ),
    "The two zeros lie in the same interval.": (
        "kernels activated: comparison: g <= 0 -> g < 0",
        "kernels activated: comparison: g <= 0 -> g < 0 (2)",
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
    "Slots behind K are not stored.": (
        "kernels route_kernel: index: tl.static_range(K) -> tl.static_range(K + 1)",
    ),
    "The next operation has an operand of the wider type, to which Triton promotes exactly.": (
        "kernels finalize_kernel: rounding: tl.load(weights_ptr + token * K + k).to(tl.float32) -> "
        "tl.load(weights_ptr + token * K + k)",
        "kernels ex2_approx: rounding: tl.load(table_ptr + (steps & 8388607)).to(tl.float64) -> "
        "tl.load(table_ptr + (steps & 8388607))",
        "kernels rcp: rounding: tl.load(rcp_delta_ptr + significand).to(tl.int32) -> "
        "tl.load(rcp_delta_ptr + significand)",
    ),
    "Triton adds up truth values as int32.": (
        "kernels permute_kernel: rounding: (local == expert).to(tl.int32) -> local == expert",
    ),
    "What is loaded for a slot of no local expert is not used.": (
        "kernels place_kernel: constant: 0 -> 1",
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
    ),
    "Without per-token scales READ is 0; with them nothing reads what is loaded more.": (
        "kernels quantize_kernel: comparison: MODE != PER_TOKEN -> MODE == PER_TOKEN",
    ),
    "Every use flushes it, or the row's blocks are zeros, which have code and scale 0.": (
        "kernels quantize_kernel: rounding: flush(row_amax, FTZ, ARCH) -> row_amax",
        "kernels quantize_kernel: rounding: flush(encode, FTZ, ARCH) -> encode",
    ),
    "Every program of a row stores the same.": (
        "kernels quantize_kernel: constant: tl.program_id(1) -> tl.program_id(2) (3)",
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
        "kernels store_codes: rounding: tl.where(mask, byte, 0).to(tl.uint8) -> tl.where(mask, byte, "
        "0)",
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
    "The product flushes its operands.": (
        "reference Hopper.exp: rounding: flush(x) -> x",
        "reference Hopper.sigmoid: rounding: flush(x) -> x",
    ),
    "It is 0 or at least 2^-25.": (
        "reference Hopper.sigmoid: rounding: flush((0.5 * tanh.double() + 0.5).float()) -> (0.5 * "
        "tanh.double() + 0.5).float()",
    ),
    "A product with a power of two is exact in fp32 too, so that there is one rounding.": (
        "reference Hopper.sigmoid: rounding: tanh.double() -> tanh",
        "reference ex2_approx_ftz: rounding: x.abs().double() -> x.abs()",
        "kernels ex2_approx: rounding: size.to(tl.float64) -> size",
    ),
    "Of subnormal numbers and of 0 the steps are 0, with either sign.": (
        "kernels ex2_approx: rounding: flush(x, True, ARCH) -> x",
        "kernels ex2_approx: comparison: x < 0 -> x <= 0",
        "reference ex2_approx_ftz: rounding: flush(x) -> x",
        "reference ex2_approx_ftz: comparison: x < 0 -> x <= 0",
    ),
    "Beyond the limit the result is 0 or infinity.": (
        "reference ex2_approx_ftz: constant: 1000.0 -> 1000.0000610351562",
        "kernels ex2_approx: comparison: tl.abs(x) < 1000.0 -> tl.abs(x) <= 1000.0",
        "kernels ex2_approx: constant: tl.abs(x) < 1000.0 -> tl.abs(x) < 1000.0000610351562",
        "kernels ex2_approx: constant: tl.where(tl.abs(x) < 1000.0, tl.abs(x), 1000.0) -> "
        "tl.where(tl.abs(x) < 1000.0, tl.abs(x), 1000.0000610351562)",
    ),
    "The conversion to fp32 gives infinity too.": (
        "reference ex2_approx_ftz: comparison: y >= 2.0 ** 128 -> y > 2.0 ** 128",
        "reference ex2_approx_ftz: constant: 2.0 ** 128 -> 2.000000238418579 ** 128",
        "reference ex2_approx_ftz: constant: 2.0 ** 128 -> 2.0 ** 129",
        "kernels ex2_approx: comparison: y < _TOO_LARGE -> y <= _TOO_LARGE",
        "kernels _TOO_LARGE: constant: 2.0 ** 128 -> 2.000000238418579 ** 128",
        "kernels _TOO_LARGE: constant: 2.0 ** 128 -> 2.0 ** 129",
    ),
    "No fp32 gate has the argument -8: it passes from one side to the other near -4.86.": (
        "reference _geglu_tanh: comparison: _inner(gate) <= -8 -> _inner(gate) < -8",
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
}
"""Keys of `rules.Generated`, by reason."""


def reason(key: str) -> str | None:
    """Why a mutant is harmless; None if nobody has said."""
    return next((why for why, keys in HARMLESS.items() if key in keys), None)
