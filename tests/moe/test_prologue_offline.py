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
from nvfp4_moe.reference.moe.routing import RoutingMethodType
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe

pytestmark = pytest.mark.compile


def _compiled(
    form, columns, tokens=8, experts=None, logits="*fp32", *, placed=True, method="Renormalize"
):
    """Return the kernel, and how its rows are quantized; with `experts` it routes."""
    pointers = ("ids_ptr", "expanded_ptr", "permuted_ptr", "tile_ptr", "end_ptr", "x_ptr")
    types = dict.fromkeys(pointers, "*i32") | {
        "values_ptr": "*bf16", "token_ptr": "*fp32", "given_ptr": "*fp32", "sf_ptr": "*u8",
        "base_scale_inv": "fp32",
    }  # fmt: skip
    types |= {"logits_ptr": logits, "weights_ptr": "*bf16"}
    types |= dict.fromkeys(("N", "tiles", "first_expert", "E", "NB", "ROUTED"), "i32")
    recipe = form if isinstance(form, Recipe) else None
    four_over_six = recipe is not None and recipe.four_over_six is not None
    if form is CODES:
        types["x_ptr"] = "*u16"
    config = launch_config(tokens, columns // 16, four_over_six=four_over_six)
    constants = {
        "rcp_delta_ptr": None, "table_ptr": None, "BINS": 256, "CHUNK": 8 * tokens, "TILE": 8,
        "FORM": QUANTIZED.value if recipe else form.value,
        "RECIPE": recipe.code if recipe else 0, "BLOCKS": config.blocks,
        "READ": config.read, "SPLITS": config.splits, "SLOTS": 8, "PLACED": placed, "ARCH": 90,
    }  # fmt: skip
    if form is PLAIN:
        constants["token_ptr"] = None
    if form is not CODES:
        constants |= {"sf_ptr": None, "given_ptr": None}
    if experts is None:
        constants |= {
            "logits_ptr": None, "weights_ptr": None, "METHOD": None, "APPROXIMATE": False,
            "ROWS": 1, "WIDTH": 32,
        }  # fmt: skip
    else:
        constants |= {
            "METHOD": int(RoutingMethodType[method]), "APPROXIMATE": False,
            "ROWS": max(config.warps, tokens), "WIDTH": experts,
        }  # fmt: skip
    every = (*pointers, "values_ptr", "token_ptr", "sf_ptr", "logits_ptr", "NB", "ROUTED")
    aligned = [n for n in every if n not in constants]
    return config, compile_kernel(
        prologue_kernel, 90, types, constants, aligned, num_warps=config.warps, launch_pdl=True
    )


def _assert_no_local_memory(kernel, read_twice, tmp_path):
    kept = resources(kernel, tmp_path)
    assert kept == (0, 0) or (kept == (8, 2) and read_twice and triton_version() == (3, 7))


@pytest.mark.parametrize(
    "columns,placed", [(2048, True), (2880, True), (7168, True), (7168, False)]
)
@pytest.mark.parametrize(
    "form", [PLAIN, CODES, Recipe(), Recipe("exact", NVFP44Over6Config(448, "MAE"))], ids=str
)
def test_no_local_memory(form, columns, placed, tmp_path):
    config, kernel = _compiled(form, columns, placed=placed)
    _assert_no_local_memory(kernel, form == Recipe() and config.read > 0, tmp_path)
    assert "griddepcontrol.wait" in kernel.asm["ptx"]


@pytest.mark.parametrize(
    "tokens,experts,logits",
    [(1, 128, "*fp32"), (4, 128, "*fp32"), (16, 32, "*bf16"), (2, 256, "*bf16")],
)
@pytest.mark.parametrize("columns", [2048, 2880])
def test_it_routes_without_local_memory(tokens, experts, logits, columns, tmp_path):
    """No warp waits for another while it chooses: each does so for tokens of its own."""
    config, kernel = _compiled(Recipe(), columns, tokens, experts, logits)
    _assert_no_local_memory(kernel, config.read > 0, tmp_path)
    choice = kernel.asm["ptx"].partition("griddepcontrol.wait")[2].partition("bar.sync")[0]
    assert choice.count("redux.sync") + choice.count("shfl.sync") >= 2 * 8  # a step has two


def test_a_weight_that_is_a_logit_is_rounded_to_bf16():
    """Rounding makes all NaN the same, of bf16 logits, too: the compiler must not leave it out."""
    _, kernel = _compiled(PLAIN, 2048, 1, 128, "*bf16", method="TopK")
    assert "cvt.rn.bf16" in kernel.asm["ptx"]
