"""The Triton dense product in the interpreter, against the reference, on any machine."""

# SPDX-License-Identifier: Apache-2.0
import dense_cases
import pytest
import torch
from assertions import assert_bitwise
from mutants.generated.strict import codes_multiplied

import nvfp4_moe
from nvfp4_moe.kernels.gemm_config import GemmConfig

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, at inf and NaN
]

CONFIGS = {
    "narrow": GemmConfig(64, 16, 128, 1, 4),
    "long": GemmConfig(128, 16, 256, 1, 4),
    "decoded": GemmConfig(64, 32, 64, 1, 4, decoded=True),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("case", dense_cases.CASES, ids=lambda f: f.__name__)
def test_case(case, config):
    case("cpu", CONFIGS[config])


@pytest.mark.parametrize("case", dense_cases.CASES, ids=lambda f: f.__name__)
def test_codes_multiplied_as_they_are(case):
    """The path of GPUs with a block-scaled MMA, with that instruction spelled out."""
    with codes_multiplied():
        case("cpu", GemmConfig(128, 16, 128, 1, 4))


def test_the_door_runs_it():
    case = dense_cases.coarse(5, 40, 64)
    want = nvfp4_moe.mm_fp4(**case.arguments, backend="reference")
    assert_bitwise(nvfp4_moe.mm_fp4(**case.arguments, backend="triton"), want, "triton")
    out = torch.full((5, 40), torch.nan, dtype=torch.bfloat16)
    assert nvfp4_moe.mm_fp4(**case.arguments, out=out, backend="triton") is out
    assert_bitwise(out, want, "out")
    assert nvfp4_moe.explain_mm_fp4(**case.arguments).backend == "reference"


def test_misaligned_and_strided_codes():
    case = dense_cases.coarse(5, 40, 64)
    want = nvfp4_moe.mm_fp4(**case.arguments, backend="reference")
    wide = torch.zeros(5, 40, dtype=torch.uint8)
    wide[:, 1:33] = case.a
    flat = torch.zeros(40 * 32 + 3, dtype=torch.uint8)
    b_rows = flat[3:].view(40, 32)
    b_rows.copy_(case.b_rows)
    arguments = case.arguments | {"a": wide[:, 1:33], "b": b_rows.T}
    assert_bitwise(nvfp4_moe.mm_fp4(**arguments, backend="triton"), want, "a copy is taken")


@pytest.mark.parametrize("backend", ["triton", "reference", "auto"])
@pytest.mark.parametrize("alpha", dense_cases.ALPHAS)
def test_compiles_into_one_graph(backend, alpha):
    torch._dynamo.reset()
    case = dense_cases.coarse(7, 40, 64, alpha=alpha)

    def call(a, out=None):
        return nvfp4_moe.mm_fp4(**case.arguments | {"a": a}, out=out, backend=backend) * 2

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert_bitwise(compiled(case.a), call(case.a), backend)
    out = torch.full((7, 40), torch.nan, dtype=torch.bfloat16)
    assert_bitwise(compiled(case.a, out), call(case.a), "out")
    assert_bitwise(out * 2, call(case.a), "out is filled")


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_opcheck(name):
    op = getattr(torch.ops.nvfp4_moe, f"{name}_mm_fp4").default
    for alpha, use_8x4 in (("none", False), ("rows", True)):
        c = dense_cases.coarse(7, 40, 64, alpha=alpha, use_8x4=use_8x4)
        out = torch.zeros(7, 40, dtype=torch.bfloat16)
        torch.library.opcheck(op, (c.a, c.b_rows, c.a_scales, c.b_scales, c.alpha, out, use_8x4))
