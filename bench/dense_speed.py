"""Speed of the Triton dense product on this GPU: `python bench/dense_speed.py [--json FILE]`.

Needs PyTorch and Triton, no installation and no network. Of every shape: time, bytes moved (codes, block
scales, alpha, output) over time as a share of the rate of a device copy in the same run, TFLOP/s, and
cuBLAS' bf16 product of the same shape beside it. All inside CUDA graphs, with several copies of b by
turns, so that it comes from memory and not from the cache. Every cell's output is compared with the
reference first: bitwise on sums that are exact, on some of the columns.
"""

# SPDX-License-Identifier: Apache-2.0
import itertools

import torch
from measure import arguments, copy_rate, cublas_rate, microseconds, save, start

from nvfp4_moe.kernels.dense.call import KernelCall
from nvfp4_moe.kernels.dense.launch import dense_config, mm_fp4
from nvfp4_moe.kernels.triton_target import arch
from nvfp4_moe.reference import dense as reference
from nvfp4_moe.reference.layouts import padded_shape
from nvfp4_moe.reference.recipe import SfLayout

DEVICE = torch.device("cuda")
ROWS = (1, 16, 128, 1024, 8192)
SHAPES = ((4096, 4096), (7168, 4096), (4096, 7168), (7168, 7168))  # N, K
_CACHE = 256 << 20  # more than any GPU's
_CHECKED = 128
"""Columns of the output, and rows, that are compared with the reference."""


def operand(rows: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of every value and block scales of 1/2 to 2, whose sums are exact for K up to 7168."""
    codes = torch.randint(0, 256, (rows, k // 2), device=DEVICE, dtype=torch.uint8)
    keep = torch.rand(rows, k // 2, device=DEVICE) < 0.5
    shape = padded_shape(rows, k // 16, SfLayout.layout_128x4)
    scales = torch.randint(6, 9, shape, device=DEVICE, dtype=torch.uint8) * 8
    return torch.where(keep, codes, 0), scales


def check(a, a_scales, b, b_scales, alpha) -> None:
    """The first rows against the reference, on the first columns."""
    m = min(a.shape[0], _CHECKED)
    got = product(a, a_scales, b, b_scales, alpha)[:m, :_CHECKED]
    want = reference.mm_fp4(
        a[:m], b[:_CHECKED].T, a_scales[:128], b_scales[:128].T, alpha[:m], torch.bfloat16
    )
    if not torch.equal(got.view(torch.int16), want.view(torch.int16)):
        raise SystemExit(f"wrong bits: {tuple(a.shape)} times {tuple(b.shape)}")


def product(a, a_scales, b, b_scales, alpha) -> torch.Tensor:
    out = a.new_empty((a.shape[0], b.shape[0]), dtype=torch.bfloat16)
    mm_fp4(KernelCall(a, b, a_scales, b_scales, alpha, False), out)
    return out


def cell(m: int, n: int, k: int, copy: float) -> dict[str, object]:
    a, a_scales = operand(m, k)
    alpha = torch.rand(m, device=DEVICE) + 0.5
    weights = [operand(n, k) for _ in range(max(2, _CACHE // (n * k // 2)))]
    for b, b_scales in weights[:2]:
        check(a, a_scales, b, b_scales, alpha)
    turn = itertools.cycle(weights)
    calls = min(len(weights), 8 if m >= 1024 else 32)
    time = microseconds(lambda: product(a, a_scales, *next(turn), alpha), calls)

    x = torch.randn(m, k, device=DEVICE).bfloat16()
    copies = max(2, min(8, _CACHE // (2 * n * k)))
    dense = itertools.cycle([torch.randn(n, k, device=DEVICE).bfloat16() for _ in range(copies)])
    cublas = microseconds(lambda: x @ next(dense).T, copies)
    moved = (m + n) * k * (1 / 2 + 1 / 16) + 4 * m + 2 * m * n
    return {
        "m": m,
        "n": n,
        "k": k,
        "us": time,
        "cublas_bf16_us": cublas,
        "share_of_copy": moved / time / 1e3 / copy,
        "tflops": 2 * m * n * k / time / 1e6,
        "cublas_tflops": 2 * m * n * k / cublas / 1e6,
        "config": str(dense_config(m, n, k, arch(a.device))),
    }


def main() -> None:
    options, where = start(arguments(__doc__))
    copy, cublas = copy_rate(), cublas_rate()
    print(f"\ndevice copy: {copy:.0f} GB/s; cuBLAS bf16, 8192 cubed: {cublas:.0f} TFLOP/s\n")
    print(
        f"{'M':>5}{'N':>6}{'K':>6}{'us':>10}{'of copy':>9}{'TFLOP/s':>9}{'cuBLAS us':>11}", end=""
    )
    print(f"{'TFLOP/s':>9}{'faster':>8}")
    cells = []
    for (n, k), m in itertools.product(SHAPES, ROWS):
        c = cell(m, n, k, copy)
        cells.append(c)
        print(
            f"{m:>5}{n:>6}{k:>6}{c['us']:>10.2f}{c['share_of_copy']:>9.3f}{c['tflops']:>9.1f}",
            end="",
        )
        print(f"{c['cublas_bf16_us']:>11.2f}{c['cublas_tflops']:>9.1f}", end="")
        print(f"{c['cublas_bf16_us'] / c['us']:>8.2f}", flush=True)
    save(options.json, {**where, "copy_gb_s": copy, "cublas_tflops": cublas, "cells": cells})


if __name__ == "__main__":
    main()
