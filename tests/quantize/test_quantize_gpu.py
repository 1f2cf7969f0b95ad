"""The Triton kernels on a GPU: bitwise against the reference, in every shipped launch configuration."""

# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import triton_cases
from assertions import assert_bitwise, assert_quantized
from golden_cases import OUTPUTS, cases
from marks import ON_A_GPU

import nvfp4_moe
from nvfp4_moe.cases import inputs
from nvfp4_moe.kernels.quantize import launch as triton_quantize
from nvfp4_moe.reference import quantize as reference
from nvfp4_moe.reference.numerics import fp32
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe, SfLayout, all_recipes

pytestmark = ON_A_GPU


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", inputs.KINDS)
def test_every_recipe(kind, dtype):
    triton_cases.every_recipe(kind, dtype, "cuda")


@pytest.mark.parametrize("case", triton_cases.CASES, ids=lambda f: f.__name__)
def test_case(case):
    case("cuda")


@pytest.mark.parametrize("edge", [False, True], ids=["golden", "golden-edge"])
def test_every_golden_array(edge):
    compared = 0
    for case in cases(edge):
        x = case.x.cuda()
        for i, (name, layout) in enumerate(case.layouts):
            if case.global_scale is None:
                g = case.recipe.base_scale_inv
                got = triton_quantize.quantize_per_token(x, g, case.recipe, layout)
            else:
                scale = case.global_scale.cuda()
                got = triton_quantize.quantize_global_scale(x, scale, case.recipe, layout)
            assert_bitwise(got[1], case.expected[name], f"{case.name}/{name}")
            compared += 1
            for j, output in ((0, "q"), (2, "scale")):
                if output in case.expected:
                    assert_bitwise(got[j], case.expected[output], f"{case.name}/{output}")
                    compared += i == 0
    assert compared == OUTPUTS[edge]


COLUMNS = (
    *(16, 64, 128, 256, 512, 1024, 2048, 2688, 3584, 4096),
    *(5120, 6144, 7168, 8192, 10240, 12288, 14336, 16384, 20480),
)
"""One for each number of blocks that configurations tell apart, and some between."""
STANDING_FOR_ALL = (
    *(r for r in all_recipes() if r.four_over_six is None),
    Recipe("fast", NVFP44Over6Config()),
    Recipe("exact", NVFP44Over6Config(256, "MSE")),
    Recipe("exact", NVFP44Over6Config(), "cute-dsl"),
)


@pytest.mark.parametrize("columns", COLUMNS)
def test_every_launch_configuration(columns):
    """A miscompiled configuration shows in ordinary numbers; special ones are in other tests."""
    for m in (1, 100, 131):  # few rows, some, many: the choices of `launch_config`
        x = inputs.synthetic("heavy", m, columns, seed=columns + m).cuda()
        for recipe in STANDING_FOR_ALL:
            triton_cases.per_token(x, recipe)
            triton_cases.per_token(x, recipe, SfLayout.layout_128x4)
        triton_cases.global_scale(x, 2688 / 50.0, Recipe(), SfLayout.layout_128x4)


@pytest.mark.parametrize("recipe", all_recipes(), ids=str)
def test_a_thirty_second_of_a_billion(recipe):
    """36 recipes x 2^25 elements are 1.2 * 10^9, in several widths."""
    for columns in (512, 2048, 4096, 7168):
        m = 2**23 // columns
        x = torch.randn(m, columns, device="cuda", generator=_generator(columns)).bfloat16()
        x *= torch.exp2(torch.randint(-9, 9, (m, 1), device="cuda", generator=_generator(m)))
        layout = SfLayout.layout_128x4 if columns in (2048, 7168) else SfLayout.layout_linear
        triton_cases.per_token(x, recipe, layout)


def _generator(seed):
    return torch.Generator("cuda").manual_seed(seed)


