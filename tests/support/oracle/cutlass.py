"""The cutlass layer's activation and requantization of a bf16 or fp16 result of its first GEMM."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator

import numpy as np
import torch

from nvfp4_moe.reference.activation import ActivationType, activate
from nvfp4_moe.reference.layouts import to_linear
from nvfp4_moe.reference.quantize import quantize_global_scale
from nvfp4_moe.reference.recipe import BLOCK_SIZE, Recipe, SfLayout

from . import inputs
from .cases import DTYPES, Golden, Outcome, compared, recipe_of, tensor
from .draw import Array

ACTIVATION, HALVES = "cutlass/{}/q", "/cutlass/q"
ROWS = (17, 0, 40)
"""The rows of each of three experts."""
SITU = {"alpha": torch.tensor(4.0), "beta": torch.tensor(25.0)}


def compare(golden: Golden, every: int = 1) -> Iterator[Outcome]:
    for c in golden.cases("cutlass", ACTIVATION, every):
        kind, inter = ActivationType(c["act"]), c["inter"]
        width = inter * (2 if kind.gated else 1)
        raw = tensor(inputs.matrix(c, (sum(ROWS), width), golden.seed), c["dt"]).float()
        parameters = SITU if kind == ActivationType.Situ else {}
        values = activate(raw, kind, of_cutlass=True, **parameters).to(DTYPES[c["dt"]])
        q = quantize_global_scale(values, c["gs"], recipe_of(c), error_by_halves=True)
        four = " 4over6" if c["code"] else ""
        group = f"cutlass, {kind.name}, {c['dt']}, {'exact' if c['exact'] else 'fast'}{four}"
        yield compared(
            group, c["name"] + " codes", q.codes, golden.arrays[f"cutlass/{c['name']}/q"]
        )
        yield compared(
            group, c["name"] + " scales", q.block_scales, _scales(golden, c["name"], inter)
        )


def _scales(golden: Golden, name: str, inter: int) -> Array:
    """[rows of all experts, blocks], linear."""
    parts = [np.zeros((0, inter // BLOCK_SIZE), np.uint8)]
    for e, rows in enumerate(ROWS):
        if rows:
            tiles = torch.from_numpy(golden.arrays[f"cutlass/{name}/sf{e}"].copy())
            linear = to_linear(
                tiles.reshape(-(-rows // 128) * 128, -1),
                rows,
                inter // BLOCK_SIZE,
                SfLayout.layout_128x4,
            )
            parts.append(linear.numpy())
    return np.concatenate(parts)


def compare_sums(golden: Golden) -> Iterator[Outcome]:
    """Blocks that were searched for: the order of 4over6's sum of errors decides each of them."""
    for key in sorted(k for k in golden.arrays if k.endswith(HALVES)):
        start = key.removesuffix(HALVES)
        dtype, code, exact = start.split("/")
        x = tensor(golden.arrays[start + "/x"], dtype)
        recipe = Recipe.from_code(int(code) | int(exact) << 5)
        for kernel, layer in (("global", False), ("cutlass", True)):
            q = quantize_global_scale(x, 300.0, recipe, error_by_halves=layer)
            scales = golden.arrays[f"{start}/{kernel}/sf"]
            want = to_linear(
                torch.from_numpy(scales.copy()), *q.block_scales.shape, SfLayout.layout_128x4
            )
            group = f"4over6's sum, {'cutlass layer' if layer else 'global scale'}"
            codes = golden.arrays[f"{start}/{kernel}/q"]
            yield compared(group, start + " codes", q.codes, codes)
            yield compared(group, start + " scales", q.block_scales, want.numpy())
