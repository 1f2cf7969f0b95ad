"""BF16, FP8 and MXFP8 experts: quantizers by hand, and FlashInfer's Python on what its layers get.

Its trace references unshuffle the rows and apply the scales by themselves, so a wrong preparation shows;
they neither quantize nor round the intermediate: here ours does not, either. Its preparation runs on the
CPU as far as it is Python.
"""

# SPDX-License-Identifier: Apache-2.0
import math
from dataclasses import replace

import moe_cases
import pytest
import torch
from assertions import assert_bitwise
from moe_cases import Shape

from nvfp4_moe.kernels.baseline_moe.call import BaselineCall
from nvfp4_moe.kernels.flashinfer import baseline_moe as adapter
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.moe import baseline_moe as reference
from nvfp4_moe.reference.moe import fp8
from nvfp4_moe.reference.moe.baseline_moe import (
    FORMATS,
    baseline_moe,
    prepare_baseline,
    quantize_for,
)
from nvfp4_moe.reference.moe.finalize import finalize
from nvfp4_moe.reference.moe.routing import Routing, RoutingMethodType
from nvfp4_moe.reference.numerics import e4m3
from nvfp4_moe.reference.numerics.fp32 import rcp_approx_ftz

SWIGLU, STEP, RELU2 = ActivationType.Swiglu, ActivationType.SwigluStep, ActivationType.Relu2
AMAX = {"input_amax": 40.0, "intermediate_amax": 30.0}


def trace():
    name = "flashinfer.trace.templates.moe"
    return pytest.importorskip(name, reason="needs flashinfer-python")


def preparation():
    return pytest.importorskip("flashinfer.fused_moe.prepare", reason="needs flashinfer-python")


SHAPE = Shape(6, 256, 128, 4, 2)


def made(format, kind=SWIGLU, shape=SHAPE, seed=0):
    """(experts, activations, ids, weights)."""
    w13, w2 = moe_cases.weights_of(shape, kind, seed)
    maxima = AMAX if format == "fp8 per tensor" else {}
    experts = prepare_baseline(format, w13, w2, kind, **maxima)
    x = moe_cases.hidden_states(shape, seed)
    return experts, quantize_for(x, experts), *moe_cases.routing_of(shape, seed)


# Quantizers


def wide(rows=64, columns=256):
    """bf16 over most of its exponents, with zeros."""
    g = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, columns, generator=g)
    x *= torch.exp2(torch.linspace(-120, 100, rows))[:, None]
    x[:, ::7] = 0
    x[3] = 0
    return x.bfloat16()


def e4m3_of(value):
    """The code of a number, by search over the finite ones: nearest, ties to even, saturating."""
    values = e4m3.decode(torch.arange(0x7F, dtype=torch.uint8)).double().tolist()
    code = min(range(0x7F), key=lambda i: (abs(values[i] - abs(value)), i % 2))
    return code | (0x80 if math.copysign(1, value) < 0 else 0)


def mxfp8_of(block):
    """(codes, byte) of 32 numbers, by the formula in Python's own floats."""
    largest = max((abs(v) for v in block if not math.isnan(v)), default=math.nan)
    reciprocal = rcp_approx_ftz(torch.tensor(448.0)).item()
    ratio = torch.tensor(largest * reciprocal, dtype=torch.float64).float().item()
    if math.isnan(ratio):
        return [0x7E] * 32, 255
    mantissa, exponent = math.frexp(ratio)  # in [1/2, 1)
    power = exponent - 1 if mantissa == 0.5 else exponent
    if ratio < 2.0**-126:  # flushed, as subnormal values are
        power, block = -127, [math.copysign(0, v) for v in block]
    block = [math.copysign(0, v) if abs(v) < 2.0**-126 else v for v in block]
    return [0x7E if math.isnan(v) else e4m3_of(math.ldexp(v, -power)) for v in block], power + 127


