"""The comparison of two source trees by turns: the parent beside processes that measure nothing.

The process of a tree runs its kernels in the interpreter, on a GPU that is pretended.
"""

# SPDX-License-Identifier: Apache-2.0
import contextlib
import json
import os
import subprocess
import sys

import by_turns
import pytest
import torch
import turns_worker
from paths import ROOT

from nvfp4_moe import ActivationType, nvfp4_quantize
from nvfp4_moe.bench import dense, moe

CELLS = [["moe", "Qwen3", 1], ["moe", "Qwen3", 8], ["dense", "before", 1], ["dense", "after", 1]]
"""The third is of the first tree alone, and the fourth of the second."""
ANSWERS = """
import json, os, sys
tree = sys.argv[1].rsplit("/", 1)[1]
cells, after, bits, dies, log = json.loads(sys.argv[2])
for line in sys.stdin:
    order, *arguments = json.loads(line)
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"{tree} {order} {os.getpid()}\\n")
    if order == "describe":
        del cells[3 if tree == "old" else 2]
        done = {"package": tree, "gpu": "a GPU", "torch": "2", "triton": "3", "cells": cells}
    elif order == "time":
        done = [after if tree == "new" else 2.0] * arguments[0]
    else:
        done = bits if tree == "new" else "bits"
    if order == dies:
        print("its last words", file=sys.stderr)
        sys.exit(7)
    print(json.dumps({"error": "no room"} if arguments == dies else {"done": done}), flush=True)
"""


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run the program beside answering processes, and return its status and its file of cells."""

    def run(*arguments, after=3.0, bits="bits", dies=None):
        def command(tree):
            given = json.dumps([CELLS, after, bits, dies, str(tmp_path / "log")])
            return [sys.executable, "-c", ANSWERS, str(tree), given]

        monkeypatch.setattr(by_turns, "command", command)
        trees = ["--before", str(tmp_path / "old"), "--after", str(tmp_path / "new")]
        file = tmp_path / "cells.json"
        words = ["by_turns.py", *trees, "--json", str(file), "--jobs", "0", *arguments]
        monkeypatch.setattr("sys.argv", words)
        try:
            return by_turns.main(), json.loads(file.read_text("utf-8"))
        except SystemExit as end:
            return end.code, json.loads(file.read_text("utf-8")) if file.exists() else None

    return run


def orders(tmp_path, name):
    lines = (tmp_path / "log").read_text("utf-8").splitlines()
    return [line.split()[0] for line in lines if line.split()[1] == name]


def test_trees_take_turns(run, tmp_path, capsys):
    """Every other round begins with the other tree, and only cells of both trees are measured."""
    status, results = run("--turns", "3")
    rounds = ["old", "new", "new", "old"] * 2 + ["old", "new"]  # two that warm up, and three
    assert orders(tmp_path, "time") == rounds * 2
    assert status == 0 and [c["cell"] for c in results["cells"]] == CELLS[:2]
    assert results["cells"][0] | {"cell": None} == {
        "cell": None, "before_us": 2.0, "after_us": 3.0, "ratio": 1.5, "quartiles": [1.5, 1.5],
        "turns_us": [[2.0] * 3, [3.0] * 3], "equal_bits": True,
    }  # fmt: skip
    assert (results["before"], results["after"]) == ("old", "new")
    printed = capsys.readouterr().out
    assert "moe: Qwen3, 1 " in printed and "1.500  1.500 to 1.500  equal" in printed


def test_ratios_are_of_the_same_round():
    """A clock that slows down during the rounds changes no ratio."""
    before = [10.0, 20.0, 30.0, 40.0, 50.0]
    after = [a * r for a, r in zip(before, (1.0, 0.75, 1.5, 1.25, 2.0), strict=True)]
    found = by_turns.summary(before, after)
    assert found["ratio"] == 1.25 and found["quartiles"] == [1.0, 1.5]
    assert (found["before_us"], found["after_us"]) == (30.0, 45.0)


def test_other_bits(run, capsys):
    status, results = run("--turns", "2", bits="others")
    assert status == 1 and not any(c["equal_bits"] for c in results["cells"])
    assert capsys.readouterr().out.count("DIFFER") == 2


def test_a_cell_that_fails(run, capsys):
    """It is named with the tree, and the other one is measured."""
    status, results = run("--turns", "2", dies=CELLS[0])
    assert status == 1 and results["cells"][0]["error"] == "before: no room; after: no room"
    assert results["cells"][1]["equal_bits"]
    assert "FAILED: before: no room" in capsys.readouterr().out


@pytest.mark.parametrize("order", ["describe", "prepare", "time", "finish"])
def test_a_process_that_dies(run, order):
    status, results = run("--turns", "2", dies=order)
    assert status == "the process of before ended with exit status 7:\nits last words"
    assert results is None or results["cells"] == []


def test_no_time_is_left(run, capsys):
    status, results = run("--seconds", "0")
    assert status == 3 and results["not_reached"] == ["moe: Qwen3, 1", "moe: Qwen3, 8"]
    assert "not reached in 0 s: moe: Qwen3, 1; moe: Qwen3, 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments,cells",
    [
        (("--shape", "qwen3"), CELLS[:2]),
        (("--tokens", "8", "--tokens", "9", "--only", "moe"), CELLS[1:2]),
        (("--only", "dense"), None),
        (("--shape", "gpt"), None),
        (("--turns", "1"), None),
    ],
)
def test_a_part(run, arguments, cells):
    status, results = run("--turns", "2", *arguments)
    assert status == (0 if cells else 2)
    assert cells is None or [c["cell"] for c in results["cells"]] == cells


@pytest.mark.parametrize("jobs,processes", [("0", 0), ("1", 0), ("2", 2), ("3", 2), ("9", 4)])
def test_kernels_are_compiled_in_other_processes(run, tmp_path, jobs, processes):
    """Each tree's have all of its cells, before any is measured."""
    assert run("--turns", "2", "--jobs", jobs)[0] == 0
    lines = [line.split() for line in (tmp_path / "log").read_text("utf-8").splitlines()]
    begin = [order for _, order, _ in lines].index("time") - 2  # both prepare the first cell before
    compiled = [(tree, process) for tree, order, process in lines[:begin] if order == "prepare"]
    assert len(set(compiled)) == processes
    assert sorted(tree for tree, _ in compiled) == (["new"] * 2 + ["old"] * 2) * bool(processes)


