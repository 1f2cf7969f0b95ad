"""Host time of calls on this GPU, outside CUDA graphs: `python bench/host_time.py [--json FILE]`.

One token of Qwen3-30B-A3B's layer (H 2048, I 768, 128 experts, 8 a token), and beside it the quantizer
and the dense product of one row. A number is the time from a call to its return, in us: the median over
repetitions of the mean of a few calls, which begin with an idle GPU and do not wait for it.
"Repeated" is what a call takes from the third one of its form on (`kernels/records`), "whole" what it
takes without a record. Parts of the latter are "checks", of the arguments, and "choice", of the backend.
"Launches" are the launches of a repeated call by themselves.
"""

# SPDX-License-Identifier: Apache-2.0
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from measure import DEVICE, arguments, save, start

import nvfp4_moe
from nvfp4_moe import RoutingMethodType, SfLayout
from nvfp4_moe.bench.moe import SHAPES, Shape, inputs, random_experts
from nvfp4_moe.kernels.backends import Operation, prepared
from nvfp4_moe.kernels.dense.api import MM_FP4
from nvfp4_moe.kernels.moe.backends import FUSED_MOE
from nvfp4_moe.kernels.quantize.api import QUANTIZE
from nvfp4_moe.kernels.records import recorder, repeats

CALLS = 20  # in one go: far fewer launches than the GPU's queue holds
ROUNDS = 51
COLUMNS = ("call", "repeated", "whole", "checks", "choice", "launches", "launched")
Call = Callable[[], object]


def host_microseconds(call: Call) -> float:
    """Median over rounds of the mean time in which a call returns."""
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - begin) / CALLS * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)


def calls(s: Shape = SHAPES[0]) -> dict[str, tuple[Operation, Callable, tuple, dict]]:
    """Return what is measured: the operation, its public function, and the arguments."""
    experts, (x, logits) = random_experts(s, DEVICE), inputs(s, 1, DEVICE)
    base = 1 / 2688
    codes, scales, token = nvfp4_moe.nvfp4_quantize(
        x, base, SfLayout.layout_linear, per_token_activation=True
    )
    e, layer = experts, (x, experts, (logits, s.routing))
    signature = (
        logits, None, codes, scales.view(torch.float8_e4m3fn), e.gemm1_weights,
        e.gemm1_weights_scale, None, None, None, None, e.gemm2_weights, e.gemm2_weights_scale, None,
        e.output1_scale_scalar, e.output1_scale_gate_scalar, e.output2_scale_scalar, s.experts,
        s.top_k, None, None, s.intermediate, 0, s.experts, None, int(RoutingMethodType.Renormalize),
    )  # fmt: skip
    rows = torch.randn(4096, s.hidden, device=x.device).bfloat16()
    a, a_scales = nvfp4_moe.nvfp4_quantize(x, 1.0)
    b, b_scales = nvfp4_moe.nvfp4_quantize(rows, 1.0)
    triton, per_token = {"backend": "triton"}, {"per_token_activation": True}
    product = (a, b.T, a_scales, b_scales.T)
    return {
        "fused_moe": (FUSED_MOE, nvfp4_moe.fused_moe, layer, triton),
        "fused_moe, auto": (FUSED_MOE, nvfp4_moe.fused_moe, layer, {}),
        "trtllm_fp4_block_scale_moe": (
            FUSED_MOE,
            nvfp4_moe.trtllm_fp4_block_scale_moe,
            signature,
            {"per_token_scale": token, **triton},
        ),
        "nvfp4_quantize": (QUANTIZE, nvfp4_moe.nvfp4_quantize, (x, base), per_token | triton),
        "nvfp4_quantize, auto": (QUANTIZE, nvfp4_moe.nvfp4_quantize, (x, base), per_token),
        "mm_fp4": (MM_FP4, nvfp4_moe.mm_fp4, product, triton),
        "mm_fp4, auto": (MM_FP4, nvfp4_moe.mm_fp4, product, {}),
    }


def launches_of(call: Call) -> list[Call]:
    """Return the launches of a repeated call, each as a function that holds the memory it uses."""
    seen: list[Call] = []
    noted = recorder.Recorder.launched

    def note(
        self: recorder.Recorder,
        call: Callable[..., None],
        grid: tuple[int, int],
        device: int,
        before: Sequence[Any],
        values: Sequence[Any],
        rest: int,
    ) -> None:
        stream = torch._C._cuda_getCurrentRawStream(device)
        args: list[object] = []
        for value in values:
            if isinstance(value, recorder.Described):
                args += [value.firsts[value.address], *value.rest]
            else:
                args.append(value.data_ptr() if isinstance(value, torch.Tensor) else value)
        given = (*grid, 1, stream, *before, *args, *[None] * rest)

        def launch(held: Sequence[Any] = values) -> None:
            """Launch; `held` keeps in memory what the launch knows by its address alone."""
            call(*given)

        seen.append(launch)
        noted(self, call, grid, device, before, values, rest)

    repeats.forget()
    call()
    recorder.Recorder.launched = note  # type: ignore[method-assign]
    try:
        call()
    finally:
        recorder.Recorder.launched = noted  # type: ignore[method-assign]
    return seen


def measure(operation: Operation, function: Callable, args: tuple, options: dict) -> dict:
    def call() -> object:
        return function(*args, **options)

    for _ in range(3):  # compiles, records, repeats
        call()
    torch.cuda.synchronize()
    cell = {"repeated_us": host_microseconds(call)}
    repeats.enabled = False
    try:
        cell["whole_us"] = host_microseconds(call)
    finally:
        repeats.enabled = True
    prepare = prepared(function)
    checked, backend = prepare(*args, **options)
    cell["checks_us"] = host_microseconds(lambda: prepare(*args, **options))
    cell["choice_us"] = host_microseconds(lambda: operation.resolve(checked, backend))
    launched = launches_of(call)
    cell["launches"] = len(launched)
    cell["launches_us"] = host_microseconds(lambda: [launch() for launch in launched])
    return cell


def line(name: str, c: dict) -> str:
    numbers = ("repeated_us", "whole_us", "checks_us", "choice_us", "launches_us")
    return f"{name:<28}" + "".join(f"{c[n]:>10.1f}" for n in numbers) + f"{c['launches']:>10}"


def main() -> None:
    options, where = start(arguments(__doc__))
    print(f"{COLUMNS[0]:<28}" + "".join(f"{name:>10}" for name in COLUMNS[1:]))
    cells = {}
    with torch.no_grad():
        for name, asked in calls().items():
            cells[name] = measure(*asked)
            print(line(name, cells[name]), flush=True)
        # Not before: the kernels' module, which a first call imports, knows how this Triton launches.
        if not repeats.serve():
            print(
                "nothing was repeated from a record: this Triton launches kernels by its own code"
            )
    save(options.json, {**where, "calls": CALLS, "rounds": ROUNDS, "cells": cells})


if __name__ == "__main__":
    main()
