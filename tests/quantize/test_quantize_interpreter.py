"""The Triton kernels in the interpreter, bitwise against the reference, on any machine."""

# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import triton_cases
from assertions import assert_bitwise
from golden_cases import cases

import nvfp4_moe
from nvfp4_moe.cases import inputs
from nvfp4_moe.kernels.quantize import launch as triton_quantize
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, at inf and NaN
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", inputs.KINDS)
def test_every_recipe(kind, dtype):
    triton_cases.every_recipe(kind, dtype, "cpu")


@pytest.mark.parametrize("case", triton_cases.CASES, ids=lambda f: f.__name__)
def test_case(case):
    case("cpu")


def test_golden_sample():
    """The whole edge file, and the small inputs of one kind, in every recipe."""
    compared = 0
    sample = (case for case in cases(False) if "bits" in case.name and case.x.shape[1] <= 64)
    for case in (*cases(True), *sample):
        for name, layout in case.layouts:
            if case.global_scale is None:
                got = triton_quantize.quantize_per_token(
                    case.x, case.recipe.base_scale_inv, case.recipe, layout
                )
                if "scale" in case.expected:
                    assert_bitwise(got[2], case.expected["scale"], case.name)
            else:
                got = triton_quantize.quantize_global_scale(
                    case.x, case.global_scale, case.recipe, layout
                )
            assert_bitwise(got[0], case.expected["q"], case.name)
            assert_bitwise(got[1], case.expected[name], f"{case.name}/{name}")
            compared += 1
    assert compared > 150


@pytest.mark.parametrize("recipe", [0, 1, 2], ids=["fast", "exact-cute-dsl", "4over6"])
def test_compiles_into_one_graph(recipe):
    options, g = (
        ({}, 1 / 2688),
        ({"fast_math": False, "build": "cute-dsl"}, 1 / 2688),
        ({"nvfp4_4over6": NVFP44Over6Config(256, "MSE")}, 1 / 1536),
    )[recipe]
    x = inputs.synthetic("normal", 7, 64)
    for backend in ("triton", "auto"):

        def call(x, backend=backend):
            return nvfp4_moe.nvfp4_quantize(
                x, g, backend=backend, per_token_activation=True, **options
            )

        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        for got, want in zip(compiled(x), call(x), strict=True):
            assert_bitwise(got, want, backend)


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_opcheck(name):
    x = inputs.synthetic("normal", 7, 64)
    index = torch.arange(7, dtype=torch.int32)
    one = torch.ones(1)
    ops = torch.ops.nvfp4_moe
    per_token = getattr(ops, f"{name}_per_token").default
    for arguments in (
        (x, None, 1 / 2688, 0, 2, None, None),
        (x, one / 2688, 0.0, Recipe("exact", NVFP44Over6Config()).code, 0, index, one),
    ):
        torch.library.opcheck(per_token, arguments)
    by_row = torch.linspace(1, 9, 7)
    global_scale = getattr(ops, f"{name}_global_scale").default
    for arguments in ((x, None, 3.0, 0, 1, False), (x, by_row, 0.0, 64, 0, True)):
        torch.library.opcheck(global_scale, arguments)


def test_auto_never_picks_the_interpreter():
    x = inputs.synthetic("normal", 4, 32)
    explanation = nvfp4_moe.explain(x, 1 / 2688, per_token_activation=True)
    assert explanation.backend == "reference"
    assert explanation.reason("triton") is None


def test_a_planted_bit_is_seen():
    x = inputs.synthetic("normal", 4, 32)
    codes, _, _ = triton_quantize.quantize_per_token(x, 1 / 2688, Recipe())
    flipped = codes.clone()
    flipped[2, 3] ^= 0x10
    with pytest.raises(AssertionError, match=r"1 of 64 differ, first at \(2, 3\)"):
        assert_bitwise(flipped, codes, "codes")
