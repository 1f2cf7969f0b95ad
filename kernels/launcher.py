"""Launching a kernel: as Triton does the first time, then directly.

Triton finds a compiled kernel by the text of its options, and checks every global variable that its
source names, at each launch. Here the key has the constants and what Triton
specializes arguments by, and the compiled kernel is launched without more ado.
"""

# SPDX-License-Identifier: Apache-2.0
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat, takewhile
from typing import Any

import torch
import triton

from .records import recorder, repeats
from .triton_target import INTERPRETING, triton_version

_MOST_ADDRESSES = 512  # of a descriptor of a record: more than a model has layers of one form

_DIRECT = not INTERPRETING and triton_version() == (3, 6)
"""True for the version of Triton whose compiled kernels are launched directly: it ran on a GPU."""


class _Launches:
    """The compiled kernels of one kernel, by key."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel  # kept, so that its id names no other
        first = takewhile(lambda p: not p.is_constexpr, kernel.params)
        self.fixed = tuple(p.do_not_specialize for p in first)
        self.constants = (None,) * (len(kernel.params) - len(self.fixed))
        self.compiled: dict[Any, Any] = {}


_LAUNCHES: dict[int, _Launches] = {}


def directly() -> bool:
    """Return True if compiled kernels are launched without Triton's own code, which a profiler needs.

    In the place of Triton's chain of hooks there may be a function, or None: Triton takes both.
    """
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return _DIRECT and not (getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


repeats.can_launch(directly)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Launch `kernel[grid](*args, **constants)` on the current stream.

    Args:
        grid: one or two counts of programs.
        args: every argument before the first constexpr, in order: tensors, integers, floats, None, or a
            descriptor with an attribute `kind`, which has all that the kernel depends on, and a function
            `at`, which describes the same at another address.
        constants: every other argument, which is a constexpr or None, and Triton's options; hashable.
    """
    if not directly() or not isinstance(kernel, triton.JITFunction):
        recorder.refuse("Triton launches a kernel")
        kernel[grid](*args, **constants)
        return
    launches = _LAUNCHES.get(id(kernel))
    if launches is None:
        launches = _LAUNCHES[id(kernel)] = _Launches(kernel)
    device = torch.cuda.current_device()
    key: list[Any] = [device, *constants, *constants.values()]
    values: list[Any] = []
    for value, fixed in zip(args, launches.fixed, strict=True):
        if isinstance(value, torch.Tensor):
            dtype, value = value.dtype, value.data_ptr()
            key.append(dtype if value % 16 == 0 else (dtype, 1))
        elif type(value) is int:
            key.append(_kind(value, fixed))
        elif value is None or type(value) is float:
            key.append(type(value))
        else:
            key.append(value.kind)
        values.append(value)
    found = launches.compiled.get(tuple(key))
    if found is None:
        recorder.refuse("a kernel is compiled")
        launches.compiled[tuple(key)] = kernel[grid](*args, **constants)
        return
    y = grid[1] if len(grid) == 2 else 1
    stream = torch._C._cuda_getCurrentRawStream(device)
    # The constants are compiled in; what takes their places is only counted.
    found.run(
        grid[0], y, 1, stream, found.function, found.packed_metadata, None, None, None,
        *values, *launches.constants,
    )  # fmt: skip
    if (recording := recorder.current()) is not None:
        call, before, expand = _entry(found)
        made = [_moved(value, expand) for value in args]
        recording.launched(call, (grid[0], y), device, before, made, len(launches.constants))


_Expand = Iterator[Callable[[Any], Sequence[Any]]]


def _entry(found: Any) -> tuple[Callable[..., None], tuple[Any, ...], _Expand]:
    """Return how a compiled kernel of Triton 3.6 is launched with the least Python.

    `CudaLauncher.__call__` adds arguments that never change, and looks for scratch memory. What wraps
    its launch encodes every descriptor anew, whose code for the driver depends on its address alone.

    Returns:
        (function, what it takes between the stream and the kernel's arguments, and for each descriptor
        in order a function that returns what the function takes in its place).
    """
    launcher = found.run
    whole = launcher, (found.function, found.packed_metadata, None, None, None), repeat(_itself)
    if type(launcher).__name__ != "CudaLauncher":
        return whole
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return whole
    before = (
        found.function, launcher.launch_cooperative_grid, launcher.launch_pdl, None, None,
        found.packed_metadata, None, None, None,
    )  # fmt: skip
    if not inspect.isfunction(launcher.launch):  # no descriptors
        return launcher.launch, before, repeat(_itself)
    from triton.backends.nvidia.driver import make_tensordesc_arg

    wrapped = inspect.getclosurevars(launcher.launch).nonlocals
    expand = (
        functools.partial(lambda meta, value: make_tensordesc_arg(value, meta), meta)
        for meta in wrapped["tensordesc_meta"]
    )
    return wrapped["launcher"], before, expand


def _itself(value: Any) -> tuple[Any]:
    return (value,)


def _moved(value: Any, expand: _Expand) -> Any:
    """Return an argument as `recorder.Recorder.launched` takes it."""
    if not hasattr(value, "at"):
        return value
    one = next(expand)
    _, *rest = one(value)
    firsts = _Firsts(lambda address: one(value.at(address))[0])
    return recorder.Described(value.base.data_ptr(), firsts, rest)


class _Firsts(dict[int, Any]):
    """By address, the first of what stands for a descriptor in a launch; made where it is missing.

    Args:
        make: returns it.
    """

    def __init__(self, make: Callable[[int], Any]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, address: int) -> Any:
        if len(self) >= _MOST_ADDRESSES:
            self.clear()
        made = self[address] = self._make(address)
        return made


def _kind(value: int, fixed: bool) -> int:
    """Return what Triton specializes an integer by: its width, being 1, being a multiple of 16."""
    wide = 0 if -(2**31) <= value < 2**31 else 4
    if fixed:
        return wide
    return wide + (1 if value == 1 else 2 if value % 16 == 0 else 3)


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up; Triton's own function is slower on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the least power of two that is no less than n >= 1; Triton's own function is as slow."""
    return 1 << (n - 1).bit_length()
