"""FlashInfer's own trace reference on exactly the arguments that our adapter builds.

It unshuffles rows, deinterleaves block scales and applies every scalar by itself, so a wrong
preparation shows. It does so for activation type 7 (SwigluStep) only, which with a large limit is
SwiGLU. It neither requantizes the intermediate nor rounds it or the rows: here ours does not, either.
"""

# SPDX-License-Identifier: Apache-2.0
import inspect
from dataclasses import replace

import moe_cases
import pytest
import torch
from moe_cases import Shape

from nvfp4_moe.kernels.flashinfer import trtllm
from nvfp4_moe.kernels.moe.call import make_moe_call
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.layouts import inverse, to_linear
from nvfp4_moe.reference.moe import layer as reference
from nvfp4_moe.reference.moe.routing import Routing, RoutingMethodType
from nvfp4_moe.reference.recipe import SfLayout
from nvfp4_moe.reference.weights.layout import row_order

trace = pytest.importorskip("flashinfer.trace.templates.moe", reason="needs flashinfer-python")

SHAPES = [
    Shape(t, h, i, e, k, offset, local)
    for t, h, i, e, k in (
        (1, 128, 64, 4, 1),
        (3, 256, 128, 4, 2),
        (7, 128, 192, 8, 3),
        (5, 384, 64, 8, 8),
        (16, 256, 256, 16, 4),
        (2, 256, 128, 32, 22),
        (9, 128, 128, 6, 2),
        (4, 512, 64, 5, 5),
    )
    for offset, local in ((0, None), (0, 2), (1, 3), (e - 2, 2))
]
STEP = ActivationType.SwigluStep


def trace_output(arguments):
    return trace._trtllm_fp4_block_scale_routed_moe_reference(**arguments)


def arguments_of(case, shape, experts=None, activations=None):
    request = make_moe_call(
        activations or case.activations,
        experts or case.experts,
        num_experts=shape.experts,
        routing=Routing(RoutingMethodType.Renormalize, shape.top_k),
        local_expert_offset=shape.offset,
        topk=(case.ids, case.weights),
    )
    return trtllm.arguments(request)


def ours(case, shape):
    return reference.fused_moe(
        case.activations,
        case.experts,
        case.ids,
        case.weights,
        local_expert_offset=shape.offset,
        round_to_bf16=False,
    ).output


def ulps(a, b):
    """Distance in bf16 values, over +-0."""

    def place(t):
        bits = t.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (place(a) - place(b)).abs()


def agree(a, b):
    # Where the sum over experts cancels, one of its terms' roundings is more than one bf16 step.
    near = (a.float() - b.float()).abs() < 2**-20 * b.float().abs().max()
    return bool(((ulps(a, b) <= 1) | near).all())


@pytest.mark.parametrize("limit", [1e6, None], ids=["swiglu", "limit-7"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_as_the_trace_reference(shape, limit):
    case = moe_cases.make(shape, STEP, seed=shape.tokens, clamp_limit=limit)
    assert agree(trace_output(arguments_of(case, shape)), ours(case, shape))


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
def test_biases_and_routing_weights(weights_dtype):
    shape = Shape(6, 256, 128, 4, 2)
    g = torch.Generator().manual_seed(9)
    case = moe_cases.make(
        shape,
        STEP,
        weights_dtype=weights_dtype,
        w13_bias=torch.randn(4, 256, generator=g),
        w2_bias=torch.randn(4, 256, generator=g),
    )
    with_bias = ours(case, shape)
    assert agree(trace_output(arguments_of(case, shape)), with_bias)
    bare = replace(case.experts, gemm1_bias=None)
    assert not agree(trace_output(arguments_of(case, shape, bare)), with_bias)


def _natural_rows(experts):
    return replace(
        experts,
        gemm1_weights=torch.stack(
            [w[inverse(row_order(w.shape[0], True))] for w in experts.gemm1_weights]
        ),
    )


def _linear_scales(experts):
    _, rows, columns = experts.gemm1_weights_scale.shape
    linear = to_linear(
        experts.gemm1_weights_scale.view(torch.uint8), rows, columns, SfLayout.layout_128x4
    )
    return replace(experts, gemm1_weights_scale=linear.view(torch.float8_e4m3fn))


def _gate_for_up(experts):
    """Swaps each pair of rows of the interleaved, shuffled matrix."""
    order = row_order(experts.gemm1_weights.shape[1], True)
    half = order.numel() // 2
    swapped = inverse(order)[(order + half) % (2 * half)]
    return replace(experts, gemm1_weights=experts.gemm1_weights[:, swapped])


def _scalars_exchanged(experts):
    return replace(experts, output2_scale_scalar=experts.output2_scale_scalar.flip(0))


@pytest.mark.parametrize(
    "fault",
    [_natural_rows, _linear_scales, _gate_for_up, _scalars_exchanged],
    ids=lambda f: f.__name__,
)
def test_a_wrong_preparation_shows(fault):
    shape = Shape(8, 256, 128, 4, 2)
    case = moe_cases.make(shape, STEP, clamp_limit=1e6)
    right = ours(case, shape)
    assert agree(trace_output(arguments_of(case, shape)), right)
    assert not agree(trace_output(arguments_of(case, shape, fault(case.experts))), right)


def test_an_omitted_per_token_scale_shows():
    shape = Shape(8, 256, 128, 4, 2)
    case = moe_cases.make(shape, STEP, clamp_limit=1e6)
    without = replace(case.activations, per_token_scale=None)
    assert not agree(
        trace_output(arguments_of(case, shape, activations=without)), ours(case, shape)
    )


def test_arguments_bind_to_the_installed_function():
    from flashinfer.fused_moe import trtllm_fp4_block_scale_routed_moe as function

    shape = Shape(2, 128, 64, 4, 1)
    arguments = arguments_of(moe_cases.make(shape), shape)
    inspect.signature(function).bind(**arguments)
