"""The fused Triton quantizers, bitwise against the reference: in the interpreter, and on a GPU."""

# SPDX-License-Identifier: Apache-2.0
import producer_cases
import pytest
import torch
from assertions import assert_bitwise, assert_quantized

import nvfp4_moe
from nvfp4_moe.kernels.op_schema import OPS
from nvfp4_moe.reference import fused_quantize as reference
from nvfp4_moe.reference.quantize import quantize_per_token
from nvfp4_moe.reference.recipe import Recipe, SfLayout


@pytest.mark.parametrize("case", producer_cases.CASES, ids=lambda f: f.__name__)
def test_case(case, device):
    case(device)


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [16, 64, 512, 1024, 2048, 4096, 7168, 8192, 16384, 28672])
def test_every_launch_configuration(columns):
    for m in (1, 100, 131):
        x = producer_cases.matrix(m, columns)
        producer_cases.every(x, Recipe(), SfLayout.layout_128x4, "cuda")


@pytest.mark.gpu
def test_cuda_graph():
    x, weight = (producer_cases.matrix(m, 2048).cuda().nan_to_num() for m in (33, 1))
    residual = producer_cases.matrix(33, 2048, seed=1).cuda().nan_to_num()
    start = residual.clone()

    def call():
        return nvfp4_moe.add_rmsnorm_nvfp4_quantize(x, residual, weight[0], backend="triton")

    call()  # compile
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    residual.copy_(start)
    graph.replay()
    values, total = reference.add_rmsnorm(x.cpu(), start.cpu(), weight[0].cpu())
    layout = SfLayout.layout_128x4
    assert_quantized(got, quantize_per_token(values, 1 / 2688, Recipe(), layout), "replayed")
    assert_bitwise(residual, total, "residual")


@pytest.mark.gpu
def test_the_reference_is_the_same_on_the_gpu():
    for dtype in producer_cases.DTYPES:
        x, weight = producer_cases.matrix(9, 512, dtype), producer_cases.matrix(1, 512, dtype)[0]
        for got, want in (
            (reference.silu_and_mul(x.cuda()), reference.silu_and_mul(x)),
            (reference.rmsnorm(x.cuda(), weight.cuda()), reference.rmsnorm(x, weight)),
        ):
            assert_bitwise(got.nan_to_num(), want.nan_to_num(), str(dtype))


@pytest.mark.interpreter
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compiles_into_one_graph(backend):
    torch._dynamo.reset()
    x, weight = producer_cases.matrix(7, 64), producer_cases.matrix(1, 64)[0]

    def call(x, residual):
        return (
            *nvfp4_moe.silu_and_mul_nvfp4_quantize(x, backend=backend),
            *nvfp4_moe.rmsnorm_nvfp4_quantize(x, weight, backend=backend),
            *nvfp4_moe.add_rmsnorm_nvfp4_quantize(x, residual, weight, backend=backend),
            residual + 0,
        )

    residual = producer_cases.matrix(7, 64, seed=3).nan_to_num()
    x = x.nan_to_num()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    first, second = residual.clone(), residual.clone()
    for got, want in zip(compiled(x, first), call(x, second), strict=True):
        assert_bitwise(got, want, backend)
    assert_bitwise(first, second, "residual")


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["triton", "reference"])
def test_opcheck(name):
    x, weight = producer_cases.matrix(3, 64), producer_cases.matrix(1, 64)[0]
    op = OPS[f"{name}_fused_quantize"]
    gated = torch.cat((x, x.flip(0)), 1)
    torch.library.opcheck(op, (gated, None, 0.0, None, 1 / 2688, 0, 2, None))
    torch.library.opcheck(op, (gated, None, 0.0, torch.full((1,), 1 / 2688), 0.0, 0, 0, None))
    for residual in (None, x.clone()):
        torch.library.opcheck(op, (x, weight, 1e-6, None, 1 / 2688, 0, 2, residual))