def test_rows_in_extreme_ranges_take_the_slow_division():
    """4over6 divides by a constant in three instructions only where that is exact."""
    x = torch.randn(64, 512, device="cuda", generator=_generator(1))
    x *= torch.exp2(torch.linspace(-120, 120, 64, device="cuda")[:, None])
    for recipe in all_recipes():
        if recipe.four_over_six is not None:
            triton_cases.per_token(x.bfloat16(), recipe)


def test_beyond_two_to_the_31_elements():
    m, k = 799_040, 2688  # the MoE intermediate that broke 32-bit offsets elsewhere
    if torch.cuda.get_device_properties(0).total_memory < 20 * 2**30:
        pytest.skip("needs a GPU with 20 GiB of memory")
    x = torch.empty(m, k, dtype=torch.bfloat16, device="cuda")
    x[:] = torch.randn(k, device="cuda", generator=_generator(2)).bfloat16()
    x *= torch.exp2((torch.arange(m, device="cuda") % 13)[:, None]).bfloat16()
    got = triton_quantize.quantize_per_token(x, 1 / 2688, Recipe(), SfLayout.layout_128x4)
    for rows in (slice(0, 128), slice(798_848, 799_040)):
        want = reference.quantize_per_token(x[rows], 1 / 2688, Recipe(), SfLayout.layout_128x4)
        assert_bitwise(got[0][rows], want.codes, f"codes of {rows}")
        assert_bitwise(got[1][rows.start : -(-rows.stop // 128) * 128], want.block_scales, "scales")
        assert_bitwise(got[2][rows], want.per_token_scale, f"per-token scales of {rows}")


def test_all_of_the_outputs_is_written(unwritten_memory_is_nan):
    """Padding included."""
    x = inputs.synthetic("normal", 5, 80).cuda()
    for layout in SfLayout:
        for recipe in (Recipe(), Recipe("fast", NVFP44Over6Config())):
            triton_cases.per_token(x, recipe, layout)
            triton_cases.global_scale(x, 9.0, recipe, layout)


@pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)
def test_cuda_graph(layout):
    x = inputs.synthetic("normal", 33, 2048).cuda()
    recipes = (Recipe(), Recipe("exact"), Recipe("fast", NVFP44Over6Config()))

    def call(r):
        return nvfp4_moe.nvfp4_quantize(
            x, r.base_scale_inv, layout, per_token_activation=True, backend="triton",
            nvfp4_4over6=r.four_over_six, fast_math=r.math == "fast",
        )  # fmt: skip

    for recipe in recipes:
        call(recipe)  # compile
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [call(recipe) for recipe in recipes]
    x.copy_(inputs.synthetic("heavy", 33, 2048, seed=9))
    graph.replay()
    for recipe, got in zip(recipes, captured, strict=True):
        want = reference.quantize_per_token(x, recipe.base_scale_inv, recipe, layout)
        assert_quantized(got, want, str(recipe))


def test_compiles_into_one_graph():
    x = inputs.synthetic("normal", 7, 512).cuda()

    def call(x):
        return nvfp4_moe.nvfp4_quantize(
            x, 1 / 2688, per_token_activation=True, nvfp4_4over6=None, backend="triton"
        )

    for got, want in zip(torch.compile(call, fullgraph=True)(x), call(x), strict=True):
        assert_bitwise(got, want, "compiled")


def test_rcp_table_is_this_gpus():
    from nvfp4_moe.kernels.rcp_probe import measure_rcp_delta

    assert_bitwise(measure_rcp_delta("cuda"), fp32.rcp_delta(torch.device("cpu")), "rcp table")


def test_reference_is_the_same_on_the_gpu():
    for kind in inputs.KINDS:
        x = inputs.synthetic(kind, 40, 80)
        for recipe in all_recipes():
            got = reference.quantize_per_token(x.cuda(), recipe.base_scale_inv, recipe)
            want = reference.quantize_per_token(x, recipe.base_scale_inv, recipe)
            assert_quantized(
                (got.codes, got.block_scales, got.per_token_scale), want, f"{kind} {recipe}"
            )
