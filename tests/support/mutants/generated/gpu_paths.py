"""Calls of kernels that take the paths of a GPU in the interpreter, by `assembly.of_a_gpu`."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..calls import Answered, Call
from . import assembly


@dataclass(frozen=True)
class OfAGpuCall:
    """A call whose kernels take the paths of a GPU."""

    call: Call
    arch: int

    def answer(self, device: str = "cpu") -> Any:
        with assembly.of_a_gpu(self.arch):
            return self.call.answer(device)

    def judge(self) -> Answered:
        return self.call.judge()


def of(
    probes: Iterable[tuple[str, Callable[[], Call]]], arch: int = 90
) -> Iterator[tuple[str, Callable[[], Call]]]:
    """Name these calls, as they are on a GPU."""
    for name, call in probes:
        yield f"interpreted, {name}, of sm_{arch}", lambda call=call: OfAGpuCall(call(), arch)
