"""Clock and power of an NVIDIA GPU under the mixture of experts: `python bench/power.py [--json FILE]`.

Many tokens keep a GPU at its power limit, and it lowers its clock. What a product draws depends on its
operands' bits: so W4A4, W4A16, and both on hidden states of few bits are run for two seconds each, whole
calls in a CUDA graph. Clock and power are medians of what nvidia-smi reads ten times a second.
"""

# SPDX-License-Identifier: Apache-2.0
import statistics
import subprocess
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import DEVICE, arguments, count, save, start

from nvfp4_moe import fused_moe
from nvfp4_moe.bench.clock import captured, microseconds
from nvfp4_moe.bench.moe import SHAPES, inputs, random_experts
from nvfp4_moe.kernels.moe.call import Mode

LAYER = "DeepSeek-V3 rank"
SECONDS = 2.0
MODES: tuple[Mode, ...] = ("per-token", "bf16")


def powers_of_two(x: torch.Tensor) -> torch.Tensor:
    """Round x to powers of two, at least 2^-6 in size."""
    return x.sign() * x.float().abs().clamp(min=2**-6).log2().round().exp2().to(x.dtype)


def medians(printed: str) -> dict[str, float]:
    """Return the medians of clock and power, and of how many readings they are.

    Args:
        printed: what nvidia-smi printed, a line "MHz, W" a reading. The first three are left out: its
            figure of power is a mean over time before them.

    Raises:
        SystemExit: there are fewer than four readings, or one that is no number.
    """
    lines = printed[: printed.rfind("\n") + 1].splitlines()  # the last one may have been cut off
    try:
        readings = [tuple(map(float, line.split(","))) for line in lines]
        clocks, watts = zip(*readings[3:], strict=True)
    except ValueError:
        raise SystemExit(
            f"nvidia-smi gave no four readings of clock and power, but {printed[-80:]!r}"
        ) from None
    return {
        "sm_mhz": statistics.median(clocks),
        "watts": statistics.median(watts),
        "readings": len(clocks),
    }


def measure(call: Callable[[], torch.Tensor]) -> dict[str, Any]:
    """Return microseconds of a call, the SM clock in MHz and the power in W."""
    replays = int(SECONDS * 1e6 / microseconds(call, 1, 5)) + 1
    graph = captured(call, 1)
    wanted = "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"
    gpu = f"--id=GPU-{torch.cuda.get_device_properties(DEVICE).uuid}"
    read = ["nvidia-smi", gpu, *wanted, "--loop-ms=100"]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with subprocess.Popen(read, stdout=subprocess.PIPE, encoding="utf-8") as reader:
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        reader.terminate()
        printed = reader.communicate()[0]
    return {"us": begin.elapsed_time(end) * 1e3 / replays} | medians(printed)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=count, default=16384, help="default: 16384")
    options, where = start(parser)
    s = next(s for s in SHAPES if s.name == LAYER)
    experts = random_experts(s, DEVICE)
    x, logits = inputs(s, options.tokens, DEVICE)
    routing = logits, s.routing
    states = {"random": x, "powers of two": powers_of_two(x), "zeros": torch.zeros_like(x)}
    print(f"{s.name}, T = {options.tokens}")
    print(f"{'activations':<13}{'hidden states':<16}{'us':>9}{'MHz':>7}{'W':>6}")
    cells = []
    for mode in MODES:
        for name, rows in states.items():
            call = partial(fused_moe, rows, experts, routing, activation=mode, backend="triton")
            cell = measure(call)
            print(
                f"{mode:<13}{name:<16}{cell['us']:>9.0f}{cell['sm_mhz']:>7.0f}{cell['watts']:>6.0f}"
            )
            cells.append({"activation": mode, "hidden_states": name} | cell)
    save(options.json, where | {"layer": s.name, "tokens": options.tokens, "cells": cells})


if __name__ == "__main__":
    main()