def test_without_a_gpu():
    """The processes start, find their own trees, and see none."""
    words = [sys.executable, ROOT / "bench/by_turns.py", "--before", ROOT]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    end = subprocess.run(words, env=hidden, capture_output=True, text=True, timeout=300)
    assert (end.returncode, end.stdout) == (3, "")
    assert end.stderr == "no CUDA device: there is nothing to measure\n"


def test_modules_of_another_tree(tmp_path):
    turns_worker.check_modules(ROOT)
    with pytest.raises(SystemExit, match=r"^nvfp4_moe\S* comes from .*, not from "):
        turns_worker.check_modules(tmp_path)


class Event:
    """An event whose time is that of a clock, which a replay puts forward."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.now

    def elapsed_time(self, end):
        return end.at - self.at


class Graph:
    """A graph whose replay takes two milliseconds."""

    def replay(self):
        Event.now += 2.0


@pytest.mark.interpreter
def test_a_cell_of_each_operation(monkeypatch):
    monkeypatch.setattr(turns_worker, "DEVICE", torch.device("cpu"))
    small = moe.Shape("small", 64, 32, 4, 2, ActivationType.Swiglu)
    monkeypatch.setattr(moe, "SHAPES", (small,))
    monkeypatch.setattr(dense, "SHAPES", {"small": (64, 64)})
    for name, stub in (
        ("synchronize", lambda: None),
        ("empty_cache", lambda: None),
        ("graph", lambda graph: contextlib.nullcontext()),
        ("CUDAGraph", Graph),
        ("Event", Event),
    ):
        monkeypatch.setattr(torch.cuda, name, stub)
    servers = [turns_worker.Server(ROOT) for _ in range(2)]
    known = turns_worker.cells()
    name = "K=4096 128x4 cute-dsl exact"
    sums = {}
    for cell in (("moe", "small", 1), ("dense", "small", 1), ("quantize", name, 1)):
        assert cell in known
        for server in servers:
            server.prepare(*cell)
        assert servers[0].time(3) == [200.0] * 3  # 2 ms, of 10 calls
        first, second = (server.finish() for server in servers)
        assert first == second and first not in sums.values() and servers[0].finish() is None
        sums[cell[0]] = first
    torch.manual_seed(0)
    x = torch.randn(1, 4096, dtype=torch.float32).bfloat16()
    layout = turns_worker.QUANTIZERS[name][1]
    want = nvfp4_quantize(
        x, 1 / 2688, layout, per_token_activation=True, build="cute-dsl", fast_math=False
    )
    assert sums["quantize"] == turns_worker.checksum(want)
