"""The routing kernel compiles, offline, for each architecture."""

# SPDX-License-Identifier: Apache-2.0
import pytest
from offline import compile_kernel, resources

from nvfp4_moe.kernels.instruction_probe import instruction_kernel
from nvfp4_moe.kernels.moe.routing import route_kernel
from nvfp4_moe.reference.moe.routing import RoutingMethodType

pytestmark = pytest.mark.compile


@pytest.mark.parametrize(
    "arch,approximate", [(80, False), (90, False), (90, True), (100, False), (121, False)]
)
@pytest.mark.parametrize(
    "method,groups",
    [
        (RoutingMethodType.Default, 1),
        (RoutingMethodType.DeepSeekV3, 1),
        (RoutingMethodType.DeepSeekV3, 8),
    ],
)
def test_compiles_without_a_stack(arch, method, groups, approximate, tmp_path):
    types = {
        "logits_ptr": "*bf16",
        "bias_ptr": "*fp32",
        "ids_ptr": "*i32",
        "weights_ptr": "*bf16",
        "scale": "fp32",
        "E": "i32",
    }
    constants = {
        "K": 8,
        "METHOD": int(method),
        "NORM": True,
        "WIDTH": 256,
        "LANES": 256 // groups,
        "GROUPS": groups,
        "TOP_GROUPS": groups // 2 or 1,
        "SLOTS": 8,
        "ARCH": arch,
        "APPROXIMATE": approximate,
        "BY_BLOCKS": True,
        "table_ptr": None,
        "rcp_delta_ptr": None,
    }
    kernel = compile_kernel(route_kernel, arch, types, constants, ["logits_ptr"], num_warps=1)
    stack, spills = resources(kernel, tmp_path)
    assert stack <= 64 and not spills
    mine = "ex2.approx.ftz.f32" if method == RoutingMethodType.Default else "tanh.approx.f32"
    assert approximate == (mine in kernel.asm["ptx"])


@pytest.mark.parametrize("name", ["ex2.approx.ftz.f32", "tanh.approx.f32"])
def test_the_probe_of_an_instruction_compiles(name):
    constants = {"SIZE": 1024, "NAME": name}
    types = {"x_ptr": "*fp32", "y_ptr": "*fp32"}
    kernel = compile_kernel(instruction_kernel, 90, types, constants, ["x_ptr"])
    assert name in kernel.asm["ptx"]
