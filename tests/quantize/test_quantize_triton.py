"""The Triton quantizers, bitwise against the reference: in the interpreter, and on a GPU.

On a GPU every shipped launch configuration runs.
"""

# SPDX-License-Identifier: Apache-2.0
import golden_cases
import pytest
import torch
import triton_cases
from assertions import assert_bitwise, assert_quantized

import nvfp4_moe
from nvfp4_moe.cases import inputs
from nvfp4_moe.kernels.quantize import launch as quantize_launch
from nvfp4_moe.reference import quantize as reference
from nvfp4_moe.reference.numerics import fp32
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe, SfLayout, all_recipes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("recipe", triton_cases.EVERY, ids=str)
def test_every_recipe(recipe, dtype, device):
    triton_cases.one_recipe(recipe, dtype, device)


@pytest.mark.parametrize("case", triton_cases.CASES, ids=lambda f: f.__name__)
def test_case(case, device):
    case(device)


@pytest.mark.parametrize("edge", [False, True], ids=["golden", "golden-edge"])
@pytest.mark.parametrize("recipe", golden_cases.RECIPES, ids=str)
def test_golden_arrays(recipe, edge, device):
    """Every array on a GPU; in the interpreter the whole edge file, and small inputs of one kind."""
    cases = [case for case in golden_cases.cases(edge) if case.recipe == recipe]
    if device == "cpu" and not edge:
        cases = [case for case in cases if golden_cases.small(case)]
    compared = 0
    for case in cases:
        x = case.x.to(device)
        for i, (name, layout) in enumerate(case.layouts):
            if case.global_scale is None:
                got = quantize_launch.quantize_per_token(x, recipe.base_scale_inv, recipe, layout)
            else:
                scale = case.global_scale.to(device)
                got = quantize_launch.quantize_global_scale(x, scale, recipe, layout)
            assert_bitwise(got[1], case.expected[name], f"{case.name}/{name}")
            compared += 1
            for j, output in ((0, "q"), (2, "scale")):
                if output in case.expected:
                    assert_bitwise(got[j], case.expected[output], f"{case.name}/{output}")
                    compared += i == 0
    assert compared == sum(len(case.expected) for case in cases) > 0


COLUMNS = (
    *(16, 64, 128, 256, 512, 1024, 1280, 2048, 2688, 3584, 4096),
    *(5120, 6144, 7168, 8192, 10240, 12288, 14336, 16384, 16640, 20480),
)
"""One for each number of blocks that configurations tell apart, and some between."""
ROWS = (1, 31, 100, 131)
"""One for each number of rows that they tell apart. 131 is odd, and no multiple of 128."""
STANDING_FOR_ALL = (
    *triton_cases.PLAIN,
    Recipe("fast", NVFP44Over6Config()),
    Recipe("exact", NVFP44Over6Config(256, "MSE")),
    Recipe("exact", NVFP44Over6Config(), "cute-dsl"),
)


