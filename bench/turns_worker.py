"""The process that `by_turns.py` starts for each source tree: `python bench/turns_worker.py TREE`.

`PYTHONPATH` names the tree, and this process ends if a module of the package comes from elsewhere. An
order is a line of JSON on stdin, a name and its arguments, and its answer is a line on stdout. It must
run with trees of other commits, so it uses little of them: the public functions, and the shapes and
inputs of `nvfp4_moe/bench/`.
"""

# SPDX-License-Identifier: Apache-2.0
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton

import nvfp4_moe
from nvfp4_moe.bench import dense, moe
from nvfp4_moe.bench.case import Case

DEVICE = torch.device("cuda")
COLUMNS, ROWS = (4096, 7168), (1, 32, 128, 1024, 8192)
QUANTIZERS: dict[str, tuple[int, nvfp4_moe.SfLayout, str, str]] = {
    f"K={k} {layout.name.removeprefix('layout_')} {build} {math}": (k, layout, build, math)
    for k in COLUMNS
    for layout in (nvfp4_moe.SfLayout.layout_linear, nvfp4_moe.SfLayout.layout_128x4)
    for build in ("cuda", "cute-dsl")
    for math in ("fast", "exact")
}
"""The quantizer's shapes by name: columns, layout of block scales, build and math."""
WARM = 3
"""Replays of a turn before those that count: the other process had the GPU and its caches."""
Call = Callable[[], Any]


def check_modules(tree: Path) -> None:
    """End the process if a module of the package comes from outside a tree."""
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None) if name.split(".")[0] == "nvfp4_moe" else None
        if file and not Path(file).resolve().is_relative_to(tree.resolve()):
            raise SystemExit(f"{name} comes from {file}, not from {tree}")


def cells() -> list[tuple[str, str, int]]:
    """Return the operation, the shape and the number of tokens or rows of every cell."""
    return [
        *(("moe", s.name, tokens) for s in moe.SHAPES for tokens in moe.TOKENS),
        *(("quantize", shape, rows) for shape in QUANTIZERS for rows in ROWS),
        *(("dense", shape, rows) for shape in dense.SHAPES for rows in dense.DENSE.every.tokens),
    ]


@lru_cache(maxsize=1)
def experts_of(s: moe.Shape, device: torch.device) -> nvfp4_moe.Experts:
    """Return the experts of the latest shape, which its cells share."""
    return moe.random_experts(s, device)


def call_of(operation: str, shape: str, tokens: int, device: torch.device) -> Call:
    """Make the call of a cell, whose inputs depend on the cell alone."""
    torch.manual_seed(0)
    if operation == "dense":
        return Case(dense.DENSE, shape, tokens, "triton").prepare(device).call
    if operation == "moe":
        s = next(s for s in moe.SHAPES if s.name == shape)
        experts, (x, logits) = experts_of(s, device), moe.inputs(s, tokens, device)
        return lambda: nvfp4_moe.fused_moe(
            x, experts, (logits, s.routing), backend="triton", fast_math=True
        )
    columns, layout, build, math = QUANTIZERS[shape]
    options: dict[str, Any] = {"build": build, "fast_math": math == "fast", "backend": "triton"}
    x = torch.randn(tokens, columns, dtype=torch.float32, device=device).bfloat16()
    return lambda: nvfp4_moe.nvfp4_quantize(
        x, 1 / (448 * 6), layout, per_token_activation=True, **options
    )


def checksum(output: Any) -> str:
    """Return a hash of the bytes of a tensor, or of several in their order."""
    digest = hashlib.sha256()
    for t in output if isinstance(output, tuple) else (output,):
        digest.update(t.contiguous().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


class Server:
    """Holds one cell; each method is an order."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        self.call: Call | None = None  # holds the inputs, which the graph reads
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: Any = None
        self.calls = 1

    def describe(self) -> dict[str, Any]:
        """Say which package, which GPU and which cells there are."""
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        return {"package": nvfp4_moe.__file__, "gpu": gpu, "cells": cells(), **versions}

    def prepare(self, operation: str, shape: str, tokens: int) -> None:
        """Capture calls of a cell in a CUDA graph, after one outside it, which compiles."""
        self.finish()
        call, graph = call_of(operation, shape, tokens, DEVICE), torch.cuda.CUDAGraph()
        self.calls = 10 if tokens < 1024 else 2
        # Not by `clock.captured`, which is the tree's own: both trees are measured in one way.
        call()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(self.calls):
                self.output = call()
        graph.replay()
        torch.cuda.synchronize()
        self.call, self.graph = call, graph
        check_modules(self.tree)

    def time(self, replays: int) -> list[float]:
        """Return the microseconds of a call in each replay; all replays follow one another at once."""
        assert self.graph is not None
        events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
        for _ in range(WARM):
            self.graph.replay()
        events[0].record()
        for event in events[1:]:
            self.graph.replay()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) * 1e3 / self.calls for a, b in itertools.pairwise(events)]

    def finish(self) -> str | None:
        """Return the checksum of the last replay's last output, and free the cell."""
        found = None if self.graph is None else checksum(self.output)
        self.call = self.graph = self.output = None
        torch.cuda.empty_cache()
        return found


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    server = Server(Path(sys.argv[1]))
    check_modules(server.tree)
    for line in sys.stdin:
        order, *arguments = json.loads(line)
        try:
            answer = {"done": getattr(server, order)(*arguments)}
        except Exception as error:  # of this cell; others may run
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
