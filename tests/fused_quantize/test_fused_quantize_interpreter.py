"""The Triton producers in the interpreter, against the reference, on any machine."""

# SPDX-License-Identifier: Apache-2.0
import producer_cases
import pytest
import torch
from assertions import assert_bitwise

import nvfp4_moe
from nvfp4_moe.kernels.fused_quantize import launch as producer_launch  # noqa: F401  register ops

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, at inf and NaN
]


@pytest.mark.parametrize("case", producer_cases.CASES, ids=lambda f: f.__name__)
def test_case(case):
    case("cpu")


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


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_opcheck(name):
    x, weight = producer_cases.matrix(3, 64), producer_cases.matrix(1, 64)[0]
    ops = torch.ops.nvfp4_moe
    silu = getattr(ops, f"{name}_silu_and_mul_quantize").default
    norm = getattr(ops, f"{name}_rmsnorm_quantize").default
    torch.library.opcheck(silu, (x, None, 1 / 2688, 0, 2))
    torch.library.opcheck(silu, (x, torch.full((1,), 1 / 2688), 0.0, 0, 0))
    for residual in (None, x.clone()):
        torch.library.opcheck(norm, (x, residual, weight, 1e-6, None, 1 / 2688, 0, 2))
