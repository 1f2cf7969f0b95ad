"""Probes of the quantizers."""

# SPDX-License-Identifier: Apache-2.0
import functools
import itertools

import torch

from nvfp4_moe import host
from nvfp4_moe.cases import inputs
from nvfp4_moe.cases import quantize as quantize_cases
from nvfp4_moe.differential.compare import run_reference
from nvfp4_moe.reference import quantize
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe, SfLayout, all_recipes

from ..kernel_calls import rows_at_edges
from .answers import Answers, raised
from .numbers import seeded


@functools.cache
def _matrices() -> list[torch.Tensor]:
    far = inputs.synthetic("normal", 6, 80, seed=2).float()
    far[:, 16:] *= 2.0 ** -host.arange(64).float() / 2
    kinds = [inputs.synthetic(kind, 20, 80, seed=1) for kind in ("edge", "bits", "heavy", "grid")]
    kinds += [inputs.synthetic(kind, 20, 48, torch.float16, 1) for kind in ("edge", "bits")]
    near = inputs.synthetic("grid", 1500, 128, seed=3)[[23, 48, 74, 290, 293, 428, 436, 497]]
    return [rows_at_edges(), far.bfloat16(), near, *kinds]


def _ones() -> torch.Tensor:
    """[6, 48] bf16: rows and blocks whose maximum is 1, 0 or NaN."""
    x = host.normal(seeded(14), 6, 48).clamp(-1, 1)
    x[:, ::16] = 1.0
    x[1, :16], x[2], x[3, 16:32], x[4] = 0.0, 0.0, torch.nan, torch.nan
    x[5] = 0.0
    x[5, :16] = torch.nan
    return x.bfloat16()


def of_quantize() -> Answers:
    recipes = all_recipes()
    for i, x in enumerate(_matrices()):
        for recipe in recipes[i % 2 :: 2] if i else recipes:
            of_modes = {case.mode: case for case in quantize_cases.cases(x, [recipe], False)}
            for case in of_modes.values():
                yield f"quantize, {case.mode}, {recipe}", run_reference(x, case)
    plain, x = Recipe(), _matrices()[0]
    special = [*_matrices()[2:5], _ones()]
    for y, recipe in itertools.product(special, recipes):
        if recipe.four_over_six in (None, NVFP44Over6Config(), NVFP44Over6Config(256, "MSE", True)):
            yield (
                f"steps, {recipe}",
                quantize.quantize_per_token(y, recipe.base_scale_inv, recipe, keep_steps=True),
            )
            yield "blocks", quantize.quantize_block_scales(y.float() * 1e-38, recipe)
    near = inputs.synthetic("grid", 4096, 32, seed=7)[[106, 116, 183, 572, 934, 1020, 1059]]
    for math, mode in itertools.product(("fast", "exact"), ("MAE", "MSE")):
        recipe = Recipe(math, NVFP44Over6Config(448, mode))
        yield "near", quantize.quantize_global_scale(near, 37.0, recipe)
        yield (
            "by halves",
            quantize.quantize_global_scale(
                near, 37.0, recipe, error_by_halves=True, keep_steps=True
            ),
        )
    for y, scale in itertools.product((_matrices()[3], _ones()), (1.0, 1e-36, 1e-3)):
        yield (
            "fp32",
            quantize.quantize_per_token(y.float() * scale, 1 / 2688, plain, keep_steps=True),
        )
    yield (
        "fp32",
        quantize.quantize_per_token(_matrices()[5].float(), 1 / 2688, plain, keep_steps=True),
    )
    yield "fp32", quantize.quantize_per_token(_matrices()[0].float() * 1.01, 1 / 2688, plain)
    rows = x.shape[0]
    index = torch.cat([host.arange(rows).flip(0) - 2, host.arange(3)]).int()
    index[5], index[6], index[7] = rows, rows + 1, x.shape[1] - 1
    index[rows:] = rows - 1  # is not read
    for layout in SfLayout:
        yield (
            "row_index",
            quantize.quantize_per_token(
                x,
                1 / 2688,
                plain,
                layout,
                row_index=index,
                out_scale=host.fp32(0.3),
                keep_steps=True,
            ),
        )
    for recipe in (
        Recipe(),
        Recipe("exact"),
        Recipe(build="cute-dsl"),
        Recipe("exact", build="cute-dsl"),
    ):
        for scale in (None, 37.0, 1e-39, host.fp32([0.0]), 0.5 + host.arange(x.shape[0]).float()):
            for inverse in (False, True):
                yield (
                    "global",
                    quantize.quantize_global_scale(
                        x, scale, recipe, inverse=inverse, keep_steps=True
                    ),
                )
        e4m3_input = host.integers(seeded(5), 0, 256, (12, 64)).to(torch.uint8)
        e4m3_input[3] = 0
        e4m3_input[4, :16] = 1
        all_bytes = host.arange(256).to(torch.uint8).view(1, 256).expand(512, -1).contiguous()
        yield (
            "e4m3, by row",
            quantize.quantize_global_scale(
                all_bytes.view(torch.float8_e4m3fn),
                0.01 + host.uniform(seeded(8), 512),
                recipe,
                keep_steps=True,
            ),
        )
        # Found by search: an ulp of 6 / scale decides how a value is rounded to fp16.
        near = host.fp32(
            [
                1.0893616676330566,
                0.9235210418701172,
                1.14251708984375,
                0.5215210914611816,
                1.4852721691131592,
                1.3989070653915405,
            ]
        )
        codes = torch.tensor([0x3A, 0x3A, 0x3A, 0x3D, 0x3D, 0x3A], dtype=torch.uint8, device="cpu")
        rows = codes[:, None].expand(-1, 16).contiguous().view(torch.float8_e4m3fn)
        yield "e4m3, near", quantize.quantize_global_scale(rows, near, recipe, keep_steps=True)
        for scale in (1.0, 0.02, 300.0):
            yield (
                "e4m3",
                quantize.quantize_global_scale(
                    e4m3_input.view(torch.float8_e4m3fn), scale, recipe, keep_steps=True
                ),
            )
        yield "blocks", quantize.quantize_block_scales(_matrices()[1].float() * 100, recipe)
    four = Recipe("fast", NVFP44Over6Config())
    yield (
        "refused",
        raised(
            lambda: quantize.quantize_global_scale(e4m3_input.view(torch.float8_e4m3fn), 1.0, four)
        ),
    )
    yield "refused", raised(lambda: quantize.quantize_per_token(x.float(), 1.0, four))
    q = quantize.quantize_per_token(x, plain.base_scale_inv, plain, SfLayout.layout_128x4)
    by_row = q.per_token_scale
    assert by_row is not None
    yield "dequantize", quantize.dequantize(q.codes, q.block_scales, by_row, SfLayout.layout_128x4)
    yield "dequantize", quantize.dequantize(q.codes, q.block_scales, 0.7, SfLayout.layout_128x4)
