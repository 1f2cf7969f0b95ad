"""A GPU of sm_90 that does nothing: CPU tensors count as its, and a launch is noted.

It shows the host's part of a call: checks, choice, sizes, memory, and the arguments of launches. It
leaves out the driver, the encoding of TMA descriptors, and the compilation of kernels.
"""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import pytest
import torch
import triton

from nvfp4_moe.kernels import device, launcher, triton_target
from nvfp4_moe.kernels.moe.autotune import cache
from nvfp4_moe.kernels.moe.hopper import launch as hopper
from nvfp4_moe.kernels.records import repeats
from nvfp4_moe.reference import checks

current_device = 0
"""The number of the current GPU."""


class Compiled:
    """A compiled kernel of Triton whose launches are noted."""

    function, packed_metadata = 7, (4, 1, 0)

    def __init__(self, launches: list[tuple[Any, ...]]) -> None:
        self.run = lambda *args: launches.append(args)


def present(patch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Until `patch` is undone there is this GPU, and calls are recorded.

    It takes the test's own patch: of two, the one that ends last would put back what the other one had
    set.

    Returns:
        The list to which the arguments of direct launches are added.
    """
    launches: list[tuple[Any, ...]] = []
    for target, name, value in (
        (device, "of_device", lambda d: (9, 0)),
        (triton_target, "capability", lambda d: (9, 0)),
        (cache, "gpu_name", lambda d: "a pretended GPU"),
        (launcher, "_DIRECT", True),
        (launcher, "_LAUNCHES", {}),
        (triton.JITFunction, "run", lambda kernel, *args, **options: Compiled(launches)),
        (torch.cuda, "current_device", lambda: current_device),
        (torch.cuda, "is_initialized", lambda: True),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (hopper, "multiprocessors", lambda d: 132),
        (checks, "reads_values", lambda *tensors, waits=False: False),  # as on a GPU
        (repeats, "enabled", True),
        (repeats, "_known", repeats._Known()),
    ):
        patch.setattr(target, name, value)
    for name, function in (
        ("_cuda_getCurrentRawStream", lambda d: 11),
        ("_cuda_getDevice", lambda: current_device),
    ):
        patch.setattr(torch._C, name, function, raising=False)  # torch for CPUs has none
    return launches
