"""The fused experts from a serving stack's tensors: the bits of the calls that a user makes directly."""

# SPDX-License-Identifier: Apache-2.0
import moe_cases
import pytest
import torch
from assertions import assert_bitwise
from moe_cases import Shape

import nvfp4_moe
from nvfp4_moe import nvfp4_quantize
from nvfp4_moe.kernels import environment
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.moe.routing import pack_topk
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe, SfLayout
from nvfp4_moe.serving import fused_experts_fp4

SHAPE = Shape(5, 128, 64, 8, 2, 3, 4)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in environment.VARIABLES:
        if name not in environment.CACHE_VARIABLES:
            monkeypatch.delenv(name, raising=False)


def arguments(case, shape=SHAPE, **change):
    """The arguments of `fused_experts_fp4` for a layer, by the reference."""
    e = case.experts
    static = e.input_scale is not None
    made = {
        "hidden_states": case.x,
        "w13_weight": e.gemm1_weights,
        "w2_weight": e.gemm2_weights,
        "w13_weight_scale": e.gemm1_weights_scale,
        "w2_weight_scale": e.gemm2_weights_scale,
        "g1_scale_c": e.output1_scale_scalar,
        "g1_alphas": e.output1_scale_gate_scalar,
        "g2_alphas": e.output2_scale_scalar,
        "w13_input_scale_quant": e.input_scale.reshape(())
        if static
        else torch.ones((), dtype=torch.float32, device="cpu"),
        "use_per_token_activation": not static,
        "num_experts": shape.experts,
        "local_expert_offset": shape.offset,
        "local_num_experts": shape.num_local,
        "intermediate_size": e.padded_intermediate_size,
        "activation_type": int(e.activation),
        "gemm1_alpha": e.gemm1_alpha,
        "gemm1_beta": e.gemm1_beta,
        "gemm1_clamp_limit": e.gemm1_clamp_limit,
        "topk": (case.ids, case.weights),
        "backend": "reference",
    }
    return made | change


def direct(case, shape=SHAPE, four_over_six=None, **options):
    """The calls that a user of this library makes: the quantizer, then FlashInfer's function."""
    x, experts, routing = case.x, case.experts, (case.ids, case.weights)
    static = experts.input_scale is not None
    recipe = Recipe(four_over_six=four_over_six)
    codes, scales, *token = nvfp4_quantize(
        x,
        experts.input_scale if static else recipe.base_scale_inv,
        SfLayout.layout_linear,
        per_token_activation=not static,
        nvfp4_4over6=four_over_six,
    )
    return nvfp4_moe.trtllm_fp4_block_scale_routed_moe(
        routing, None, codes, scales.view(torch.float8_e4m3fn), experts.gemm1_weights,
        experts.gemm1_weights_scale, None, experts.gemm1_alpha, experts.gemm1_beta,
        experts.gemm1_clamp_limit, experts.gemm2_weights, experts.gemm2_weights_scale, None,
        experts.output1_scale_scalar, experts.output1_scale_gate_scalar,
        experts.output2_scale_scalar, shape.experts, case.ids.shape[1], None, None,
        experts.padded_intermediate_size, shape.offset, shape.num_local, None, 1,
        activation_type=int(experts.activation), per_token_scale=token[0] if token else None,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["per-token", "static"])
@pytest.mark.parametrize("kind", ["Swiglu", "Geglu", "Situ", "Relu2"])
def test_the_calls_made_directly(mode, kind):
    limit = {"clamp_limit": 2.0, "alpha": 1.25} if kind == "Swiglu" else {}
    shape = Shape(5, 128, 128, 8, 2, 3, 4)
    case = moe_cases.make(shape, ActivationType[kind], mode, **limit)
    (want,) = direct(case, shape)
    for topk in ((case.ids, case.weights), pack_topk(case.ids, case.weights)):
        (got,) = fused_experts_fp4(**arguments(case, shape, topk=topk))
        assert_bitwise(got, want, "output")
    layer = nvfp4_moe.fused_moe(
        case.x, case.experts, (case.ids, case.weights), num_experts=8, local_expert_offset=3
    )
    assert_bitwise(got, layer, "fused_moe of the same")


