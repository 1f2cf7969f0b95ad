"""The clocks of the benchmark, and pytest-benchmark as it takes their times."""

# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import test_speed
import torch

from nvfp4_moe.bench import clock
from nvfp4_moe.bench.clock import Rates

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_the_clock_of_a_cpu(monkeypatch):
    """A call before, then rounds until there are enough or the time is over."""
    now, made = [0.0], []
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

    def call():
        made.append(1)
        now[0] += 0.3

    assert clock.seconds(call, CPU) == pytest.approx([0.3] * 4) and len(made) == 5
    made.clear()
    quick = clock.seconds(lambda: made.append(1), CPU)
    assert len(quick) == 9 and len(made) == 10


def test_backends_of_a_cell_take_turns():
    """The rounds of a GPU, here with timers that only count; one that is slow has fewer."""
    made = []

    def timer(name, seconds):
        def timed():
            made.append(name)
            return seconds

        return timed

    timers = [timer("a", 1e-5), timer("b", 2e-5), timer("slow", 0.4)]
    times = clock.interleaved(timers, GPU)
    assert times == [[1e-5] * 20, [2e-5] * 20, [0.4] * 3]
    assert made[:9] == ["a", "b", "slow"] * 3 and made[9:] == ["a", "b"] * 17
    assert [len(mine) for mine in clock.interleaved(timers[:2], CPU)] == [9, 9]


def test_a_gpu_warms_up_until_its_clocks_have_risen(monkeypatch):
    now, made = [0.0], []
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])

    def timed(seconds):
        made.append(seconds)
        now[0] += seconds

    timers = [lambda: timed(0.01), lambda: timed(0.02)]
    clock.warm_up(timers, GPU)
    assert made == [0.01, 0.02] * 4
    made.clear()
    clock.warm_up([lambda: timed(5.0)], GPU)
    assert made == [5.0] * 2
    made.clear()
    clock.warm_up(timers, CPU)
    assert made == []


def test_a_measured_replay_follows_one_that_is_not(monkeypatch):
    """The events of a GPU, written down in their order."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            done.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 6.0

    class Graph:
        def replay(self):
            done.append("replay")

    def captured(call, calls):
        assert calls == 3
        return Graph()

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(clock, "captured", captured)
    timed = clock.timer(lambda: done.append("call"), GPU, calls=3)
    assert done == ["call"]
    assert timed() == pytest.approx(2e-3)
    assert done[1:] == ["replay", "event", "replay", "event"]
    done.clear()
    assert clock.timer(lambda: done.append("call"), GPU, False)() == pytest.approx(6e-3)
    assert done == ["call", "event", "call", "event"]
    # 6 ms are more than one graph should take.
    monkeypatch.setattr(clock, "captured", lambda call, calls: done.append(calls) or Graph())
    clock.timer(lambda: None, GPU)
    assert done[-1] == 1


def test_the_clock_of_the_multiprocessors(monkeypatch):
    """NVIDIA's library is asked for the GPU by its name; without the library there is no figure."""

    class Properties:
        uuid = "1234-5678"

    class Library:
        def nvmlInit_v2(self):
            return 0

        def nvmlDeviceGetHandleByUUID(self, uuid, handle):
            return 0 if uuid == b"GPU-1234-5678" else 6

        def nvmlDeviceGetClockInfo(self, handle, kind, mhz):
            assert kind == 1
            mhz._obj.value = 1980
            return 0

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(clock.ctypes, "CDLL", lambda name: Library())
    assert clock.sm_mhz(GPU) == 1980 and clock.sm_mhz(CPU) is None
    monkeypatch.setattr(Properties, "uuid", "other")
    assert clock.sm_mhz(GPU) is None

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(clock.ctypes, "CDLL", missing)
    assert clock.sm_mhz(GPU) is None


@pytest.mark.skipif(
    find_spec("pytest_benchmark") is None, reason="pytest-benchmark is not installed"
)
def test_pytest_benchmark_takes_the_times_of_the_clock(tmp_path):
    """A benchmark whose timer counts: each of its rounds is a thousandth longer than the one before."""
    (tmp_path / "test_one.py").write_text(
        "import itertools, test_speed\n"
        "def test_one(benchmark):\n"
        "    seconds = itertools.count(1)\n"
        "    test_speed.device_time(benchmark, lambda: next(seconds) / 1000)\n",
        "utf-8",
    )
    bench = Path(test_speed.__file__).parent
    paths = os.pathsep.join([str(bench), str(bench.parent), os.environ.get("PYTHONPATH", "")])
    # pytest-benchmark measures nothing in a worker of xdist, which it knows by a variable.
    others = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-json", "r.json"],
        capture_output=True, text=True, cwd=tmp_path, env=others | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads((tmp_path / "r.json").read_text("utf-8"))["benchmarks"]
    stats = found["stats"]
    assert stats["rounds"] == 20 and stats["min"] == pytest.approx(0.001)
    assert stats["median"] == pytest.approx(0.0105) and stats["max"] == pytest.approx(0.02)


def test_the_rates_of_a_cpu(monkeypatch):
    """The faster of two products, and a copy that counts reading and writing."""
    monkeypatch.setattr(clock, "_median", lambda call, device: float(call().element_size()))
    rates = clock.rates(CPU)
    assert rates == Rates(2 * 2**26 / 1e9, 2 * 1024**3 / 2 / 1e12, "bf16")
    assert str(rates).startswith("a copy moves 0.134 GB/s, a product of bf16 matrices reaches ")


def test_the_rates_bound_a_call():
    assert Rates(100.0, 2.0, "fp32").least_seconds(2e12, 1e9) == 1
    assert Rates(100.0, 2.0, "fp32").least_seconds(1e9, 1e11) == 1
