"""Times with the work that was done in them, in memory and in a file of pytest-benchmark's form.

`pytest bench --benchmark-json` writes the same form, names and `extra_info`, so a file of either can be
compared with one of the other, and plotted.
"""

# SPDX-License-Identifier: Apache-2.0
import datetime
import json
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import strict_json
from ..exits import CommandError
from ..machine import machine
from .case import Case, Prepared, case_id, group
from .clock import Rates
from .rival_layers import versions

FORM = "5.3.1"
"""The version of pytest-benchmark whose form a file has."""
Key = tuple[str, str, int, str]
"""The operation, the shape, the tokens and the backend of a measurement."""
_LARGEST = 1e30
"""The largest number of a file; its reciprocal is the smallest above 0. Quotients stay finite."""


@dataclass(frozen=True)
class Measurement:
    """The time of one case."""

    operation: str
    unit: str  # of `tokens`; empty if there are none
    shape: str
    tokens: int
    backend: str
    stats: Mapping[str, Any]  # pytest-benchmark's, in seconds
    flop: float
    moved: float  # bytes
    rates: Rates
    device: str  # its name
    sm_mhz: tuple[int | None, int | None] = (None, None)
    """The clock of the multiprocessors before the rounds and after them; None: not known."""

    @property
    def key(self) -> Key:
        """The identity of the case."""
        return self.operation, self.shape, self.tokens, self.backend

    @property
    def group(self) -> str:
        """The name of what other backends are compared in."""
        return group(self.operation, self.unit, self.shape, self.tokens)

    @property
    def seconds(self) -> float:
        """The median over rounds."""
        return float(self.stats["median"])

    @property
    def gb_s(self) -> float:
        """Bytes moved over time, in GB/s."""
        return self.moved / self.seconds / 1e9

    @property
    def tflops(self) -> float:
        """FLOPs over time, in TFLOP/s."""
        return self.flop / self.seconds / 1e12

    @property
    def of_roofline(self) -> float:
        """The least time at the measured rates, as a share of the time."""
        return self.rates.least_seconds(self.flop, self.moved) / self.seconds

    @property
    def extra_info(self) -> dict[str, Any]:
        """The facts beside the times, as pytest-benchmark keeps them."""
        return {
            "operation": self.operation,
            "unit": self.unit,
            "shape": self.shape,
            "tokens": self.tokens,
            "backend": self.backend,
            "flop": self.flop,
            "bytes": self.moved,
            "copy_gb_s": self.rates.copy_gb_s,
            "matmul_tflops": self.rates.matmul_tflops,
            "matmul": self.rates.matmul,
            "device": self.device,
            "sm_mhz": list(self.sm_mhz),
        }


def measured(
    case: Case,
    prepared: Prepared,
    stats: Mapping[str, Any],
    rates: Rates,
    device: str,
    sm_mhz: tuple[int | None, int | None] = (None, None),
) -> Measurement:
    """Return the measurement of a case."""
    operation = case.operation
    return Measurement(
        operation.name,
        operation.unit,
        case.shape,
        case.tokens,
        case.backend,
        stats,
        float(prepared.flop),
        float(prepared.moved),
        rates,
        device,
        sm_mhz,
    )


def statistics_of(times: Sequence[float]) -> dict[str, Any]:
    """Return the statistics that pytest-benchmark has for each benchmark.

    Args:
        times: seconds of one call, for each round.
    """
    twice = [*times, *times] if len(times) == 1 else times  # quantiles need two
    q1, median, q3 = statistics.quantiles(twice, method="inclusive")
    mean, total, iqr = statistics.fmean(times), sum(times), q3 - q1
    stddev = statistics.stdev(times) if len(times) > 1 else 0.0
    inside = [t for t in times if q1 - 1.5 * iqr <= t <= q3 + 1.5 * iqr]
    far = sum(abs(t - mean) > stddev for t in times)
    outliers = len(times) - len(inside)
    return {
        "min": min(times),
        "max": max(times),
        "mean": mean,
        "stddev": stddev,
        "rounds": len(times),
        "median": median,
        "iqr": iqr,
        "q1": q1,
        "q3": q3,
        "iqr_outliers": outliers,
        "stddev_outliers": far,
        "outliers": f"{far};{outliers}",
        "ld15iqr": min(inside),
        "hd15iqr": max(inside),
        "ops": len(times) / total,
        "total": total,
        "iterations": 1,
    }


