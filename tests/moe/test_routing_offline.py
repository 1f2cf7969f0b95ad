"""The routing kernel compiles, offline, for each architecture."""

# SPDX-License-Identifier: Apache-2.0
import pytest
from offline import compile_kernel, resources

from nvfp4_moe.kernels.moe.routing import route_kernel
from nvfp4_moe.reference.moe.routing import RoutingMethodType

pytestmark = pytest.mark.compile


@pytest.mark.parametrize("arch", [80, 90, 100, 121])
@pytest.mark.parametrize("method", [RoutingMethodType.Default, RoutingMethodType.DeepSeekV3])
def test_compiles_without_a_stack(arch, method, tmp_path):
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
        "SLOTS": 8,
        "ARCH": arch,
    }
    kernel = compile_kernel(route_kernel, arch, types, constants, ["logits_ptr"], num_warps=1)
    stack, spills = resources(kernel, tmp_path)
    assert stack <= 64 and not spills