def test_mxfp8_is_the_scalar_model():
    x = wide()
    x[5, 3] = math.nan
    x[7, :32] = math.nan
    x[9, :32] = 448 * 2.0**20  # its scale is a power of two exactly
    x[10, :32] = 450.0  # the next above it
    q = fp8.quantize_mxfp8(x)
    for row, codes, scales in zip(x.tolist(), q.codes.view(torch.uint8), q.scale, strict=True):
        for i in range(0, x.shape[1], 32):
            want, byte = mxfp8_of(row[i : i + 32])
            assert scales[i // 32] == byte
            assert codes[i : i + 32].tolist() == want, (row[i : i + 32], byte)
    assert q.scale[7, 0] == 255 and q.scale[9, 0] == 147 and q.scale[10, 0] == 128
    assert q.codes[5].float()[3] == 448


def test_mxfp8_of_infinity():
    x = torch.zeros(1, 32).bfloat16()
    x[0, :3] = torch.tensor([torch.inf, -torch.inf, 1.0])
    q = fp8.quantize_mxfp8(x)  # 2^127 has a subnormal reciprocal, which is flushed
    assert q.scale.item() == 254 and q.codes.float()[0, :3].tolist() == [448.0, 448.0, 0.0]


def test_mxfp8_does_not_saturate():
    """Which FlashInfer's trace template, whose scale rounds down, does."""
    name = "flashinfer.trace.templates.quantize"
    theirs = pytest.importorskip(name, reason="needs flashinfer-python")
    x = torch.full((1, 32), 700.0).bfloat16()
    q = fp8.quantize_mxfp8(x)
    assert fp8.mx_values(q)[0, 0] == 704
    codes, scale = theirs._quantize_mxfp8(x)
    assert codes.float()[0, 0] * 2.0 ** (scale[0, 0].item() - 127) == 448


def test_blocks_are_those_of_flashinfer():
    prepare, x = preparation(), wide(256, 256)
    codes, scale = prepare._deepseek_fp8_quantize_activations(x)
    q = fp8.quantize_blocks(x)
    assert_bitwise(q.codes, codes, "codes of activations")
    assert_bitwise(q.scale.T.contiguous(), scale, "scales of activations")
    codes, scale = prepare._deepseek_fp8_quantize_weights(x.view(2, 128, 256))
    q = fp8.quantize_blocks(x.view(2, 128, 256), 128)
    assert_bitwise(q.codes, codes, "codes of weights")
    assert_bitwise(q.scale, scale, "scales of weights")


def test_blocks_by_hand():
    x = torch.zeros(128, 256)
    x[0, 0], x[1, 1], x[127, 255] = 896.0, -3.0, 7.0
    q = fp8.quantize_blocks(x, 128)
    assert q.scale.tolist() == [[2.0, 7 / 448]]
    values = fp8.block_values(q, 128)
    assert values[[0, 1, 127], [0, 1, 255]].tolist() == [896.0, -3.0, 7.0]
    by_row = fp8.quantize_blocks(x)
    assert by_row.scale[1, 0] == torch.tensor(3.0) / 448 and by_row.scale[2, 0] == fp8.LEAST
    least = fp8.quantize_blocks(x, least=fp8.LEAST_OF_INTERMEDIATE)
    assert least.scale[2, 0] == 2.0**-126
    x[0, 7] = math.nan
    poisoned = fp8.block_values(fp8.quantize_blocks(x))
    assert poisoned[0, :128].isnan().all() and not poisoned[0, 128:].isnan().any()


def test_per_tensor_is_flashinfers():
    prepare = preparation()
    w = wide(64, 256).view(2, 32, 256)[:, :16].contiguous()
    w[1] = 0
    codes, scale = prepare._quantize_fp8_per_expert(w)
    encode = fp8.encode_scale(w.float().abs().amax((1, 2)))
    assert_bitwise(encode, scale, "scales") and encode[1] == 1
    assert_bitwise(fp8.quantize_per_tensor(w, encode[:, None, None]), codes, "codes")
    x = moe_cases.hidden_states(SHAPE)
    codes, _ = prepare.prepare_trtllm_fp8_per_tensor_activations(x, hidden_states_scale_global=40.0)
    assert (codes.float().abs() == 448).any()  # that saturate
    assert_bitwise(fp8.quantize_per_tensor(x, torch.tensor(40.0)), codes, "codes of activations")


@pytest.mark.parametrize("quantize", [fp8.quantize_blocks, fp8.quantize_mxfp8])
def test_parts_of_blocks_are_refused(quantize):
    with pytest.raises(ValueError, match=r"x has shape \(2, 48\); it must be whole blocks of 1 x"):
        quantize(torch.zeros(2, 48))
    with pytest.raises(ValueError, match=r"whole blocks of 128 x 128"):
        fp8.quantize_blocks(torch.zeros(64, 128), 128)


# The layer


@pytest.mark.parametrize("format", FORMATS)
def test_the_layer_by_loops(format):
    """Token by token and slot by slot, of what the format holds."""
    shape = Shape(7, 256, 128, 4, 2, 1, 2)
    experts, activations, ids, weights = made(format, shape=shape)
    got = baseline_moe(activations, experts, ids, weights, local_expert_offset=1)
    x = reference.hidden_values(activations, format)
    want = torch.zeros(7, 256)
    for t in range(7):
        for k in range(2):
            e = int(ids[t, k]) - 1
            if not 0 <= e < 2:
                assert not got.rows[t, k].any()
                continue
            w13, w2 = reference.expert_values(experts, e)
            up, gate = (w13 @ x[t]).float().chunk(2)
            if format == "fp8 per tensor":
                scale = 1 / (experts.w13_scale[e] * experts.input_scale)
                up, gate = up * scale * experts.intermediate_scale, gate * scale
            elif format == "fp8 block":  # 128 of each are a block
                up, gate = (fp8.block_values(fp8.quantize_blocks(v[None]))[0] for v in (up, gate))
            y = (up * gate / (1 + (-gate).exp())).float()[None]
            y = {
                "bf16": lambda y: y.bfloat16(),
                "fp8 per tensor": lambda y: y.clamp(-448, 448).to(torch.float8_e4m3fn),
                "fp8 block": lambda y: fp8.block_values(fp8.quantize_blocks(y)),
                "mxfp8": lambda y: fp8.mx_values(fp8.quantize_mxfp8(y)),
            }[format](y)
            row = y.double() @ w2.T
            if format == "fp8 per tensor":
                row = row / (experts.w2_scale[e] * experts.intermediate_scale)
            want[t] += weights[t, k].float() * row[0].bfloat16().float()
    # Far less than the intermediate's quantization costs, but for a last bit of the sigmoid.
    assert (got.output - want).norm() < 2**-8 * want.norm() and want.norm() > 0.1
    ordered = finalize(got.rows.float(), weights, "flashinfer")  # of bf16 rows
    assert_bitwise(got.output, ordered.bfloat16(), "finalized rows")


@pytest.mark.parametrize(
    "change,message",
    [
        ({"format": "fp4"}, "format is 'fp4'; it must be one of bf16, fp8 per tensor"),
        ({"w13": torch.zeros(1, 256, 128)}, "w13 is torch.float32 of shape"),
        ({"w2": torch.zeros(1, 128, 256).bfloat16()}, "Swiglu it must be bf16 .1, 128, 128."),
        (
            {"w13": torch.zeros(1, 128, 128).bfloat16(), "w2": torch.zeros(1, 128, 64).bfloat16()},
            "H = 128 and I = 64 must be multiples of 128",
        ),
        ({"format": "fp8 per tensor", "input_amax": 1.0}, "intermediate_amax is None"),
        (
            {"w13": torch.zeros(1, 128, 128).bfloat16(), "activation": RELU2},
            "activation is Relu2; fp8 block has SwiGLU alone",
        ),
    ],
)
def test_bad_arguments(change, message):
    given = {
        "format": "fp8 block",
        "w13": torch.zeros(1, 256, 128).bfloat16(),
        "w2": torch.zeros(1, 128, 128).bfloat16(),
    }
    with pytest.raises(ValueError, match=message):
        prepare_baseline(**given | change)


# What FlashInfer gets


def request_of(experts, activations, ids, weights, shape):
    return BaselineCall(
        activations,
        experts,
        adapter.flashinfer_weights(experts),
        Routing(RoutingMethodType.Renormalize, shape.top_k),
        shape.experts,
        topk=(ids, weights),
        local_expert_offset=shape.offset,
    )


def trace_output(request):
    """FlashInfer's trace reference on the adapter's arguments."""
    module, given = trace(), adapter.arguments(request)
    ids, weights = given["topk_ids"]
    format = request.experts.format
    if format == "fp8 per tensor":  # it takes packed ids alone
        given["topk_ids"] = ids << 16 | weights.view(torch.int16).int() & 0xFFFF
    if format == "fp8 block":  # all slots weigh the same
        assert (weights == 1 / weights.shape[1]).all()
        given["topk_ids"] = ids
    return getattr(module, f"_{adapter.function(request).name}_reference")(**given)


def near(a, b):
    """One bf16 step, or one of the largest where a sum over experts cancels."""
    error = (a.float() - b.float()).abs()
    return bool((error <= 2**-7 * b.float().abs() + 2**-16 * b.float().abs().max()).all())


TRACED = {"bf16": STEP, "fp8 per tensor": STEP, "fp8 block": SWIGLU, "mxfp8": STEP}
"""The activation for which its trace reference undoes the preparation."""
SHAPES = [
    Shape(1, 128, 128, 4, 1),
    Shape(7, 256, 128, 8, 2, 3, 4),
    Shape(9, 128, 256, 6, 2),
    Shape(5, 384, 128, 8, 8, 0, 2),
]


def traced(format, shape):
    experts, activations, ids, weights = made(format, TRACED[format], shape)
    if format == "fp8 block":
        weights = torch.full_like(weights, 1 / shape.top_k)
    request = request_of(experts, activations, ids, weights, shape)
    return request, baseline_moe(
        activations,
        experts,
        ids,
        weights,
        local_expert_offset=shape.offset,
        round_intermediate=False,
    ).output


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_same_as_the_trace_reference(format, shape):
    request, ours = traced(format, shape)
    assert near(trace_output(request), ours)


def _rows_as_they_were(request):
    natural = {"gemm1_weights": request.experts.w13}
    if request.experts.format == "bf16":
        natural = {"gemm1_weights": adapter._block_major(request.experts.w13)}
    return natural


def _other_scales(request):
    scales = ("gemm1_weights_scale", "output1_scales_gate_scalar")
    return {name: request.weights[name].flip(-1) for name in scales if name in request.weights}


def _other_expert(request):
    return {
        "gemm2_weights": request.weights["gemm2_weights"]
        .view(torch.uint8)
        .flip(0)
        .view(request.weights["gemm2_weights"].dtype)
    }


FAULTS = [
    *((format, _rows_as_they_were) for format in FORMATS if format != "fp8 block"),
    *((format, _other_scales) for format in FORMATS if format != "bf16"),
    *((format, _other_expert) for format in FORMATS),
]


@pytest.mark.parametrize("format,fault", FAULTS)
def test_a_wrong_preparation_shows(format, fault):
    request, ours = traced(format, Shape(7, 256, 128, 4, 2))
    wrong = replace(request, weights=request.weights | fault(request))
    assert near(trace_output(request), ours) and not near(trace_output(wrong), ours)


@pytest.mark.parametrize("kind", [SWIGLU, RELU2])
@pytest.mark.parametrize("format", ["bf16", "fp8 per tensor"])
def test_weights_are_those_of_flashinfers_preparation(format, kind):
    prepare = preparation()
    api = pytest.importorskip("flashinfer.fused_moe.api", reason="needs flashinfer-python")
    w13, w2 = moe_cases.weights_of(SHAPE, kind)
    maxima = AMAX if format == "fp8 per tensor" else {}
    experts = prepare_baseline(format, w13, w2, kind, **maxima)
    given = {
        "num_local_experts": 4,
        "hidden_size": 256,
        "intermediate_size": 128,
        "activation": api.ReLU2() if kind == RELU2 else api.SwiGLU(),
    }
    if format == "bf16":
        theirs = prepare.prepare_trtllm_bf16_weights(w13, w2, **given)
    else:
        theirs = prepare.prepare_trtllm_fp8_per_tensor_weights(
            w13,
            w2,
            hidden_states_scale_global=experts.input_scale,
            intermediate_scale_global=experts.intermediate_scale,
            **given,
        )
    ours = adapter.flashinfer_weights(experts)
    for name, tensor in ours.items():
        assert_bitwise(tensor, theirs[name], name)
    kept = {k for k, v in theirs.items() if v is not None and not k.endswith("_global")}
    assert kept - set(ours) <= {"gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit"}


def test_fp8_block_weights_are_those_of_flashinfers_preparation():
    prepare = preparation()
    api = pytest.importorskip("flashinfer.fused_moe.api", reason="needs flashinfer-python")
    w13, w2 = moe_cases.weights_of(SHAPE, SWIGLU)
    deepseek = api.QuantFormat.DeepSeekFp8
    theirs = prepare.prepare_trtllm_fp8_block_weights(
        w13,
        w2,
        quant=api.QuantConfig(deepseek, deepseek),
        num_local_experts=4,
        hidden_size=256,
        intermediate_size=128,
    )
    for name, tensor in adapter.flashinfer_weights(prepare_baseline("fp8 block", w13, w2)).items():
        assert_bitwise(tensor, theirs[name], name)


@pytest.mark.parametrize("kind", [SWIGLU, RELU2])
def test_mxfp8_rows_go_where_flashinfer_puts_them(kind):
    """Its own permutations; the swizzle of the scales is a kernel's, and a test of layouts."""
    core = pytest.importorskip("flashinfer.fused_moe.core", reason="needs flashinfer-python")
    experts, *_ = made("mxfp8", kind)
    ours = adapter.flashinfer_weights(experts)
    codes, scales = experts.w13[1].view(torch.uint8), experts.w13_scale[1]
    order, order_of_scales = (
        core._maybe_get_cached_w3_w1_permute_indices(
            {}, t, 128, num_elts_per_sf=n, is_gated_act_gemm=kind.gated
        )
        for t, n in ((codes, None), (scales, 32))
    )
    assert_bitwise(ours["gemm1_weights"][1].view(torch.uint8), codes[order], "codes")
    row, block = torch.meshgrid(torch.arange(codes.shape[0]), torch.arange(8), indexing="ij")
    place = (row // 128 * 2 + block // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4
    swizzled = ours["gemm1_weights_scale"][1].flatten()[place]
    assert_bitwise(swizzled, scales[order_of_scales], "scales")
