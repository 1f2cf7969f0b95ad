"""The producers compile, offline, for each architecture, without local memory or fused operations."""

# SPDX-License-Identifier: Apache-2.0
import re

import pytest
from offline import compile_kernel, resources

from nvfp4_moe.kernels.fused_quantize import kernel as k
from nvfp4_moe.kernels.fused_quantize.launch import launch_config
from nvfp4_moe.kernels.jit.formats import BF16, FP16
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe, SfLayout

pytestmark = pytest.mark.compile


def compile_producer(arch, kind, columns, recipe=Recipe(), dtype=BF16, values=False):  # noqa: B008
    rows, blocks, warps = launch_config(columns // 16)
    none = ["scale_ptr", "rcp_delta_ptr"]
    none += ["codes_ptr", "sf_ptr", "token_ptr"] if values else ["values_ptr"]
    none += [] if kind is k.ADD_RMSNORM else ["residual_ptr"]
    none += ["weight_ptr"] if kind is k.SILU_AND_MUL else []
    constants = dict.fromkeys(none) | {
        "KIND": kind.value,
        "RECIPE": recipe.code,
        "DTYPE": dtype.value,
        "LAYOUT": int(SfLayout.layout_128x4),
        "ROWS": rows,
        "BLOCKS": blocks,
        "ARCH": arch,
    }
    if columns == 16:  # Triton makes a constant of an argument that is 1
        constants["NB"] = 1
    half = "*bf16" if dtype is BF16 else "*fp16"
    types = {
        "x_ptr": "*i32", "residual_ptr": half, "weight_ptr": "*i32", "codes_ptr": "*i32",
        "sf_ptr": "*u8", "token_ptr": "*fp32", "values_ptr": half, "scale_value": "fp32",
        "eps": "fp32", "M": "i32", "NB": "i32", "padded_rows": "i32", "padded_columns": "i32",
    }  # fmt: skip
    aligned = [n for n in types if n not in constants and (n.endswith("_ptr") or n == "NB")]
    return compile_kernel(k.producer_kernel, arch, types, constants, aligned, num_warps=warps)


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_no_local_memory(arch, tmp_path):
    for kind in (k.SILU_AND_MUL, k.RMSNORM, k.ADD_RMSNORM):
        for columns in (512, 7168, 16384):
            kernel = compile_producer(arch, kind, columns)
            assert resources(kernel, tmp_path) == (0, 0), (kind, columns)
            assert "ld.global.v4.b32" in kernel.asm["ptx"]


@pytest.mark.parametrize("arch", [90, 100])
def test_every_operation_rounds_by_itself(arch):
    """No fused multiply-add but those of the code's rounding, no approximate root or quotient."""
    for kind in (k.SILU_AND_MUL, k.RMSNORM, k.ADD_RMSNORM):
        for dtype in (BF16, FP16):
            ptx = compile_producer(arch, kind, 4096, dtype=dtype, values=True).asm["ptx"]
            assert not re.search(r"fma\.|ex2\.|rsqrt|sqrt\.approx|div\.full|\.ftz", ptx)
            assert ("sqrt.rn.f32" in ptx) == (kind is not k.SILU_AND_MUL)
            assert "div.rn.f32" in ptx


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_row_of_one_block_compiles(arch, tmp_path):
    for kind in (k.SILU_AND_MUL, k.RMSNORM, k.ADD_RMSNORM):
        resources(compile_producer(arch, kind, 16), tmp_path)


def test_recipes_compile(tmp_path):
    for recipe in (Recipe("exact"), Recipe("fast", NVFP44Over6Config()), Recipe(build="cute-dsl")):
        for kind in (k.SILU_AND_MUL, k.ADD_RMSNORM):
            resources(compile_producer(90, kind, 4096, recipe), tmp_path)
