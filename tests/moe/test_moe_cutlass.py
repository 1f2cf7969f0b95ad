"""FlashInfer's cutlass layer: the reference of its roundings, and what is handed to it.

Its own trace reference knows neither codes nor scales, so the arguments are read here as its kernels
read them, on the CPU.
"""

# SPDX-License-Identifier: Apache-2.0
import inspect
from dataclasses import replace

import moe_cases
import pytest
import torch
from installations import pretend
from moe_cases import Shape

import nvfp4_moe
from nvfp4_moe.kernels.flashinfer import cutlass
from nvfp4_moe.kernels.flashinfer import trtllm as trtllm
from nvfp4_moe.kernels.flashinfer.rules import BLACKWELL
from nvfp4_moe.kernels.moe.backends import FUSED_MOE
from nvfp4_moe.kernels.moe.call import make_moe_call
from nvfp4_moe.reference.activation import ELSEWHERE, IMPLEMENTED, ActivationType, activate
from nvfp4_moe.reference.moe import layer as reference
from nvfp4_moe.reference.moe.hidden_states import Activations
from nvfp4_moe.reference.moe.routing import Routing, RoutingMethodType
from nvfp4_moe.reference.numerics import e2m1, e4m3
from nvfp4_moe.reference.quantize import quantize_global_scale
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe

NAME = cutlass.NAME
SHAPE = Shape(3, 128, 64, 8, 2)
SHAPES = [
    Shape(1, 128, 64, 4, 1),
    Shape(7, 256, 192, 8, 3),
    Shape(5, 384, 64, 8, 8, 2, 2),
    Shape(6, 208, 80, 4, 2),
]
KINDS = [a for a in IMPLEMENTED if "cutlass" in ELSEWHERE[a].flashinfer]


def request_of(case, shape, **changes):
    given = {
        "num_experts": shape.experts,
        "local_expert_offset": shape.offset,
        "routing": Routing(RoutingMethodType.Renormalize, shape.top_k),
        "finalize_order": "slot",
        "topk": (case.ids, case.weights),
        "build": "cutlass",
    }
    return make_moe_call(case.activations, nvfp4_moe.with_cutlass(case.experts), **given | changes)


def arguments_of(case, shape):
    return cutlass.LAYER.arguments(request_of(case, shape))


def values(codes, scales):
    """[N, K] fp64 of codes [N, K/2] and e4m3 bytes [N, K/16]."""
    blocks = e2m1.decode(e2m1.unpack(codes)).unflatten(-1, (-1, 16))
    return (blocks * e4m3.decode(scales)[..., None]).flatten(-2).double()


def weights(packed, scales, expert):
    """[M, K] fp64; a scale's place as `quantization_utils.cuh:995` has it, expert by expert."""
    codes = packed.view(torch.uint8)[expert]
    flat = scales.view(torch.uint8)[expert].reshape(-1)
    m, blocks = codes.shape[0], codes.shape[1] // 8
    row, block = torch.arange(m)[:, None], torch.arange(blocks)[None, :]
    tile = row // 128 * (blocks // 4) + block // 4
    return values(codes, flat[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4])


def as_the_kernels_do(a):
    """Sums in fp64; the rest in the kernels' order (kernels:2400-2580)."""
    kind = ActivationType(a["activation_type"])
    act1, sf1, alpha1, act2, sf2, alpha2 = a["quant_scales"]
    assert act1.dim() == act2.dim() == 0 and not a["swizzled_input_sf"]
    x = values(a["input"], a["input_sf"])
    local = a["fc1_expert_weights"].shape[0]
    out = torch.zeros(x.shape[0], a["fc2_expert_weights"].shape[1])
    for k in range(a["token_selected_experts"].shape[1]):
        for t in range(x.shape[0]):
            e = int(a["token_selected_experts"][t, k]) - a["ep_rank"] * local
            if not 0 <= e < local:
                continue
            w1 = weights(a["fc1_expert_weights"], sf1, e)
            first = ((w1 @ x[t]).float() * alpha1[e]).bfloat16().float()
            y = activate(
                first[None],
                kind,
                **{"alpha": a["situ_beta"][e], "beta": a["situ_linear_beta"][e]}
                if kind == ActivationType.Situ
                else {},
            ).bfloat16()
            q = quantize_global_scale(y, act2, Recipe())
            w2 = weights(a["fc2_expert_weights"], sf2, e)
            row = (w2 @ values(q.codes, q.block_scales)[0]).float() * alpha2[e]
            out[t] += a["token_final_scales"][t, k] * row.bfloat16().float()
    return out.bfloat16()


