"""Every shipped launch configuration compiles, offline, for each architecture, to what we expect."""

# SPDX-License-Identifier: Apache-2.0
import pytest
from offline import compile_kernel, disassemble, resources

from nvfp4_moe.kernels.jit.formats import BF16, GLOBAL_SCALE, PER_TOKEN
from nvfp4_moe.kernels.quantize import kernel as k
from nvfp4_moe.kernels.quantize.launch import LaunchConfig, global_launch_config, launch_config
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe, SfLayout, all_recipes

pytestmark = pytest.mark.compile

ARCHITECTURES = (80, 90, 100, 103, 120, 121)
COLUMNS = (16, 512, 2048, 4096, 7168, 16384, 32768)
ROWS = (1, 100, 4096)
RECIPES = (Recipe(), Recipe("exact"), Recipe("exact", NVFP44Over6Config(256, "MSE"), "cute-dsl"))


def shipped() -> list[tuple[Recipe, int, LaunchConfig]]:
    """(recipe, mode, configuration), each once; the recipes stand for their kind."""
    found = {}
    for recipe in RECIPES:
        for columns in COLUMNS:
            for m in ROWS:
                four = recipe.four_over_six is not None
                for tiled in (False, True):
                    config = launch_config(m, columns // 16, four_over_six=four, tiled=tiled)
                    found[recipe, PER_TOKEN.value, config] = None
                found[recipe, GLOBAL_SCALE.value, global_launch_config(m, columns // 16)] = None
    return list(found)


def compile_for(
    arch,
    recipe: Recipe,
    mode: int,
    config: LaunchConfig,
    layout,
    inverse=False,
    values=False,
    some_rows=False,
    **options,
):
    """The compiled kernel, with the argument properties that ordinary tensors have."""
    none = ["scale_ptr", "out_scale_ptr", "rcp_delta_ptr"]
    none += [] if some_rows else ["row_index_ptr"]
    none += ["codes_ptr", "sf_ptr"] if values else ["values_ptr"]
    none += ["place_ptr"]
    constants = dict.fromkeys(none) | {
        "RECIPE": recipe.code,
        "MODE": mode,
        "DTYPE": BF16.value,
        "LAYOUT": int(layout),
        "INVERSE": inverse,
        "HAS_ROW_INDEX": some_rows,
        "HAS_SCALE_TENSOR": False,
        "HAS_OUT_SCALE": False,
        "ROWS": config.rows,
        "BLOCKS": config.blocks,
        "PARTS": config.parts,
        "READ": config.read,
        "SPLITS": config.splits,
        "FRAGMENTS": False,
        "SLOTS": 0,
        "ARCH": arch,
    }
    types = {"x_ptr": "*i32", "codes_ptr": "*i32", "sf_ptr": "*u8", "token_ptr": "*fp32"}
    types |= {"values_ptr": "*bf16", "scale_value": "fp32", "M": "i32", "NB": "i32"}
    types |= {"row_index_ptr": "*i32", "padded_rows": "i32", "padded_columns": "i32"}
    pointers = ("x_ptr", "token_ptr", *(["values_ptr"] if values else ["codes_ptr", "sf_ptr"]))
    aligned = (*pointers, "NB", "padded_columns")
    return compile_kernel(
        k.quantize_kernel, arch, types, constants, aligned, num_warps=config.warps, **options
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_instructions(arch):
    """The conversion instruction from sm_100 on, none of it below; e4m3's from sm_89."""
    for recipe in RECIPES:
        config = launch_config(4096, 256, four_over_six=recipe.four_over_six is not None)
        ptx = compile_for(arch, recipe, 0, config, SfLayout.layout_128x4).asm["ptx"]
        assert ("cvt.rn.satfinite.e2m1x2.f32" in ptx) == (arch >= 100)
        assert ("cvt.rn.satfinite.e4m3x2.f32" in ptx) == (arch >= 89)
        assert ("mul.rn.ftz.f32" in ptx) == (recipe.build == "cuda")
        assert "ld.global.v4.b32" in ptx


@pytest.mark.parametrize("build", ["cuda", "cute-dsl"])
def test_no_reciprocal_is_optimized_away(build, tmp_path):
    """The assembler cancels rcp.approx(rcp.approx(x)) where the two stand side by side."""
    recipe = Recipe("fast", None, build)
    for mode, inverse in ((PER_TOKEN, False), (GLOBAL_SCALE, False), (GLOBAL_SCALE, True)):
        kernel = compile_for(
            90, recipe, mode.value, global_launch_config(7, 6), SfLayout.layout_linear, inverse
        )
        wanted = kernel.asm["ptx"].count("rcp.approx.ftz.f32")
        assert wanted == 2 + (inverse or mode is PER_TOKEN)
        assert disassemble(kernel, tmp_path).count("MUFU.RCP") == wanted


def test_too_few_registers_are_seen(tmp_path):
    """The other tests of local memory would see a spill."""
    config = launch_config(4096, 256, four_over_six=False)
    kernel = compile_for(80, Recipe(), 0, config, SfLayout.layout_128x4, maxnreg=24)
    stack, accesses = resources(kernel, tmp_path)
    assert stack > 0 and accesses > 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_local_memory(arch, tmp_path):
    """No stack and no spill in the plain recipes' common configurations."""
    _check_local_memory(arch, tmp_path, [c for c in shipped() if c[2].blocks in (64, 256, 512)])


@pytest.mark.parametrize("arch", [80, 90])  # where the mixture of experts multiplies values
def test_no_local_memory_with_values(arch, tmp_path):
    for m, columns in ((1, 2048), (4096, 2048), (128, 7168), (32768, 768)):
        config = launch_config(m, columns // 16)
        kernel = compile_for(
            arch, Recipe(), PER_TOKEN.value, config, SfLayout.layout_linear, values=True
        )
        assert resources(kernel, tmp_path) == (0, 0)
        assert "st.global.v2.b32" in kernel.asm["ptx"]  # four values at a time


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_local_memory_with_masked_input(arch, tmp_path):
    for mode in (PER_TOKEN, GLOBAL_SCALE):
        for values in (False, True):
            kernel = compile_for(
                arch, Recipe(), mode.value, launch_config(4096, 448), SfLayout.layout_linear,
                values=values, some_rows=True,
            )  # fmt: skip
            assert resources(kernel, tmp_path) == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)
def test_no_local_memory_in_any_configuration(arch, layout, tmp_path):
    """Every configuration, and every recipe in one of them; the three layouts take turns."""
    every = shipped()
    for i, recipe in enumerate(all_recipes()):
        fitting = [(m, c) for r, m, c in shipped() if _same_kind(r, recipe)]
        every.append((recipe, *fitting[i % len(fitting)]))
    turn = list(SfLayout).index(layout)
    _check_local_memory(arch, tmp_path, list(dict.fromkeys(every))[turn::3], layout)


def _same_kind(a: Recipe, b: Recipe) -> bool:
    return (a.four_over_six is None) == (b.four_over_six is None)


def _check_local_memory(arch, tmp_path, configurations, layout=SfLayout.layout_128x4):
    for recipe, mode, config in configurations:
        kernel = compile_for(arch, recipe, mode, config, layout)
        found = resources(kernel, tmp_path)
        assert found == (0, 0), f"sm_{arch} {recipe} mode {mode} {config}: stack, spills {found}"
