"""The arguments of FlashInfer's CuTe-DSL layer, read on the CPU as its kernels read them.

Its own trace reference does not know the interleaving of up and gate, nor the layout of the scales.
"""

# SPDX-License-Identifier: Apache-2.0
import inspect
from dataclasses import replace

import moe_cases
import pytest
import torch
from assertions import assert_bitwise
from installations import pretend
from moe_cases import Shape

import nvfp4_moe
from nvfp4_moe.kernels.flashinfer import (
    cute_dsl,
)
from nvfp4_moe.kernels.moe.backends import FUSED_MOE
from nvfp4_moe.kernels.moe.call import make_moe_call
from nvfp4_moe.reference.activation import ELSEWHERE, IMPLEMENTED, ActivationType, activate
from nvfp4_moe.reference.layouts import from_linear
from nvfp4_moe.reference.moe import layer as reference
from nvfp4_moe.reference.moe.routing import Routing, RoutingMethodType
from nvfp4_moe.reference.numerics import e2m1, e4m3
from nvfp4_moe.reference.quantize import quantize_per_token
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe, SfLayout

NAME = cute_dsl.NAME
KINDS = [a for a in IMPLEMENTED if "cute-dsl" in ELSEWHERE[a].flashinfer]
DSL = Recipe(build="cute-dsl")
SHAPES = [
    Shape(1, 128, 64, 4, 1),
    Shape(7, 256, 192, 8, 3),
    Shape(5, 384, 64, 8, 8, 2, 3),
    Shape(6, 208, 80, 4, 2),
]


def arguments_of(case, shape, experts=None):
    request = make_moe_call(
        case.activations,
        experts or nvfp4_moe.with_cute_dsl(case.experts),
        num_experts=shape.experts,
        routing=Routing(RoutingMethodType.Renormalize, shape.top_k),
        local_expert_offset=shape.offset,
        topk=(case.ids, case.weights),
        finalize_order="slot",
        build="cute-dsl",
    )
    return cute_dsl.LAYER.arguments(request)


