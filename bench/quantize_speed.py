"""Speed of the Triton quantizer on this GPU: `python bench/quantize_speed.py [--json FILE]`.

Needs PyTorch and Triton, no installation and no network. Large matrices: bytes moved (input, codes,
block scales, per-token scales) over time, as a share of the rate of a device copy (read and written)
in the same run. Small ones: time of a call over that of `copy_` of the same rows. Both inside CUDA
graphs, so that launches cost what they cost in serving. Every cell's outputs are compared with the
reference first.
"""

# SPDX-License-Identifier: Apache-2.0
from functools import partial

import torch
from measure import DEVICE, arguments, save, start

from nvfp4_moe.bench.clock import copy_rate, microseconds
from nvfp4_moe.kernels.quantize.launch import quantize_per_token
from nvfp4_moe.reference import quantize as reference
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe, SfLayout

RECIPES = (
    Recipe(),
    Recipe("exact"),
    Recipe("fast", NVFP44Over6Config()),
    Recipe("exact", NVFP44Over6Config(256, "MSE")),
    Recipe(build="cute-dsl"),
    Recipe("exact", None, "cute-dsl"),
    Recipe("exact", NVFP44Over6Config(), "cute-dsl"),
)
LAYOUTS = (SfLayout.layout_linear, SfLayout.layout_128x4)
COLUMNS = (512, 1024, 2048, 4096, 7168, 8192, 16384)
GOAL_COLUMNS = (2048, 4096, 7168, 8192)  # all recipes; the other widths have the first three
ELEMENTS = 64 * 2**20
SMALL_ROWS = (1, 8, 32, 128)
SMALL_COLUMNS = (2048, 4096, 7168)


def check(x: torch.Tensor, recipe: Recipe, layout: SfLayout) -> None:
    got = quantize_per_token(x, recipe.base_scale_inv, recipe, layout)
    want = reference.quantize_per_token(x, recipe.base_scale_inv, recipe, layout)
    assert want.per_token_scale is not None
    for a, b in zip(got, (want.codes, want.block_scales, want.per_token_scale), strict=True):
        if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            raise SystemExit(f"wrong bits: {tuple(x.shape)} {recipe} {layout.name}")


def large(cells: list[dict]) -> None:
    copy = copy_rate(DEVICE)
    print(f"\ndevice copy: {copy:.0f} GB/s. Share of it, M * K = 64 Mi, bf16, linear / 128x4:")
    print(f"{'recipe':<30}" + "".join(f"{f'K={k}':>14}" for k in COLUMNS))
    for recipe in RECIPES:
        row = f"{recipe!s:<30}"
        for columns in COLUMNS:
            if columns not in GOAL_COLUMNS and recipe not in RECIPES[:3]:
                row += f"{'-':>14}"
                continue
            m = ELEMENTS // columns
            x = torch.randn(m, columns, device="cuda").bfloat16()
            shares = []
            for layout in LAYOUTS:
                check(x[: min(m, 4096)], recipe, layout)
                call = partial(quantize_per_token, x, recipe.base_scale_inv, recipe, layout)
                time = microseconds(call, 5)
                moved = x.numel() * (2 + 1 / 2 + 1 / 16) + 4 * m
                shares.append(moved / time / 1e3 / copy)
                cells.append({"recipe": str(recipe), "layout": layout.name, "m": m, "k": columns})
                cells[-1] |= {"us": time, "share_of_copy": shares[-1]}
            row += f"{'/'.join(f'{s:.3f}' for s in shares):>14}"
        print(row, flush=True)


def small(cells: list[dict]) -> None:
    print("\nfew rows: us of copy_, then time over it, linear / 128x4:")
    shapes = [(m, k) for k in SMALL_COLUMNS for m in SMALL_ROWS]
    print(f"{'[M, K]':<12}{'copy_':>8}" + "".join(f"{r!s:>26}" for r in RECIPES[:4]))
    for m, columns in shapes:
        x = torch.randn(m, columns, device="cuda").bfloat16()
        y = torch.empty_like(x)
        copy = microseconds(partial(y.copy_, x), 20)
        row = f"{f'{m} x {columns}':<12}{copy:>8.2f}"
        for recipe in RECIPES[:4]:
            ratios = []
            for layout in LAYOUTS:
                check(x, recipe, layout)
                call = partial(quantize_per_token, x, recipe.base_scale_inv, recipe, layout)
                time = microseconds(call, 20)
                ratios.append(time / copy)
                cells.append({"recipe": str(recipe), "layout": layout.name, "m": m, "k": columns})
                cells[-1] |= {"us": time, "ratio_to_copy": ratios[-1]}
            row += f"{' / '.join(f'{r:.2f}' for r in ratios):>26}"
        print(row, flush=True)


def main() -> None:
    options, where = start(arguments(__doc__))
    cells: list[dict] = []
    large(cells)
    small(cells)
    save(options.json, {**where, "cells": cells})


if __name__ == "__main__":
    main()
