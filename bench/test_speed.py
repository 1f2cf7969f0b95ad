"""pytest-benchmark comparisons of the backends: `python -m pytest bench`, on a machine with a GPU.

The cases of `nvfp4-moe bench`, measured by the same clock (`nvfp4_moe/bench/clock.py`): device time of
calls in a CUDA graph, with inputs on the GPU. A group holds one shape and one number of tokens, so that
its table compares what runs here. pytest takes one case after another, so the backends of a group do not
take turns here, as they do in the command. `nvfp4-moe bench` reads what `--benchmark-json` writes, by
`--load` and `--compare`.
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


def device_time(benchmark: Any, timed: Callable[[], float]) -> None:
    """Benchmark what `clock.timer` returned: pytest-benchmark reads the sum of its seconds."""
    total = 0.0

    def one_round() -> None:
        nonlocal total
        total += timed()

    benchmark._timer = lambda: total
    benchmark.pedantic(one_round, rounds=20)


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
    timed = clock.timer(prepared.call, DEVICE, prepared.capturable, case.operation.calls)
    clock.warm_up([timed], DEVICE)
    before = clock.sm_mhz(DEVICE)
    device_time(benchmark, timed)
    clocks = before, clock.sm_mhz(DEVICE)
    name = clock.device_name(DEVICE)
    benchmark.extra_info |= results.measured(case, prepared, {}, rates(), name, clocks).extra_info


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
