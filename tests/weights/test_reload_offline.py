"""The kernels of a reload compile, offline, for each architecture, without local memory."""

# SPDX-License-Identifier: Apache-2.0
import re

import pytest
from offline import compile_kernel, resources

from nvfp4_moe.kernels.jit.formats import BF16, FP16
from nvfp4_moe.kernels.weights import kernel as k
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe

pytestmark = pytest.mark.compile


def compile_writer(arch, recipe, dtype, gated=True):
    constants = {
        "rcp_delta_ptr": None,
        "RECIPE": recipe.code,
        "DTYPE": dtype.value,
        "GATED": gated,
        "BLOCKS": 256,
        "ARCH": arch,
    }
    types = {
        "x_ptr": "*i32", "amax_ptr": "*fp32", "added_ptr": "*fp32", "codes_ptr": "*i32", "sf_ptr": "*u8",
        "scalar_ptr": "*fp32", "divisor_ptr": "*fp32", "up_scalar_ptr": "*fp32",
        "factor_ptr": "*fp32", "largest": "fp32", "rows": "i32", "half_rows": "i32", "NB": "i32",
        "padded_rows": "i32", "padded_blocks": "i32",
    }  # fmt: skip
    aligned = [
        "x_ptr",
        "codes_ptr",
        "sf_ptr",
        "rows",
        "half_rows",
        "NB",
        "padded_rows",
        "padded_blocks",
    ]
    return compile_kernel(k.load_weights_kernel, arch, types, constants, aligned, num_warps=4)


@pytest.mark.parametrize("arch", [80, 89, 90, 100, 103, 120])
def test_writer(arch, tmp_path):
    for recipe in (Recipe("exact"), Recipe("exact", NVFP44Over6Config(256, "MSE"))):
        for dtype in (BF16, FP16):
            kernel = compile_writer(arch, recipe, dtype)
            assert resources(kernel, tmp_path) == (0, 0), (recipe, dtype)
            ptx = kernel.asm["ptx"]
            assert "ld.global.v4.b32" in ptx
            assert ("cvt.rn.satfinite.e2m1x2.f32" in ptx) == (arch >= 100)
            if arch >= 100 and recipe.four_over_six is None:
                # Every operation rounds by itself; elsewhere the code's own rounding fuses.
                assert not re.search(r"fma\.|div\.full", ptx)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_maxima(arch, tmp_path):
    constants = {"DTYPE": BF16.value, "WORDS": 4096, "STEPS": 4, "ARCH": arch}
    types = {"x_ptr": "*i32", "amax_ptr": "*i32", "words": "i32"}
    kernel = compile_kernel(k.amax_kernel, arch, types, constants, ["x_ptr", "words"], num_warps=8)
    assert resources(kernel, tmp_path) == (0, 0)
    ptx = kernel.asm["ptx"]
    # As many loads are on their way as a program has.
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == 4096 * 4 // (8 * 32 * 4)
    assert re.search(r"atom\.\S*max|red\.\S*max", ptx)
