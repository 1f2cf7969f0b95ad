"""pytest-benchmark comparisons of the backends: `python -m pytest bench`, on a machine with a GPU.

The cases of `nvfp4-moe bench`, measured by pytest-benchmark: device time of calls in a CUDA graph, with
inputs on the GPU. A group holds one shape, so that its table compares what runs here. `nvfp4-moe bench`
reads what `--benchmark-json` writes, by `--load` and `--compare`.
"""

# SPDX-License-Identifier: Apache-2.0
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import DEVICE

from nvfp4_moe.bench import clock, results
from nvfp4_moe.bench.case import Case, NotHere
from nvfp4_moe.bench.operations import select

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CALLS = 10  # in one graph, so that a replay's own cost is a tenth


def device_time(benchmark: Any, call: Callable[[], object], capturable: bool) -> None:
    """Benchmark `call` by the GPU's clock; outside a graph where the call waits for the GPU."""
    replay, calls = call, 1
    if capturable:
        replay, calls = clock.captured(call, CALLS).replay, CALLS
    else:
        call()
        torch.cuda.synchronize()
    origin = torch.cuda.Event(enable_timing=True)
    origin.record()
    benchmark._timer = lambda: _seconds_since(origin) / calls
    benchmark.pedantic(replay, rounds=20, warmup_rounds=3)


def _seconds_since(origin: torch.cuda.Event) -> float:
    now = torch.cuda.Event(enable_timing=True)
    now.record()
    now.synchronize()
    return origin.elapsed_time(now) / 1e3


@functools.cache
def rates() -> clock.Rates:
    """The rates of this GPU, for the roofline."""
    return clock.rates(DEVICE)


def every(operation: str) -> pytest.MarkDecorator:
    """Make the decorator that runs a test for each case of an operation."""
    cases = select([operation], DEVICE, everything=True)
    found = [pytest.param(case, id=case.id) for case in cases]
    return pytest.mark.parametrize("case", found)


def measure(benchmark: Any, case: Case) -> None:
    benchmark.group = case.group
    try:
        prepared = case.prepare(DEVICE)
    except NotHere as refusal:
        pytest.skip(f"{case.backend}: {refusal}")
    name = clock.device_name(DEVICE)
    benchmark.extra_info |= results.measured(case, prepared, {}, rates(), name).extra_info
    device_time(benchmark, prepared.call, prepared.capturable)


@every("quantize")
def test_quantize(benchmark, case):
    measure(benchmark, case)


@every("dense")
def test_dense(benchmark, case):
    measure(benchmark, case)


@every("moe")
def test_moe(benchmark, case):
    measure(benchmark, case)


@every("convert")
def test_convert(benchmark, case):
    measure(benchmark, case)


@every("load")
def test_load(benchmark, case):
    measure(benchmark, case)