def test_routing_from_logits():
    shape = Shape(5, 128, 64, 16, 4)
    case = moe_cases.make(shape)
    g = torch.Generator().manual_seed(3)
    logits, bias = torch.randn(5, 16, generator=g), torch.randn(16, generator=g)
    given = arguments(case, shape, topk=None, router_logits=logits, top_k=4)
    grouped = {"num_expert_group": 4, "topk_group": 2, "correction_bias": bias}
    (got,) = fused_experts_fp4(**given, **grouped, routed_scaling_factor=2.5, routing_method_type=2)
    want = nvfp4_moe.fused_moe(
        case.x,
        case.experts,
        (logits, nvfp4_moe.Routing(nvfp4_moe.RoutingMethodType.DeepSeekV3, 4, 4, 2, 2.5)),
        routing_bias=bias,
    )
    assert_bitwise(got, want, "output")
    plain = nvfp4_moe.Routing(nvfp4_moe.RoutingMethodType.Default, 4)
    want = nvfp4_moe.fused_moe(case.x, case.experts, (logits, plain))
    assert_bitwise(fused_experts_fp4(**given)[0], want, "the default method")


@pytest.mark.parametrize("use_256", [False, True])
def test_four_over_six_of_the_environment(use_256, monkeypatch):
    case = moe_cases.make(SHAPE)
    (plain,) = fused_experts_fp4(**arguments(case))
    monkeypatch.setenv("FLASHINFER_NVFP4_4OVER6", "1")
    if use_256:
        monkeypatch.setenv("FLASHINFER_NVFP4_4OVER6_E4M3_USE_256", "1")
    (got,) = fused_experts_fp4(**arguments(case))
    recipe = NVFP44Over6Config(256 if use_256 else 448)
    (want,) = direct(case, four_over_six=recipe, nvfp4_4over6=recipe)
    assert_bitwise(got, want, "output")
    assert not torch.equal(got, plain)


@pytest.mark.parametrize("mode", ["per-token", "static"])
def test_no_tokens(mode):
    case = moe_cases.make(SHAPE, mode=mode)
    topk = case.ids[:0], case.weights[:0]
    (got,) = fused_experts_fp4(**arguments(case, hidden_states=case.x[:0], topk=topk))
    assert got.shape == (0, 128) and got.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mode", ["per-token", "static"])
def test_without_finalize(mode, dtype):
    case = moe_cases.make(SHAPE, mode=mode, weights_dtype=dtype)
    got = fused_experts_fp4(**arguments(case, do_finalize=False))
    rows, _, permuted = direct(case, do_finalize=False)
    assert_bitwise(got[0], rows, "rows")
    assert_bitwise(got[1], case.weights, "weights, in their own dtype")
    assert_bitwise(got[2], permuted, "rows of slots")


@pytest.mark.parametrize("mode", ["per-token", "static"])
def test_codes_of_a_dispatcher(mode):
    case = moe_cases.make(SHAPE, mode=mode)
    a = case.activations
    codes = {
        "hidden_states": a.hidden_states,
        "hidden_states_scale": a.block_scales.view(torch.uint8),
        "per_token_scale": a.per_token_scale,
    }
    (want,) = fused_experts_fp4(**arguments(case))
    assert_bitwise(fused_experts_fp4(**arguments(case, **codes))[0], want, "output")
    output = torch.empty_like(case.x)
    assert fused_experts_fp4(**arguments(case, output=output))[0] is output


def test_arguments_that_do_not_agree():
    case = moe_cases.make(SHAPE)
    a = case.activations
    codes = {
        "hidden_states": a.hidden_states,
        "hidden_states_scale": a.block_scales,
        "per_token_scale": a.per_token_scale,
    }
    for change, message in (
        (codes | {"per_token_scale": None}, "True they need hidden_states_scale and per_token"),
        (codes | {"use_per_token_activation": False}, "False they need .* and no per_token_scale"),
        (codes | {"hidden_states": case.x}, "belong to uint8 codes"),
        ({"topk": None}, "one of topk and router_logits"),
        ({"router_logits": case.x}, "one of topk and router_logits"),
        ({"topk": None, "router_logits": case.x}, "top_k is None"),
        (
            {"use_per_token_activation": False, "w13_input_scale_quant": torch.ones(4)},
            r"w13_input_scale_quant is float32 \[4\]; it must be a tensor of one float32",
        ),
        ({"w13_weight_scale": None}, "w13_weight_scale is None; it must be a tensor of float8"),
        (
            {"use_per_token_activation": False, "w13_input_scale_quant": None},
            "w13_input_scale_quant is None; it must be a tensor of float32",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            fused_experts_fp4(**arguments(case, **change))
