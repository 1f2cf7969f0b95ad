"""The backward's kernels compile, offline, for each architecture, without local memory."""

# SPDX-License-Identifier: Apache-2.0
import pytest
from offline import compile_kernel, disassemble, resources

from nvfp4_moe.kernels.moe.training.activation_gradient import activation_gradient_kernel
from nvfp4_moe.kernels.moe.training.empty_groups import zero_empty_groups_kernel
from nvfp4_moe.kernels.moe.training.row_dots import row_dots_kernel
from nvfp4_moe.kernels.weights.values import weight_values_kernel
from nvfp4_moe.reference.activation import IMPLEMENTED

pytestmark = pytest.mark.compile

ARCHS = [80, 90, 100, 120]


@pytest.mark.parametrize("arch", ARCHS)
def test_decoded_weights(arch, tmp_path):
    types = {
        "codes_ptr": "*u16", "sf_ptr": "*u8", "place_ptr": "*i32", "out_ptr": "*bf16",
        "R": "i32", "M": "i32", "NB": "i32", "blocks": "i32",
    }  # fmt: skip
    constants = {"ROWS": 8, "BLOCKS": 64, "ARCH": arch}
    kernel = compile_kernel(weight_values_kernel, arch, types, constants, types)
    assert resources(kernel, tmp_path) == (0, 0)
    code = disassemble(kernel, tmp_path)
    assert "LDG.E.64" in code and "STG.E.128" in code  # a block's codes, eight values


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kind", IMPLEMENTED, ids=lambda kind: kind.name)
def test_every_derivative(arch, kind, tmp_path):
    """For sm_90 with all that a call may have, for sm_80 with nothing of it."""
    tensors = {
        "sums_ptr": "*bf16", "token_scale_ptr": "*fp32", "bias_ptr": "*fp32", "scale_ptr": "*fp32",
        "expert_ptr": "*i64", "alpha_ptr": "*fp32", "beta_ptr": "*fp32", "limit_ptr": "*fp32",
        "d_ptr": "*bf16", "factor_ptr": "*fp32", "column_scale_ptr": "*fp32",
        "row_scale_ptr": "*fp32", "a_ptr": "*bf16", "first_ptr": "*bf16", "second_ptr": "*bf16",
    }  # fmt: skip
    optional = (
        "token_scale_ptr", "bias_ptr", "alpha_ptr", "beta_ptr", "limit_ptr", "column_scale_ptr",
        "row_scale_ptr", "second_ptr",
    )  # fmt: skip
    types = tensors | {"columns": "i32"}
    constants = {"ACT": int(kind), "BLOCK": 1024, "ARCH": arch}
    if arch == 90:
        names = {p.removesuffix("_ptr"): p for p in ("alpha_ptr", "beta_ptr")}
        names["clamp_limit"] = "limit_ptr"
        constants |= {p: None for n, p in names.items() if n not in kind.parameters}
    else:
        constants |= dict.fromkeys(optional)
    kernel = compile_kernel(activation_gradient_kernel, arch, types, constants, types)
    assert resources(kernel, tmp_path) == (0, 0)
    assert "STG.E.128" in disassemble(kernel, tmp_path)


@pytest.mark.parametrize("arch", ARCHS)
def test_rows_and_empty_groups(arch, tmp_path):
    types = {
        "grad_ptr": "*bf16", "token_ptr": "*i64", "sums_ptr": "*bf16", "row_scale_ptr": "*fp32",
        "bias_ptr": "*fp32", "scale_ptr": "*fp32", "expert_ptr": "*i64", "out_ptr": "*fp32",
        "columns": "i32",
    }  # fmt: skip
    constants = {"BLOCK": 1024, "ARCH": arch}
    kernel = compile_kernel(row_dots_kernel, arch, types, constants, types)
    assert resources(kernel, tmp_path) == (0, 0)
    types = {"t_ptr": "*bf16", "end_ptr": "*i32", "elements": "i32"}
    constants = {"BLOCK": 4096, "PROGRAMS": 64, "ARCH": arch}
    kernel = compile_kernel(zero_empty_groups_kernel, arch, types, constants, types)
    assert resources(kernel, tmp_path) == (0, 0)