def weights(codes, sf, expert):
    """[M, K] fp64; a scale's place as `blockscaled_contiguous_*.py` index it."""
    m, half = codes.shape[1:]
    row, block = torch.arange(m)[:, None], torch.arange(half // 8)[None, :]
    scales = sf.view(torch.uint8)[
        row % 32, row % 128 // 32, row // 128, block % 4, block // 4, expert
    ]
    values = e2m1.decode(e2m1.unpack(codes[expert])).unflatten(-1, (-1, 16))
    return (values * e4m3.decode(scales)[..., None]).flatten(-2).double()


def as_the_kernels_do(a):
    """Sums in fp64; the rest in the kernels' order (cfm:308-887)."""
    kind = ActivationType(a["activation_type"])
    scales = e4m3.decode(a["x_sf"].view(torch.uint8))
    x = e2m1.decode(e2m1.unpack(a["x"])).unflatten(-1, (-1, 16)) * scales[..., None]
    x = x.flatten(-2).double()
    token = torch.ones(x.shape[0]) if a["per_token_scale"] is None else a["per_token_scale"]
    out = torch.zeros(x.shape[0], a["w2_weight"].shape[1])
    for k in range(a["top_k"]):
        for t in range(x.shape[0]):
            e = int(a["token_selected_experts"][t, k]) - a["local_expert_offset"]
            if not 0 <= e < a["num_local_experts"]:
                continue
            raw = (weights(a["w1_weight"], a["w1_weight_sf"], e) @ x[t]).float()
            raw = raw * (a["w1_alpha"][e] * token[t])
            if kind.gated:  # tiles of 64 rows: even ones are up's, odd ones gate's
                raw = raw.reshape(-1, 2, 64).transpose(0, 1).reshape(-1)
            y = activate(raw[None], kind, torch.ones(()), torch.ones(())).bfloat16()
            q = quantize_per_token(y, float(a["fc2_input_scale"]), DSL)
            values = e2m1.decode(e2m1.unpack(q.codes)).unflatten(-1, (-1, 16))
            values = (values * e4m3.decode(q.block_scales)[..., None]).flatten(-2).double()
            row = (weights(a["w2_weight"], a["w2_weight_sf"], e) @ values[0]).float()
            row = (row * (a["w2_alpha"][e] * q.per_token_scale[0])).bfloat16()
            out[t] += a["token_final_scales"][t, k] * row.float()
    return out.bfloat16()


def agree(got, case, shape):
    want = reference.fused_moe(
        case.activations,
        case.experts,
        case.ids,
        case.weights,
        recipe=DSL,
        local_expert_offset=shape.offset,
        finalize_order="slot",
    ).output.double()
    return (got[:, : shape.hidden].double() - want).norm() <= 2e-3 * want.norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_the_arguments_mean_the_layer(shape, kind):
    case = moe_cases.make(shape, kind, seed=shape.tokens)
    assert agree(as_the_kernels_do(arguments_of(case, shape)), case, shape)


FAULTS = {
    "rows not interleaved": lambda a: (
        a
        | {
            "w1_weight": a["w1_weight"]
            .reshape(4, -1, 2, 64, 128)
            .transpose(1, 2)
            .reshape(4, 256, 128)
        }
    ),
    "gate and up exchanged": lambda a: (
        a | {"w1_weight": a["w1_weight"].reshape(4, -1, 2, 64, 128).flip(2).reshape(4, 256, 128)}
    ),
    "scales of another tile": lambda a: a | {"w1_weight_sf": a["w1_weight_sf"].flip(2)},
    "scales of an expert exchanged": lambda a: a | {"w2_weight_sf": a["w2_weight_sf"].flip(5)},
    "scalars exchanged": lambda a: a | {"w1_alpha": a["w1_alpha"].flip(0)},
    "second scalars exchanged": lambda a: a | {"w2_alpha": a["w2_alpha"].flip(0)},
    "base scale 1": lambda a: a | {"fc2_input_scale": torch.ones(1)},
    "per-token scale omitted": lambda a: a | {"per_token_scale": None},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_preparation_shows(fault):
    shape = Shape(6, 256, 128, 4, 2)
    case = moe_cases.make(shape)
    given = arguments_of(case, shape)
    assert agree(as_the_kernels_do(given), case, shape)
    assert not agree(as_the_kernels_do(FAULTS[fault](given)), case, shape)


def test_the_layout_is_that_of_flashinfers_own_preparation():
    prepare = pytest.importorskip("flashinfer.fused_moe.prepare", reason="needs flashinfer-python")
    utils = pytest.importorskip("flashinfer.cute_dsl.utils", reason="needs nvidia-cutlass-dsl")
    g = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randint(0, 128, size, dtype=torch.uint8, generator=g)

    e, h, i = 3, 256, 192
    w13, w13_sf, w2, w2_sf = (
        random(e, 2 * i, h // 2),
        random(e, 2 * i, h // 16),
        random(e, h, i // 2),
        random(e, h, i // 16),
    )
    experts = nvfp4_moe.assemble_experts(w13, w13_sf, torch.ones(e), w2, w2_sf, torch.ones(e))
    ours = nvfp4_moe.with_cute_dsl(experts).cute_dsl

    def of_its_own(codes, scales):
        m, half = codes.shape[1:]
        swizzled = from_linear(scales, SfLayout.layout_128x4)
        return codes, utils.convert_sf_to_mma_layout(swizzled, m, half * 2, e)

    interleave = prepare._interleave_linear_and_gate
    first = of_its_own(interleave(w13, 64, 1), interleave(w13_sf, 64, 1))
    for (codes, sf), got, got_sf in (
        (first, ours.w1_weight, ours.w1_weight_sf),
        (of_its_own(w2, w2_sf), ours.w2_weight, ours.w2_weight_sf),
    ):
        assert_bitwise(got, codes, "codes")
        assert got_sf.stride() == sf.stride()
        assert_bitwise(got_sf.view(torch.uint8), sf, "block scales")


def test_arguments_bind_to_the_installed_function():
    module = pytest.importorskip(
        "flashinfer.fused_moe.cute_dsl.fused_moe", reason="needs nvidia-cutlass-dsl"
    )
    shape = Shape(2, 128, 64, 4, 1)
    given = arguments_of(moe_cases.make(shape), shape)
    inspect.signature(module.cute_dsl_fused_moe).bind(**given)


@pytest.fixture
def installed(monkeypatch):
    pretend(monkeypatch)
    monkeypatch.delenv("FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH", raising=False)


SHAPE = Shape(3, 128, 64, 8, 2)


def explained(case=None, prepared=True, **changes):
    case = case or moe_cases.make(SHAPE)
    experts = nvfp4_moe.with_cute_dsl(case.experts) if prepared else case.experts
    given = {
        "routing": (case.ids, case.weights),
        "capability": (10, 0),
        "build": "cute-dsl",
        "finalize_order": "slot",
    }
    return nvfp4_moe.explain_fused_moe(case.x, experts, **given | changes)


@pytest.mark.usefixtures("installed")
class TestExplain:
    def test_it_serves(self):
        e = explained()
        assert e.backend == NAME and e.reason("triton") is None

    def test_both_orders_where_they_are_one(self):
        assert explained(finalize_order="flashinfer").backend == NAME

    @pytest.mark.parametrize(
        "changes,reason",
        [
            ({"prepared": False}, "nvfp4_moe.with_cute_dsl(experts)"),
            ({"capability": (10, 7)}, "sm_107 has no kernels"),
            ({"capability": (12, 0)}, "sm_120 has no kernels"),
            ({"fast_math": False}, "set FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH=1"),
            ({"nvfp4_4over6": NVFP44Over6Config()}, "FLASHINFER_NVFP4_4OVER6"),
            ({"build": "cuda"}, 'build="cute-dsl"'),
            ({"batch_invariant": True}, "batch_invariant"),
            ({"activation": "bf16"}, "hidden_states are bf16"),
            ({"output_dtype": torch.float16}, "the output is torch.float16"),
            ({"num_experts": 3000}, "2048 experts"),
        ],
    )
    def test_it_refuses(self, changes, reason):
        assert reason in explained(**changes).reason(NAME)

    def test_more_refusals(self):
        case = moe_cases.make(replace(SHAPE, top_k=8))
        assert "slot" in explained(case, finalize_order="flashinfer").reason(NAME)
        case = moe_cases.make(SHAPE, mode="static")
        assert "static" in explained(case, prepared=False, activation="static").reason(NAME)
        case = moe_cases.make(SHAPE, ActivationType.Geglu)
        assert "Geglu has no kernels" in explained(case).reason(NAME)
        case = moe_cases.make(SHAPE, clamp_limit=7.0)
        assert "takes one physical number" in explained(case).reason(NAME)
        case = moe_cases.make(SHAPE, w2_bias=torch.ones(8, 128))
        assert "no biases" in explained(case, prepared=False).reason(NAME)
        assert "no tokens" in explained(moe_cases.make(replace(SHAPE, tokens=0))).reason(NAME)


def test_refused_parts_of_the_flashinfer_door():
    case = moe_cases.make(SHAPE)
    request = make_moe_call(
        case.activations,
        nvfp4_moe.with_cute_dsl(case.experts),
        num_experts=8,
        routing=Routing(RoutingMethodType.Renormalize, 2),
        topk=(case.ids, case.weights),
    )
    for changes, reason in (
        ({"do_finalize": False}, "do_finalize"),
        ({"lora_delta": torch.ones(1)}, "gemm1_lora_delta"),
        ({"shared_experts": 1}, "shared experts"),
    ):
        asked = replace(request, **changes)
        rules = [rule for rule in cute_dsl.RULES if rule.refuses(asked)]
        said = [rule.text(asked) for rule in rules]
        assert any(reason in why for why in said)


def test_experts_that_it_cannot_hold():
    case = moe_cases.make(SHAPE)
    apart = replace(case.experts, output1_scale_scalar=case.experts.output1_scale_scalar * 2)
    static = moe_cases.make(SHAPE, ActivationType.Relu2, "static").experts
    for experts in (apart, static):
        with pytest.raises(ValueError, match="have one scalar"):
            nvfp4_moe.with_cute_dsl(experts)
    biased = moe_cases.make(SHAPE, w2_bias=torch.ones(8, 128)).experts
    with pytest.raises(ValueError, match="have biases"):
        nvfp4_moe.with_cute_dsl(biased)


def test_run_hands_the_arguments_over_and_drops_the_padding(monkeypatch):
    fused_moe = pytest.importorskip("flashinfer.fused_moe", reason="needs flashinfer-python")
    shape = Shape(6, 208, 80, 4, 2)
    case = moe_cases.make(shape)
    monkeypatch.setattr(
        fused_moe, "cute_dsl_fused_moe", lambda **a: as_the_kernels_do(a), raising=False
    )
    monkeypatch.setattr(FUSED_MOE, "refusal", lambda backend, r: None)
    into = torch.empty(6, 208, dtype=torch.bfloat16)
    request = make_moe_call(
        case.activations,
        nvfp4_moe.with_cute_dsl(case.experts),
        num_experts=4,
        routing=Routing(RoutingMethodType.Renormalize, 2),
        topk=(case.ids, case.weights),
        finalize_order="slot",
        build="cute-dsl",
        output=into,
    )
    (output,) = FUSED_MOE.serve(request, NAME)
    assert output is into and agree(output, case, shape)