def agree(got, case, shape):
    want = reference.fused_moe(
        case.activations,
        nvfp4_moe.with_cutlass(case.experts),
        case.ids,
        case.weights,
        local_expert_offset=shape.offset,
        finalize_order="slot",
        variant="cutlass",
    ).output.double()
    return (got[:, : shape.hidden].double() - want).norm() <= 2e-3 * want.norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_the_arguments_mean_the_layer(shape, kind):
    case = moe_cases.make(shape, kind, "static", seed=shape.tokens)
    assert agree(as_the_kernels_do(arguments_of(case, shape)), case, shape)


def exchanged(a, index):
    scales = list(a["quant_scales"])
    scales[index] = scales[index].flip(0)
    return a | {"quant_scales": scales}


FAULTS = {
    "rows shuffled": lambda a, e: a | {"fc1_expert_weights": e.gemm1_weights.view(torch.int64)},
    "second rows shuffled": lambda a, e: a | {"fc2_expert_weights": e.gemm2_weights.view(torch.int64)},
    "gate and up exchanged": lambda a, e: a | {
        "fc1_expert_weights": a["fc1_expert_weights"].reshape(4, 2, 128, -1).flip(1).flatten(1, 2)
    },
    "scales of another expert": lambda a, e: exchanged(a, 1),
    "scalars exchanged": lambda a, e: exchanged(a, 2),
    "second scales of another expert": lambda a, e: exchanged(a, 4),
    "second scalars exchanged": lambda a, e: exchanged(a, 5),
    "the decode scale of the intermediate": lambda a, e: a | {
        "quant_scales": [*a["quant_scales"][:3], 1 / a["quant_scales"][3], *a["quant_scales"][4:]]
    },
    "the next rank": lambda a, e: a | {"ep_rank": a["ep_rank"] + 1},
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_preparation_shows(fault):
    shape = Shape(6, 256, 128, 8, 4, 4, 4)
    case = moe_cases.make(shape, mode="static")
    given = arguments_of(case, shape)
    assert agree(as_the_kernels_do(given), case, shape)
    assert not agree(as_the_kernels_do(FAULTS[fault](given, case.experts)), case, shape)


def test_its_roundings_are_not_those_of_tensorrt_llm():
    case = moe_cases.make(Shape(16, 256, 128, 4, 2), mode="static")
    experts = nvfp4_moe.with_cutlass(case.experts)
    ours, other = (
        reference.fused_moe(
            case.activations, experts, case.ids, case.weights, variant=variant, keep_steps=True
        )
        for variant in ("cutlass", "cuda")
    )
    first = ours.steps["accumulator1"][0, 0] * experts.output1_scale_gate_scalar[case.ids[0, 0]]
    x0, x1 = first.bfloat16().float().chunk(2)
    want = (torch.nn.functional.silu(x1) * x0).bfloat16()
    assert torch.equal(ours.steps["intermediate"][0, 0], want)
    assert "intermediate" not in other.steps
    assert not torch.equal(ours.steps["fc2_input_codes"], other.steps["fc2_input_codes"])


def test_arguments_bind_to_the_installed_function():
    core = pytest.importorskip("flashinfer.fused_moe.core", reason="needs flashinfer-python")
    given = arguments_of(moe_cases.make(SHAPE, mode="static"), SHAPE)
    inspect.signature(core.cutlass_fused_moe).bind(**given)
    assert given["fc1_expert_weights"].shape == (8, 128, 128 // 16)  # binding:1456-1548
    assert given["quant_scales"][1].shape == (8, 128, 128 // 64)
    assert given["quant_scales"][4].shape == (8, 128, 64 // 64)
    assert given["token_final_scales"].dtype == torch.float32


@pytest.fixture
def installed(monkeypatch):
    pretend(monkeypatch)
    monkeypatch.delenv("FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH", raising=False)


def explained(**changes):
    case = moe_cases.make(replace(SHAPE, hidden=256, intermediate=128), mode="static")
    given = {
        "routing": (case.ids, case.weights),
        "capability": (12, 0),
        "build": "cutlass",
        "finalize_order": "slot",
        "activation": "static",
    }
    return nvfp4_moe.explain_fused_moe(
        case.x, nvfp4_moe.with_cutlass(case.experts), **given | changes
    )


@pytest.mark.usefixtures("installed")
class TestExplain:
    @pytest.mark.parametrize("capability", BLACKWELL)
    def test_it_serves(self, capability):
        e = explained(capability=capability)
        assert e.backend == NAME and e.reason("reference") is None
        assert "rounds the first GEMM" in e.reason("triton")
        if capability == (10, 0):
            assert 'build="cuda"' in e.reason("flashinfer:trtllm")

    @pytest.mark.parametrize(
        "changes,reason",
        [
            ({"capability": (9, 0)}, "sm_90 has no kernels"),
            ({"build": "cuda"}, 'build="cutlass"'),
            ({"output_dtype": torch.float16}, "the output is torch.float16"),
            ({"fast_math": False}, "set FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH=1"),
            ({"nvfp4_4over6": NVFP44Over6Config()}, "FLASHINFER_NVFP4_4OVER6"),
            ({"batch_invariant": True}, "batch_invariant"),
            ({"num_experts": 20}, "20 experts of which 8 from 0 on"),
            ({"num_experts": 16, "local_expert_offset": 4}, "8 from 4 on"),
        ],
    )
    def test_it_refuses(self, changes, reason):
        assert reason in explained(**changes).reason(NAME)

    def test_its_order_where_the_other_one_differs(self):
        shape = replace(SHAPE, top_k=8)
        case = moe_cases.make(shape, mode="static")
        asked = request_of(case, shape, finalize_order="flashinfer")
        assert "slot" in cutlass.LAYER.refusal(replace(asked, capability=(12, 0)))

    def test_parts_of_the_other_door(self):
        request = request_of(moe_cases.make(SHAPE, mode="static"), SHAPE)
        request = replace(request, capability=(12, 0))
        assert cutlass.LAYER.refusal(request) is None
        for changes, reason in (
            ({"lora_delta": torch.ones(1)}, "gemm1_lora_delta"),
            ({"shared_experts": 1}, "shared experts"),
        ):
            assert reason in cutlass.LAYER.refusal(replace(request, **changes))


def test_what_no_backend_accepts():
    case = moe_cases.make(SHAPE, mode="static")
    unquantized = replace(case, activations=Activations(case.x))
    for given, changes in (
        (case, {"do_finalize": False}),
        (unquantized, {"quantize": "per-token"}),
    ):
        with pytest.raises(ValueError, match="a layer of static scales, finalized"):
            request_of(given, SHAPE, **changes)
    with pytest.raises(ValueError, match="whose experts come from"):
        nvfp4_moe.fused_moe(
            case.x, case.experts, (case.ids, case.weights), activation="static", build="cutlass"
        )
    with pytest.raises(ValueError, match="build is 'cutlas'; it must be one of"):
        nvfp4_moe.fused_moe(case.x, case.experts, (case.ids, case.weights), build="cutlas")


def test_experts_that_it_cannot_hold():
    static = moe_cases.make(SHAPE, mode="static").experts
    apart = replace(static, output1_scale_scalar=static.output1_scale_scalar * 2)
    biased = replace(static, gemm2_bias=torch.ones(8, 128))
    limited = replace(static, gemm1_clamp_limit=torch.ones(8))
    for experts, said in (
        (moe_cases.make(SHAPE).experts, "no input_amax"),
        (replace(static, intermediate_scale=None), "no intermediate_amax"),
        (apart, "has one scalar"),
        (biased, "gemm2_bias"),
        (limited, "gemm1_clamp_limit"),
    ):
        with pytest.raises(ValueError, match=said):
            nvfp4_moe.with_cutlass(experts)


def test_run_hands_the_arguments_over_and_drops_the_padding(monkeypatch):
    fused_moe = pytest.importorskip("flashinfer.fused_moe", reason="needs flashinfer-python")
    shape = Shape(6, 208, 80, 4, 2)
    case = moe_cases.make(shape, mode="static")

    def as_it_returns(**a):  # core.py:1134
        output = a.pop("output").copy_(as_the_kernels_do(a))
        return [output, torch.empty(1), torch.empty(1), torch.empty(1)]

    monkeypatch.setattr(fused_moe, "cutlass_fused_moe", as_it_returns)
    monkeypatch.setattr(FUSED_MOE, "refusal", lambda backend, r: None)
    into = torch.empty(6, 208, dtype=torch.bfloat16)
    (output,) = FUSED_MOE.serve(request_of(case, shape, output=into), NAME)
    assert output is into and agree(output, case, shape)


def test_the_door_serves_it_by_the_reference():
    case = moe_cases.make(SHAPE, mode="static")
    got = nvfp4_moe.fused_moe(
        case.x,
        nvfp4_moe.with_cutlass(case.experts),
        (case.ids, case.weights),
        activation="static",
        build="cutlass",
        finalize_order="slot",
    )
    want = reference.fused_moe(
        case.activations,
        case.experts,
        case.ids,
        case.weights,
        finalize_order="slot",
        variant="cutlass",
    ).output
    assert torch.equal(got, want)
