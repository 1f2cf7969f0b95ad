"""The launch that sorts few tokens and writes their rows compiles, offline, without local memory.

Triton 3.7.1 keeps one 8-byte value there, written and read once, where a row is read twice. 3.6.0, which
ran on an H200, does not.
"""

# SPDX-License-Identifier: Apache-2.0
import pytest
from offline import compile_kernel, resources

from nvfp4_moe.kernels.moe.hopper.prologue import CODES, PLAIN, QUANTIZED, prologue_kernel
from nvfp4_moe.kernels.quantize.launch import launch_config
from nvfp4_moe.kernels.triton_target import triton_version
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe

pytestmark = pytest.mark.compile


@pytest.mark.parametrize("columns", [2048, 2880, 7168])
@pytest.mark.parametrize(
    "form", [PLAIN, CODES, Recipe(), Recipe("exact", NVFP44Over6Config(448, "MAE"))], ids=str
)
def test_no_local_memory(form, columns, tmp_path):
    pointers = ("ids_ptr", "expanded_ptr", "permuted_ptr", "tile_ptr", "end_ptr", "x_ptr")
    types = dict.fromkeys(pointers, "*i32") | {
        "values_ptr": "*bf16", "token_ptr": "*fp32", "given_ptr": "*fp32", "sf_ptr": "*u8",
        "base_scale_inv": "fp32",
    }  # fmt: skip
    types |= dict.fromkeys(("N", "tiles", "first_expert", "E", "NB"), "i32")
    recipe = form if isinstance(form, Recipe) else None
    four_over_six = recipe is not None and recipe.four_over_six is not None
    if form is CODES:
        types["x_ptr"] = "*u16"
    config = launch_config(8, columns // 16, four_over_six=four_over_six)
    constants = {
        "rcp_delta_ptr": None, "BINS": 256, "CHUNK": 64, "TILE": 8,
        "FORM": QUANTIZED.value if recipe else form.value,
        "RECIPE": recipe.code if recipe else 0, "BLOCKS": config.blocks,
        "READ": config.read, "SPLITS": config.splits, "SLOTS": 8, "ARCH": 90,
    }  # fmt: skip
    if form is PLAIN:
        constants["token_ptr"] = None
    if form is not CODES:
        constants |= {"sf_ptr": None, "given_ptr": None}
    aligned = [n for n in (*pointers, "values_ptr", "token_ptr", "sf_ptr") if n not in constants]
    kernel = compile_kernel(
        prologue_kernel, 90, types, constants, aligned, num_warps=config.warps, launch_pdl=True
    )
    kept = resources(kernel, tmp_path)
    read_twice = recipe == Recipe() and config.read > 0
    assert kept == (0, 0) or (kept == (8, 2) and read_twice and triton_version() == (3, 7))
    assert "griddepcontrol.wait" in kernel.asm["ptx"]
