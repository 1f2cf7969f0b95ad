"""Threads or processes that share work: one process for each core of the CPU, some threads for each GPU.

Where the system cannot fork, the CPU has threads too. A worker of the CPU runs each operation of torch
alone. Many threads in one operation wait for each other at its end, which takes longest where other
processes want the cores too.
"""

# SPDX-License-Identifier: Apache-2.0
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Generic, Protocol, TypeVar

import torch

from . import processes

T = TypeVar("T")
R = TypeVar("R")

_OF_A_GPU = 4
"""Threads of a GPU: one may read, one send, one wait for the GPU, and one take the result."""


class Workers(Protocol[T, R]):
    """Threads or processes, which end with the context."""

    def __enter__(self) -> "Workers[T, R]": ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def map(self, items: Iterable[T]) -> Iterator[R]:
        """Call the function with each item; results come in the items' order."""


def places_of(device: torch.device) -> list[torch.device]:
    """Return the device of each worker.

    Args:
        device: the CPU stands for as many workers as torch uses threads, a GPU without a number for
            every GPU.
    """
    if device.type == "cpu":
        return [device] * torch.get_num_threads()
    if device.type != "cuda" or device.index is not None:
        return [device] * _OF_A_GPU
    gpus = [torch.device(device.type, number) for number in range(torch.cuda.device_count())]
    return gpus * _OF_A_GPU


def are_processes(places: Sequence[torch.device]) -> bool:
    """Return True if workers with these devices are processes."""
    return processes.POSSIBLE and all(place.type == "cpu" for place in places)


def start_workers(
    places: Sequence[torch.device], function: Callable[[torch.device, T], R]
) -> "Workers[T, R]":
    """Start a worker for each device, which calls the function with it and an item."""
    if are_processes(places):
        return processes.Processes(len(places), partial(function, places[0]))
    return Threads(places, function)


class Threads(Generic[T, R]):
    """Threads, each with a device. They end with the context."""

    def __init__(self, places: Sequence[torch.device], function: Callable[[torch.device, T], R]):
        self._function = function
        self._places: SimpleQueue[torch.device] = SimpleQueue()
        for place in places:
            self._places.put(place)
        self._own = threading.local()
        # A mode is a thread's own, and only in the caller's may its tensors be written.
        self._inference = torch.is_inference_mode_enabled()
        self._pool = ThreadPoolExecutor(len(places), initializer=self._start)
        self._threads = torch.get_num_threads()

    def __enter__(self) -> "Threads[T, R]":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)  # threads that start later have the number set last

    def map(self, items: Iterable[T]) -> Iterator[R]:
        """Call the function with a thread's device and each item; results come in the items' order."""
        return self._pool.map(self._call, items)

    def _call(self, item: T) -> R:
        with torch.inference_mode(self._inference):
            return self._function(self._own.device, item)

    def _start(self) -> None:
        device = self._own.device = self._places.get()
        torch.set_num_threads(1)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.cuda.set_stream(torch.cuda.Stream(device))
