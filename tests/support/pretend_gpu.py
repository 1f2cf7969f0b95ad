"""A GPU of sm_90 that does nothing: CPU tensors count as its, and a launch is noted.

It shows the host's part of a call: checks, choice, sizes, memory, and the arguments of launches. It
leaves out the driver, the encoding of TMA descriptors, and the compilation of kernels.
"""

# SPDX-License-Identifier: Apache-2.0
import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton

from nvfp4_moe.kernels import device, launcher, records, triton_target
from nvfp4_moe.kernels.moe.hopper import launch as hopper
from nvfp4_moe.reference import checks


class Compiled:
    """A compiled kernel of Triton whose launches are noted."""

    function, packed_metadata = 7, (4, 1, 0)

    def __init__(self, launches: list[tuple[Any, ...]]) -> None:
        self.run = lambda *args: launches.append(args)


@contextlib.contextmanager
def present() -> Iterator[list[tuple[Any, ...]]]:
    """Within, there is this GPU, and calls are recorded; yields the arguments of direct launches."""
    launches: list[tuple[Any, ...]] = []
    with contextlib.ExitStack() as stack:

        def put(target: Any, name: str, value: Any, **options: bool) -> None:
            stack.enter_context(mock.patch.object(target, name, value, **options))

        put(device, "of_device", lambda d: (9, 0))
        put(triton_target, "of_device", lambda d: (9, 0))
        put(launcher, "_DIRECT", True)
        put(launcher, "_LAUNCHES", {})
        put(triton.JITFunction, "run", lambda kernel, *args, **options: Compiled(launches))
        put(torch.cuda, "current_device", lambda: 0)
        put(torch.cuda, "is_initialized", lambda: True)
        put(torch.cuda, "is_current_stream_capturing", lambda: False)
        put(torch.cuda, "get_device_name", lambda d=None: "a pretended GPU")
        put(torch._C, "_cuda_getCurrentRawStream", lambda d: 11, create=True)
        put(hopper, "_multiprocessors", lambda d: 132)
        put(checks, "reads_values", lambda *tensors, waits=False: False)  # as on a GPU
        put(records, "enabled", True)
        for cached in (triton_target.capability, triton_target.gpu_name):
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        records.forget()
        stack.callback(records.forget)
        yield launches