def write(path: Path, measurements: Iterable[Measurement]) -> None:
    """Write a file as `pytest bench --benchmark-json` does."""
    here = machine()
    commit = here["commit"] or "unknown"
    document = {
        "machine_info": {"node": platform.node(), "cpu": {}, "rivals": versions(), **here},
        "commit_info": {"id": commit.split(",")[0], "dirty": "," in commit},
        "benchmarks": [_benchmark(m) for m in measurements],
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "version": FORM,
    }
    path.write_text(json.dumps(document, indent=1), "utf-8")


def _benchmark(m: Measurement) -> dict[str, Any]:
    case = case_id(m.shape, m.tokens, m.backend)
    name = f"test_{m.operation}[{case}]"
    return {
        "group": m.group,
        "name": name,
        "fullname": f"bench/test_speed.py::{name}",
        "params": None,
        "param": case,
        "extra_info": m.extra_info,
        "options": {"warmup": True},
        "stats": dict(m.stats),
    }


def read(option: str, path: str | Path) -> list[Measurement]:
    """Read the measurements of a file; benchmarks of another kind are left out.

    Args:
        option: that names the file, for the error.
        path: what `write` or `pytest bench --benchmark-json` wrote.

    Raises:
        CommandError: the file cannot be read, has another form, or has no measurement of ours.
    """
    said = f"{option} is {str(path)!r}"
    try:
        with Path(path).open("rb") as file:  # a device may have no end
            benchmarks = strict_json.parse(file.read(strict_json.MOST_BYTES + 1))["benchmarks"]
        found = [_measurement(b) for b in benchmarks if "operation" in b["extra_info"]]
    except OSError as error:
        raise CommandError(
            f"{said}; it must be a file that can be read: {error.strerror}"
        ) from None
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        told = f"{type(error).__name__}: {error}"
        raise CommandError(f"{said}; it must have the form of pytest-benchmark ({told})") from None
    if not found:
        raise CommandError(f"{said}; it must have times that `bench --save` wrote, and has none")
    return found


def _measurement(benchmark: Mapping[str, Any]) -> Measurement:
    info = benchmark["extra_info"]
    rates = Rates(float(info["copy_gb_s"]), float(info["matmul_tflops"]), str(info["matmul"]))
    found = Measurement(
        str(info["operation"]),
        str(info["unit"]),
        str(info["shape"]),
        int(info["tokens"]),
        str(info["backend"]),
        dict(benchmark["stats"]),
        float(info["flop"]),
        float(info["bytes"]),
        rates,
        str(info["device"]),
        _clocks(info.get("sm_mhz", [None, None])),
    )
    for number in (found.seconds, rates.copy_gb_s, rates.matmul_tflops, found.moved):
        if not 1 / _LARGEST <= number <= _LARGEST:
            allowed = f"from {1 / _LARGEST:g} to {_LARGEST:g}"
            raise ValueError(f"{found.group} has {number}, which must be {allowed}")
    for number in (found.flop, found.tokens):
        if not 0 <= number <= _LARGEST:
            raise ValueError(f"{found.group} has {number}, which must be from 0 to {_LARGEST:g}")
    return found


def _clocks(found: Sequence[Any]) -> tuple[int | None, int | None]:
    """Return the clocks of a file. Files of earlier versions have none."""
    before, after = (None if mhz is None else int(mhz) for mhz in found)
    return before, after


def ratios(
    measurements: Sequence[Measurement], baselines: Mapping[str, str | None]
) -> dict[Key, float]:
    """Return the time of the baseline over each other time in its group: above 1 is faster than it.

    Args:
        measurements: of any operations.
        baselines: the backend that others are compared with, by operation.
    """
    base = {m.group: m.seconds for m in measurements if m.backend == baselines.get(m.operation)}
    return {m.key: base[m.group] / m.seconds for m in measurements if m.group in base}


def changes(
    measurements: Iterable[Measurement], earlier: Iterable[Measurement]
) -> dict[Key, float]:
    """Return the earlier time of each case that both have, over its time now: above 1 is faster."""
    before = {m.key: m.seconds for m in earlier}
    return {m.key: before[m.key] / m.seconds for m in measurements if m.key in before}
