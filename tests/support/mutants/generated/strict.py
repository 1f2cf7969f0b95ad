"""Triton's interpreter, made to fail where a GPU may answer anything, and to multiply codes itself."""

# SPDX-License-Identifier: Apache-2.0
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from nvfp4_moe.kernels.dense import launch as dense_launch
from nvfp4_moe.kernels.moe import launch
from nvfp4_moe.reference.quantize import dequantize


class OutOfBoundsError(Exception):
    """A kernel read or wrote an address that belongs to no tensor that it was given."""


class _Memory:
    """The address ranges of the tensors that the kernel running now was given."""

    def __init__(self) -> None:
        self.starts = self.ends = np.zeros(0, np.uint64)

    def give(self, arguments: list[Any]) -> None:
        ranges: list[tuple[int, int]] = []
        for t in sorted(
            (a for a in arguments if isinstance(a, torch.Tensor) and a.numel()),
            key=torch.Tensor.data_ptr,
        ):
            last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
            start, end = t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()
            if ranges and start <= ranges[-1][1]:
                start, end = ranges[-1][0], max(end, ranges.pop()[1])
            ranges.append((start, end))
        self.starts, self.ends = np.array(ranges or [(0, 0)], np.uint64).T.copy()

    def check(self, pointers: Any, mask: Any) -> None:
        given = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        addresses = pointers.data[given].astype(np.uint64)
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        place = np.searchsorted(self.starts, addresses, "right") - 1
        if (place < 0).any() or (addresses + size > self.ends[place]).any():
            raise OutOfBoundsError


@contextmanager
def strict(last: int | None = None) -> Iterator[None]:
    """Check addresses and the values of histograms of kernels in the interpreter.

    Args:
        last: how many programs run along each axis of a grid, those of the highest numbers; None: all.
    """
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    memory, skipped = _Memory(), [0, 0, 0]
    arguments_of, histogram = executor._init_args_hst, builder.create_histogram
    program_id, num_programs = builder.create_get_program_id, builder.create_get_num_programs

    def given(self: Any, args: Any, kwargs: Any) -> Any:
        found = arguments_of(self, args, kwargs)
        memory.give([*found[0], *found[1].values()])
        grid = [n if last is None else min(n, last) for n in self.grid]
        skipped[: len(grid)] = [n - few for n, few in zip(self.grid, grid, strict=True)]
        self.grid = tuple(grid)
        return found

    def checked(name: str, pointers: int, mask: int) -> Callable[..., Any]:
        unchecked = getattr(builder, name)

        @functools.wraps(unchecked)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            memory.check(args[pointers], args[mask])
            return unchecked(self, *args, **kwargs)

        return call

    def counted(self: Any, data: Any, bins: int, mask: Any) -> Any:
        where = True if mask is None else mask.data.astype(bool)
        if (where & ((data.data < 0) | (data.data >= bins))).any():
            raise OutOfBoundsError
        return histogram(self, data, bins, mask)

    def later(found: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, axis: int) -> Any:
            handle = found(self, axis)
            handle.data = handle.data + np.int32(skipped[axis])
            return handle

        return call

    changes = {
        "create_masked_load": checked("create_masked_load", 0, 1),
        "create_masked_store": checked("create_masked_store", 0, 2),
        "create_atomic_rmw": checked("create_atomic_rmw", 1, 3),
        "create_histogram": counted,
        "create_get_program_id": later(program_id),
        "create_get_num_programs": later(num_programs),
    }
    with ExitStack() as stack:
        for name, new in changes.items():
            stack.enter_context(mock.patch.object(builder, name, new))
        stack.enter_context(mock.patch.object(executor, "_init_args_hst", given))
        # Its tensors are the caller's, and copied onto themselves they would take their memory.
        stack.enter_context(mock.patch.object(executor, "_restore_args_dev", lambda *_: None))
        yield


@contextmanager
def codes_multiplied() -> Iterator[None]:
    """Kernels in the interpreter take the path of GPUs that multiply codes themselves."""
    with (
        mock.patch.object(tl, "dot_scaled", dot_scaled),
        mock.patch.object(launch, "native_mma", lambda arch: True),
        mock.patch.object(dense_launch, "native_mma", lambda arch: True),
    ):
        yield


def dot_scaled(
    a: Any, a_scale: Any, a_format: str, b: Any, b_scale: Any, b_format: str, acc: Any
) -> Any:
    """`tl.dot_scaled`, which the interpreter lacks: [M, K/2] codes times [K/2, N], plus `acc`."""
    assert (a_format, b_format) == ("e2m1", "e2m1")

    def values(codes: Any, scale: Any) -> torch.Tensor:
        codes, scale = (torch.from_numpy(t.handle.data.copy()) for t in (codes, scale))
        return dequantize(codes.contiguous(), scale.contiguous().view(torch.uint8), 1.0).double()

    product = values(a, a_scale) @ values(tl.trans(b), b_scale).T
    total = (torch.from_numpy(acc.handle.data).double() + product).float()
    return tl.tensor(type(acc.handle)(total.numpy(), acc.handle.dtype), acc.type)
