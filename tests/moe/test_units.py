"""The unit of every parameter and scalar of a layer: `docs/units.md`, against physical formulas."""

# SPDX-License-Identifier: Apache-2.0
import moe_cases
import pytest
import torch
import training_cases
from assertions import assert_bitwise
from moe_cases import GATED, PLAIN, Shape

import nvfp4_moe
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.moe.layer import activate_raw
from nvfp4_moe.reference.weights.prepare import assemble_experts, prepare_experts
from nvfp4_moe.serving.fused import fused_experts_fp4

E, H, INNER = 3, 128, 128
AMAX = {"input_amax": 3.0, "intermediate_amax": 5.0}
GPT_OSS = {"alpha": 1.702, "beta": 1.0, "clamp_limit": 7.0}


def assembled(kind, decode, **options):
    """Experts of any codes: the units do not depend on them."""
    rows = INNER * (2 if kind.gated else 1)
    zeros = {"dtype": torch.uint8, "device": "cpu"}
    return assemble_experts(
        torch.zeros(E, rows, H // 2, **zeros),
        torch.zeros(E, rows, H // 16, **zeros),
        decode,
        torch.zeros(E, H, INNER // 2, **zeros),
        torch.zeros(E, H, INNER // 16, **zeros),
        torch.tensor([0.5, 3.0, 2.0**-9]),
        kind,
        **options,
    )


@pytest.mark.parametrize("static", [False, True], ids=["per token", "static"])
@pytest.mark.parametrize(
    ("kind", "apart"),
    [(k, apart) for k in GATED + PLAIN for apart in ([False, True] if k.linear_up else [False])],
    ids=lambda v: v.name if isinstance(v, ActivationType) else ("apart" if v else "one scale"),
)
def test_parameters_are_given_in_physical_units(kind, static, apart):
    """Accumulators through the prepared tensors, and their physical values through the formulas."""
    g = torch.Generator().manual_seed(int(kind))
    rows = INNER * (2 if kind.gated else 1)
    decode = torch.tensor([2.0**-10, 0.3, 5.0])
    both = torch.stack([decode * 1.75, decode], 1) if apart else decode[:, None].expand(E, 2)
    given = training_cases.options_of(kind)
    if apart:  # the contract clamps up and gate at one limit of the accumulator
        given.pop("clamp_limit", None)
        if kind == ActivationType.SwigluStep:
            given["clamp_limit"] = torch.inf
    bias = torch.randn(E, rows, generator=g) * 3
    experts = assembled(
        kind, both if apart else decode, w13_bias=bias, **given, **(AMAX if static else {})
    )
    encode = [2688 / AMAX[name] if static else 1.0 for name in AMAX]
    for e in range(E):
        up, gate = (both[e] / encode[0]).tolist()
        raw = torch.randn(8, rows, generator=g) * 4 / gate
        scales = torch.full((rows,), gate, dtype=torch.float64)
        if kind.gated:
            scales[:INNER] = up
        want = training_cases.activations(kind, given)(raw.double() * scales + bias[e].double())
        got = activate_raw(raw, experts, e).double() / encode[1]
        torch.testing.assert_close(got, want, rtol=3e-5, atol=3e-6)


@pytest.mark.parametrize(
    ("kind", "limit", "words"),
    [
        (ActivationType.Swiglu, 7.0, "clamp_limit is one limit of the accumulator for both"),
        (ActivationType.SwigluStep, None, "SwigluStep without clamp_limit clamps both at 7"),
        (ActivationType.Situ, None, "Situ has one scalar for both"),
    ],
    ids=lambda v: getattr(v, "name", None),
)
def test_what_two_scales_cannot_express_is_refused(kind, limit, words):
    decode = torch.tensor([[2.0, 2.0], [2.0, 1.0], [1.0, 1.0]])
    limits = None if limit is None else torch.full((E,), limit)
    with pytest.raises(ValueError, match=f"between up and gate of experts 1, and {words}.*tied"):
        assembled(kind, decode, clamp_limit=limits)
    if limit is not None:  # no limit, and 0, mean the same in both units
        for of_expert_1 in (torch.inf, 0.0):
            limits[1] = of_expert_1
            held = assembled(kind, decode, clamp_limit=limits).gemm1_clamp_limit
            assert held.tolist() == [limit / 2, of_expert_1, limit]


@pytest.mark.parametrize("static", [False, True], ids=["per token", "static"])
def test_a_server_hands_over_parameters_divided_by_the_scalar(static):
    """As vLLM does (`gemm1_beta / g1_alphas`): the bits of `fused_moe` with the logical parameters."""
    case = moe_cases.make(Shape(6, H, INNER, 4, 2), mode="static" if static else "per-token")
    plain = case.experts
    g = torch.Generator().manual_seed(1)
    w13, w2 = (torch.randn(s, generator=g).bfloat16() for s in ((4, 2 * INNER, H), (4, H, INNER)))
    amax = {"input_amax": 4.0, "intermediate_amax": 900.0} if static else {}
    plain = prepare_experts(w13, w2, **amax)
    own = prepare_experts(w13, w2, **GPT_OSS, **amax)
    s1 = plain.output1_scale_gate_scalar
    full = torch.full_like(s1, 1.0)
    theirs = {
        "gemm1_alpha": full * GPT_OSS["alpha"],
        "gemm1_beta": full * GPT_OSS["beta"] / s1,
        "gemm1_clamp_limit": full * GPT_OSS["clamp_limit"] / s1,
    }
    for name, value in theirs.items():
        assert_bitwise(getattr(own, name), value, name)
    routing = case.ids, case.weights
    want = nvfp4_moe.fused_moe(case.x, own, routing, backend="reference", build="cute-dsl")
    (got,) = fused_experts_fp4(
        case.x, w13_weight=plain.gemm1_weights, w2_weight=plain.gemm2_weights,
        w13_weight_scale=plain.gemm1_weights_scale, w2_weight_scale=plain.gemm2_weights_scale,
        g1_scale_c=plain.output1_scale_scalar, g1_alphas=s1, g2_alphas=plain.output2_scale_scalar,
        w13_input_scale_quant=plain.input_scale if static else torch.ones(1),
        use_per_token_activation=not static, num_experts=4, local_expert_offset=0,
        local_num_experts=4, intermediate_size=INNER, activation_type=3, topk=routing,
        backend="reference", **theirs,
    )  # fmt: skip
    assert got.isfinite().all()
    assert_bitwise(got, want, "output")
