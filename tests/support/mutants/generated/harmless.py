"""Generated mutants that nothing can catch, since what they change stays inside the contract: why."""

# SPDX-License-Identifier: Apache-2.0
from .harmless_hopper import OF_HOPPER
from .harmless_kernels import OF_KERNELS
from .harmless_quantizer import OF_QUANTIZER

_OF_REFERENCE: dict[str, tuple[str, ...]] = {
    "The tensor is a matrix there: its last dimension is the dimension 1.": (
        "reference _softmax_of_all: operator: -1 -> 1",
        "reference activate: operator: -1 -> 1",
        "reference hidden_values: operator: -1 -> 1",
        "reference silu_and_mul: operator: -1 -> 1",
        "reference _fp32_per_token: operator: -1 -> 1",
        "reference _split: operator: -1 -> 1",
        "reference _softmax: operator: -1 -> 1",
        "reference _warp_sum: operator: -1 -> 1",
        "reference _warp_sum: operator: -1 -> 1 (2)",
        "reference decoded_rows: operator: -1 -> 1",
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
        "reference fma: rounding: (flush(c) if ftz else c).double() -> flush(c) if ftz else c",
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
    "Where autograd records nothing, its function returns the same value.": (
        "reference _approximated: operator: torch.is_grad_enabled() and any((t.requires_grad for t in "
        "given)) -> torch.is_grad_enabled() or any((t.requires_grad for t in given))",
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
        "kernels _exp: comparison: t < -87.0 -> t <= -87.0",
        "kernels _exp: comparison: t > 89.0 -> t >= 89.0",
        "kernels _exp: constant: t > 89.0 -> t > 89.00000762939453",
        "kernels _exp: constant: tl.where(t > 89.0, 89.0, t) -> tl.where(t > 89.0, 89.00000762939453, "
        "t)",
    ),
    "The two exponents differ by multiples of 2^9, which the shift by 23 drops.": (
        "reference exp: operator: shifted.view(torch.int32) - 1262485504 -> shifted.view(torch.int32) "
        "+ 1262485504",
        "kernels _exp: operator: shifted.to(tl.int32, bitcast=True) - 1262485504 -> "
        "shifted.to(tl.int32, bitcast=True) + 1262485504",
    ),
    "Both factors are powers of two that fp32 holds, with the same product.": (
        "reference exp: constant: power >> 1 -> power >> 2",
        "kernels _exp: constant: power >> 1 -> power >> 2",
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
        "kernels slot_weights: constant: _warp_sum(tl.where(live, chosen, 0.0)) + 1e-20 -> "
        "_warp_sum(tl.where(live, chosen, 0.0)) + 1.0000000490448792e-20",
        "kernels slot_weights: constant: larger(_warp_sum(tl.where(live, chosen, 0.0)), 1e-20, ARCH) "
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
        "kernels _finite: comparison: x > LARGEST -> x >= LARGEST",
        "kernels load_weights_kernel: comparison: encode > most -> encode >= most",
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
}
"""Keys of `rules.Generated`, by reason: of the reference, and of kernels with the same reason."""
HARMLESS = _OF_REFERENCE | OF_KERNELS | OF_HOPPER | OF_QUANTIZER


def reason(key: str) -> str | None:
    """Why a mutant is harmless; None if nobody has said."""
    return next((why for why, keys in HARMLESS.items() if key in keys), None)
