"""Clocks: the time of a call on a GPU or on the CPU, peak memory, and the two rates of a roofline.

On a GPU a time is the GPU's own, of calls in a CUDA graph, so that launches cost what they cost in
serving. On the CPU it is the time from the call to its return.
"""

# SPDX-License-Identifier: Apache-2.0
import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

_WARM = 2
"""Replays of a graph, or calls, before those that count."""
_ROUNDS = 9
_GPU_ROUNDS = 20
_SECONDS = 1.0
"""The time of a call's rounds together after which it has no further one."""
_GRAPH_SECONDS = 2e-3
_MOST_CALLS = 20
_WARM_SECONDS = 0.1
_NVML_CLOCK_SM = 1


@dataclass(frozen=True)
class Rates:
    """The rates of a machine, which bound every call: its roofline."""

    copy_gb_s: float  # GB/s of a copy in memory, bytes read and written
    matmul_tflops: float  # TFLOP/s of torch's product of two matrices
    matmul: str  # their dtype

    def least_seconds(self, flop: float, moved: float) -> float:
        """Return the least time of a call of so many FLOPs, which moves so many bytes."""
        return max(flop / self.matmul_tflops / 1e12, moved / self.copy_gb_s / 1e9)

    def __str__(self) -> str:
        return (
            f"a copy moves {shown(self.copy_gb_s)} GB/s, "
            f"a product of {self.matmul} matrices reaches {shown(self.matmul_tflops)} TFLOP/s"
        )


def shown(number: float) -> str:
    """Return a figure with three digits; a large one with all of its integer part."""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def captured(call: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of `calls` calls, after one outside it, which compiles."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph


def samples(call: Callable[[], object], calls: int, replays: int = _ROUNDS) -> list[float]:
    """Return the microseconds of one call, for each replay of a CUDA graph of `calls` of them."""
    graph = captured(call, calls)
    times = [_elapsed(graph.replay) * 1e6 / calls for _ in range(_WARM + replays)]
    return times[_WARM:]


def microseconds(call: Callable[[], object], calls: int, replays: int = _ROUNDS) -> float:
    """Return the median time of one call, `calls` of them in a CUDA graph."""
    return statistics.median(samples(call, calls, replays))


def seconds(
    call: Callable[[], object], device: torch.device, capturable: bool = True
) -> list[float]:
    """Return the seconds of a call, for each of several rounds; `timer` has the arguments."""
    timers = [timer(call, device, capturable)]
    warm_up(timers, device)
    return interleaved(timers, device)[0]


def timer(
    call: Callable[[], object],
    device: torch.device,
    capturable: bool = True,
    calls: int | None = None,
) -> Callable[[], float]:
    """Make a call once or more, and return what measures it again: the seconds of one call.

    On a GPU each measured replay of the graph follows one that is not measured. So the host has launched
    it before its turn, and caches are as a call that repeats leaves them.

    Args:
        call: what is measured.
        device: the clock is the GPU's if it is one, otherwise the CPU's.
        capturable: a CUDA graph can hold the call; otherwise it is made outside of one.
        calls: in one graph; None: as many as take 2 ms, at most 20.
    """
    call()
    if device.type != "cuda":
        return lambda: _elapsed_on_cpu(call)
    if not capturable:
        return lambda: _elapsed(call)
    if calls is None:
        calls = max(1, min(_MOST_CALLS, int(_GRAPH_SECONDS / _elapsed(call))))
    replay = captured(call, calls).replay

    def measured() -> float:
        replay()
        return _elapsed(replay) / calls

    return measured


def warm_up(timers: Sequence[Callable[[], float]], device: torch.device) -> None:
    """Run timers of a GPU by turns, twice at least and until its clocks have risen from rest."""
    if device.type != "cuda":
        return
    begin, rounds = time.monotonic(), 0
    while rounds < _WARM or time.monotonic() - begin < _WARM_SECONDS:
        for timed in timers:
            timed()
        rounds += 1


def interleaved(timers: Sequence[Callable[[], float]], device: torch.device) -> list[list[float]]:
    """Return the seconds of each timer's rounds; the timers take turns.

    A clock that slows down during the rounds slows all of them. There are 20 rounds on a GPU and 9 on
    the CPU, and fewer where a timer's own take more than a second together.
    """
    times: list[list[float]] = [[] for _ in timers]
    for _ in range(_GPU_ROUNDS if device.type == "cuda" else _ROUNDS):
        for timed, mine in zip(timers, times, strict=True):
            if sum(mine) < _SECONDS:
                mine.append(timed())
    return times


def sm_mhz(device: torch.device) -> int | None:
    """Return the clock of a GPU's multiprocessors in MHz now, as nvidia-smi shows it.

    Returns:
        None on the CPU, and where NVIDIA's library cannot tell.
    """
    if device.type != "cuda":
        return None
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    handle, mhz = ctypes.c_void_p(), ctypes.c_uint()
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        failed = (
            library.nvmlInit_v2()
            or library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle))
            or library.nvmlDeviceGetClockInfo(handle, _NVML_CLOCK_SM, ctypes.byref(mhz))
        )
    except (OSError, AttributeError):
        return None
    return None if failed else mhz.value


def _elapsed(call: Callable[[], object]) -> float:
    """Return the GPU's seconds from the begin of a call to the end of its work."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _elapsed_on_cpu(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def peak_bytes(call: Callable[[], torch.Tensor]) -> int:
    """Return the most that a call allocates at a time, beyond what was before and its result."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - result.nbytes


def rates(device: torch.device) -> Rates:
    """Measure both rates. The product is of bf16; on the CPU of fp32, if that is faster there."""
    products = {"bf16": matmul_rate(device)}
    if device.type == "cpu":
        products["fp32"] = matmul_rate(device, torch.float32)
    fastest = max(products, key=products.__getitem__)
    return Rates(copy_rate(device), products[fastest], fastest)


def copy_rate(device: torch.device) -> float:
    """Return the GB/s of a copy, bytes read and written."""
    bytes_of_one = 2**28 if device.type == "cuda" else 2**26
    source = torch.ones(bytes_of_one, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * bytes_of_one / _median(lambda: target.copy_(source), device) / 1e9


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """Return the TFLOP/s of torch's product of two square matrices."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, dtype=torch.float32, device=device).to(dtype)
    return 2 * size**3 / _median(lambda: a @ a, device) / 1e12


def _median(call: Callable[[], object], device: torch.device) -> float:
    return statistics.median(seconds(call, device))


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the processor with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'' if threads == 1 else 's'}"


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