def test_columns_and_rows_reach_every_configuration():
    kinds = [{"four_over_six": f, "tiled": t} for f in (False, True) for t in (False, True)]

    def configurations(rows, blocks):
        choose = quantize_launch.launch_config
        return {choose(m, b, **kind) for m in rows for b in blocks for kind in kinds}

    reached = configurations(ROWS, [columns // 16 for columns in COLUMNS])
    assert configurations((1, 16, 17, 32, 33, 128, 129, 4096), range(1, 1300)) - reached == set()


@pytest.mark.gpu
@pytest.mark.parametrize("columns", COLUMNS)
def test_every_launch_configuration(columns):
    """A miscompiled configuration shows in ordinary numbers; special ones are in other tests."""
    for m in ROWS:
        x = inputs.synthetic("heavy", m, columns, seed=columns + m).cuda()
        for recipe in STANDING_FOR_ALL:
            triton_cases.per_token(x, recipe)
            triton_cases.per_token(x, recipe, SfLayout.layout_128x4)
        triton_cases.global_scale(x, 2688 / 50.0, Recipe(), SfLayout.layout_128x4)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", triton_cases.EVERY, ids=str)
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


@pytest.mark.gpu
def test_rows_in_extreme_ranges_take_the_slow_division():
    """4over6 divides by a constant in three instructions only where that is exact."""
    x = torch.randn(64, 512, device="cuda", generator=_generator(1))
    x *= torch.exp2(torch.linspace(-120, 120, 64, device="cuda")[:, None])
    for recipe in all_recipes():
        if recipe.four_over_six is not None:
            triton_cases.per_token(x.bfloat16(), recipe)


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [2048, 7168])
@pytest.mark.parametrize("recipe", STANDING_FOR_ALL, ids=str)
def test_blocks_far_below_their_row(recipe, columns):
    """4over6 limits magnitudes to 6 only in programs with a block scale of few steps of 2^-9."""
    strange = triton_cases.strange_rows(columns).cuda()
    steps = torch.exp2(-torch.arange(columns // 16, device="cuda") % 26.0)  # of each block
    x = torch.randn(400, columns, device="cuda", generator=_generator(3))
    x = (x.view(400, -1, 16) * steps[:, None]).view(400, columns)
    near = x[200:]  # no block of these rows stays far below its row
    near *= (near.abs().amax(1, keepdim=True) / near.abs()).clamp(max=2.0**13)
    for layout in (SfLayout.layout_linear, SfLayout.layout_128x4):
        triton_cases.per_token(strange, recipe, layout)
        triton_cases.per_token(x.bfloat16(), recipe, layout)


@pytest.mark.gpu
def test_beyond_two_to_the_31_elements():
    m, k = 799_040, 2688  # the MoE intermediate that broke 32-bit offsets elsewhere
    if torch.cuda.get_device_properties(0).total_memory < 20 * 2**30:
        pytest.skip("needs a GPU with 20 GiB of memory")
    x = torch.empty(m, k, dtype=torch.bfloat16, device="cuda")
    x[:] = torch.randn(k, device="cuda", generator=_generator(2)).bfloat16()
    x *= torch.exp2((torch.arange(m, device="cuda") % 13)[:, None]).bfloat16()
    got = quantize_launch.quantize_per_token(x, 1 / 2688, Recipe(), SfLayout.layout_128x4)
    for rows in (slice(0, 128), slice(798_848, 799_040)):
        want = reference.quantize_per_token(x[rows], 1 / 2688, Recipe(), SfLayout.layout_128x4)
        assert_bitwise(got[0][rows], want.codes, f"codes of {rows}")
        assert_bitwise(got[1][rows.start : -(-rows.stop // 128) * 128], want.block_scales, "scales")
        assert_bitwise(got[2][rows], want.per_token_scale, f"per-token scales of {rows}")


@pytest.mark.gpu
def test_all_of_the_outputs_is_written(unwritten_memory_is_nan):
    """Padding included."""
    x = inputs.synthetic("normal", 5, 80).cuda()
    for layout in SfLayout:
        for recipe in (Recipe(), Recipe("fast", NVFP44Over6Config())):
            triton_cases.per_token(x, recipe, layout)
            triton_cases.global_scale(x, 9.0, recipe, layout)
    many = inputs.synthetic("normal", 131, 2048).cuda()  # two rows a program, the last one without
    for recipe in (Recipe(), Recipe("fast", NVFP44Over6Config())):
        triton_cases.per_token(many, recipe, SfLayout.layout_128x4)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)
def test_cuda_graph(layout):
    x = inputs.synthetic("normal", 33, 2048).cuda()
    recipes = (Recipe(), Recipe("exact"), Recipe("fast", NVFP44Over6Config()))

    def call(r):
        return nvfp4_moe.nvfp4_quantize(
            x,
            r.base_scale_inv,
            layout,
            per_token_activation=True,
            backend="triton",
            nvfp4_4over6=r.four_over_six,
            fast_math=r.math == "fast",
        )

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


@pytest.mark.gpu
def test_compiles_by_inductor():
    x = inputs.synthetic("normal", 7, 512).cuda()

    def call(x):
        return nvfp4_moe.nvfp4_quantize(
            x, 1 / 2688, per_token_activation=True, nvfp4_4over6=None, backend="triton"
        )

    for got, want in zip(torch.compile(call, fullgraph=True)(x), call(x), strict=True):
        assert_bitwise(got, want, "compiled")


@pytest.mark.gpu
def test_rcp_table_is_this_gpus():
    from nvfp4_moe.kernels.instruction_probe import measure_rcp_delta

    assert_bitwise(measure_rcp_delta("cuda"), fp32.rcp_delta(torch.device("cpu")), "rcp table")


@pytest.mark.gpu
def test_reference_is_the_same_on_the_gpu():
    for kind in inputs.KINDS:
        x = inputs.synthetic(kind, 40, 80)
        for recipe in all_recipes():
            got = reference.quantize_per_token(x.cuda(), recipe.base_scale_inv, recipe)
            want = reference.quantize_per_token(x, recipe.base_scale_inv, recipe)
            assert_quantized(
                (got.codes, got.block_scales, got.per_token_scale), want, f"{kind} {recipe}"
            )


@pytest.mark.interpreter
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


@pytest.mark.interpreter
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
    for arguments in ((x, None, 3.0, 0, 1, False, None), (x, by_row, 0.0, 64, 0, True, None)):
        torch.library.opcheck(global_scale, arguments)


@pytest.mark.interpreter
def test_auto_never_picks_the_interpreter():
    x = inputs.synthetic("normal", 4, 32)
    explanation = nvfp4_moe.explain(x, 1 / 2688, per_token_activation=True)
    assert explanation.backend == "reference"
    assert explanation.reason("triton") is None


@pytest.mark.interpreter
def test_a_planted_bit_is_seen():
    x = inputs.synthetic("normal", 4, 32)
    codes, _, _ = quantize_launch.quantize_per_token(x, 1 / 2688, Recipe())
    flipped = codes.clone()
    flipped[2, 3] ^= 0x10
    with pytest.raises(AssertionError, match=r"1 of 64 differ, first at \(2, 3\)"):
        assert_bitwise(flipped, codes, "codes")
