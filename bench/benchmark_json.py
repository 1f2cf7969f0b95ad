"""The results of `moe_speed.py` as pytest-benchmark writes them, under the names of `test_speed.py`.

So `pytest bench --benchmark-compare` sets a later run beside it, and `plots.py` reads either.
"""

# SPDX-License-Identifier: Apache-2.0
import datetime
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent


def group(shape: str, tokens: int) -> str:
    """Return the name of a cell, whose table compares layers."""
    return f"{shape}, {tokens} tokens"


def case(shape: str, tokens: int, layer: str) -> str:
    """Return the part of a test's name that says what it measures."""
    return f"{shape}-{tokens}-{layer}"


def benchmark(
    shape: str, tokens: int, layer: str, seconds: Sequence[float], extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Return one benchmark.

    Args:
        seconds: the time of a call, for each replay.
        extra: what else is known of it: `moe_speed.work`.
    """
    from pytest_benchmark.stats import Stats

    stats = Stats()
    for t in seconds:
        stats.update(t)
    name = f"test_moe[{case(shape, tokens, layer)}]"
    return {
        "group": group(shape, tokens),
        "name": name,
        "fullname": f"bench/test_speed.py::{name}",
        "params": None,
        "param": case(shape, tokens, layer),
        "extra_info": dict(extra),
        "options": {"timer": "the GPU's clock", "warmup": True},
        "stats": {**stats.as_dict(), "iterations": 1},
    }


def check_installed() -> None:
    """Raise SystemExit, before anything is measured, where pytest-benchmark is not installed."""
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise SystemExit("--benchmark-json needs pytest-benchmark: install nvfp4-moe[bench]")


def write(path: Path, where: Mapping[str, Any], benchmarks: Sequence[dict[str, Any]]) -> None:
    """Write a file as `pytest --benchmark-json` does.

    Args:
        where: the machine: GPU, versions.
    """
    now = datetime.datetime.now(datetime.timezone.utc).isoformat()
    document = {
        "machine_info": {"node": platform.node(), "cpu": {}, **where},
        "commit_info": {"id": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "-s"))},
        "benchmarks": list(benchmarks),
        "datetime": now,
        "version": importlib.metadata.version("pytest-benchmark"),
    }
    path.write_text(json.dumps(document, indent=1), "utf-8")


def _git(*arguments: str) -> str:
    try:
        found = subprocess.run(
            ["git", *arguments], cwd=_ROOT, capture_output=True, encoding="utf-8", check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
