"""Shared code of the benchmarks: device time in CUDA graphs, peak memory, two rates, arguments.

Importing it makes `nvfp4_moe` importable from a checkout that was never installed.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def captured(call: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `calls` calls, after one outside it that compiles what is not compiled."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph


def samples(call: Callable[[], object], calls: int, replays: int = 9) -> list[float]:
    """Return the microseconds of one call, for each replay of a CUDA graph of `calls` of them."""
    graph = captured(call, calls)
    times = []
    for i in range(replays + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 2:  # warm
            times.append(start.elapsed_time(end) * 1e3 / calls)
    return times


def microseconds(call: Callable[[], object], calls: int, replays: int = 9) -> float:
    """Median time of one call, `calls` of them in a CUDA graph."""
    return statistics.median(samples(call, calls, replays))


def peak_bytes(call: Callable[[], torch.Tensor]) -> int:
    """The most that is allocated at a time during a call, beyond what was before and the result."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - result.nbytes


def copy_rate() -> float:
    """GB/s of a device copy, bytes read and written."""
    source = torch.randn(2**27, device="cuda").bfloat16()
    target = torch.empty_like(source)
    return 4 * source.numel() / microseconds(lambda: target.copy_(source), 5) / 1e3


def cublas_rate() -> float:
    """TFLOP/s of a bf16 product of cuBLAS."""
    a = torch.randn(8192, 8192, device="cuda").bfloat16()
    return 2 * 8192**3 / microseconds(lambda: a @ a, 3) / 1e6


def arguments(description: str) -> argparse.ArgumentParser:
    """The parser of a script: the first line of its docstring, and `--json`."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write every cell to this file")
    return parser


def start(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, dict[str, object]]:
    """(options, where it runs, printed).

    Raises:
        SystemExit: there is no GPU, or the arguments are wrong.
    """
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: there is nothing to measure")
    where: dict[str, object] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    print(*where.values(), sep=", ")
    return options, where


def save(path: Path | None, results: dict[str, object]) -> None:
    """Write a script's results where `--json` says, if it does."""
    if path:
        path.write_text(json.dumps(results, indent=1), "utf-8")
