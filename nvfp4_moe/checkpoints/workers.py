"""Threads that share work: one for each core of the CPU, or some for each GPU.

A thread of the CPU runs each operation of torch alone. Many threads in one operation wait for each other
at its end, which takes longest where other processes want the cores too.
"""

# SPDX-License-Identifier: Apache-2.0
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

_OF_A_GPU = 4
"""Threads of a GPU: one may read, one send, one wait for the GPU, and one take the result."""


def places_of(device: torch.device) -> list[torch.device]:
    """Return the device of each thread.

    Args:
        device: the CPU stands for as many threads as torch uses, a GPU without a number for every GPU.
    """
    if device.type == "cpu":
        return [device] * torch.get_num_threads()
    if device.type != "cuda" or device.index is not None:
        return [device] * _OF_A_GPU
    gpus = [torch.device(device.type, number) for number in range(torch.cuda.device_count())]
    return gpus * _OF_A_GPU


class Workers:
    """Threads, each with a device. They end with the context."""

    def __init__(self, places: Sequence[torch.device]):
        self._places: SimpleQueue[torch.device] = SimpleQueue()
        for place in places:
            self._places.put(place)
        self._own = threading.local()
        # A mode is a thread's own, and only in the caller's may its tensors be written.
        self._inference = torch.is_inference_mode_enabled()
        self._pool = ThreadPoolExecutor(len(places), initializer=self._start)
        self._threads = torch.get_num_threads()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)  # threads that start later have the number set last

    def map(self, function: Callable[[torch.device, T], R], items: Iterable[T]) -> Iterator[R]:
        """Call the function with a thread's device and each item; results come in the items' order."""

        def call(item: T) -> R:
            with torch.inference_mode(self._inference):
                return function(self._own.device, item)

        return self._pool.map(call, items)

    def _start(self) -> None:
        device = self._own.device = self._places.get()
        torch.set_num_threads(1)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.cuda.set_stream(torch.cuda.Stream(device))
