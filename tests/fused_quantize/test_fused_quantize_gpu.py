"""The Triton producers on a GPU, bitwise against the reference."""

# SPDX-License-Identifier: Apache-2.0
import producer_cases
import pytest
import torch
from assertions import assert_bitwise, assert_quantized
from marks import ON_A_GPU

import nvfp4_moe
from nvfp4_moe.reference import fused_quantize as reference
from nvfp4_moe.reference.quantize import quantize_per_token
from nvfp4_moe.reference.recipe import Recipe, SfLayout

pytestmark = ON_A_GPU


@pytest.mark.parametrize("case", producer_cases.CASES, ids=lambda f: f.__name__)
def test_case(case):
    case("cuda")


@pytest.mark.parametrize("columns", [16, 64, 512, 1024, 2048, 4096, 7168, 8192, 16384, 28672])
def test_every_launch_configuration(columns):
    for m in (1, 100, 131):
        x = producer_cases.matrix(m, columns)
        producer_cases.every(x, Recipe(), SfLayout.layout_128x4, "cuda")


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


def test_the_reference_is_the_same_on_the_gpu():
    for dtype in producer_cases.DTYPES:
        x, weight = producer_cases.matrix(9, 512, dtype), producer_cases.matrix(1, 512, dtype)[0]
        for got, want in (
            (reference.silu_and_mul(x.cuda()), reference.silu_and_mul(x)),
            (reference.rmsnorm(x.cuda(), weight.cuda()), reference.rmsnorm(x, weight)),
        ):
            assert_bitwise(got.nan_to_num(), want.nan_to_num(), str(dtype))
