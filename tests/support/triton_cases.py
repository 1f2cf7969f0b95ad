"""Cases of the Triton kernels, for the interpreter on the CPU and for a GPU."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import torch
from assertions import assert_quantized

from nvfp4_moe import host
from nvfp4_moe.cases import inputs
from nvfp4_moe.cases.quantize import Case
from nvfp4_moe.kernels.quantize import launch as quantize_launch
from nvfp4_moe.reference import quantize as reference
from nvfp4_moe.reference.quantize import Quantized
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe, SfLayout, all_recipes

EVERY = [*all_recipes(), Recipe(flashinfer="0.7.4")]
"""Every recipe; of 0.7.4 the one whose bits differ."""
PLAIN = [r for r in EVERY if r.four_over_six is None]


def per_token(x, recipe, layout=SfLayout.layout_linear, **options):
    g = recipe.base_scale_inv
    expected = reference.quantize_per_token(x, g, recipe, layout, **options)
    actual = quantize_launch.quantize_per_token(x, g, recipe, layout, **options)
    mode = "fp32 per-token" if x.dtype == torch.float32 else "per-token"
    told = None if options else (x, Case(mode, recipe, layout))
    what = f"{tuple(x.shape)} {x.dtype} {recipe} {layout.name}"
    assert_quantized(actual, expected, what, layout, told)


def global_scale(x, scale, recipe, layout=SfLayout.layout_linear, **options):
    expected = reference.quantize_global_scale(x, scale, recipe, layout, **options)
    actual = quantize_launch.quantize_global_scale(x, scale, recipe, layout, **options)
    assert_quantized(actual, expected, f"{tuple(x.shape)} {x.dtype} {recipe} {layout.name}")


def one_recipe(recipe, dtype, device):
    """Every kind of input, per token and with a global scale, two layouts each."""
    scale = torch.full((1,), 2688.0 / 3, device=device)
    odd = EVERY.index(recipe) % 2
    layout = SfLayout.layout_128x4 if odd else SfLayout.layout_8x4
    for kind in inputs.KINDS:
        x = inputs.synthetic(kind, 40, 80, dtype).to(device)
        per_token(x, recipe)
        per_token(x, recipe, layout)
        global_scale(x, scale, recipe, layout)


def row_index(device):
    x = inputs.synthetic("normal", 9, 64).to(device)
    index = torch.tensor([3, 1, -1, 0, 9, 2, 6, 6, -5, 4], dtype=torch.int32, device=device)
    for layout in SfLayout:
        per_token(x, Recipe(), layout, row_index=index)


def out_scale(device):
    x = inputs.synthetic("heavy", 9, 64).to(device)
    scale = torch.full((1,), 0.37, device=device)
    for build in ("cuda", "cute-dsl"):
        per_token(x, Recipe(build=build), out_scale=scale)


def scale_forms(device):
    """Floats, tensors, one a row, none, inverse."""
    x = inputs.synthetic("heavy", 7, 96).to(device)
    by_row = torch.linspace(1, 900, 7, device=device)
    four = Recipe("fast", NVFP44Over6Config())
    for recipe in (*PLAIN, four):
        for scale in (7.5, torch.full((1,), 7.5, device=device), by_row, None):
            for inverse in (False, True):
                global_scale(x, scale, recipe, inverse=inverse)
        g = torch.full((1,), recipe.base_scale_inv, device=device)
        expected = reference.quantize_per_token(x, g, recipe)
        assert_quantized(quantize_launch.quantize_per_token(x, g, recipe), expected, "tensor scale")


def e4m3_input(device):
    generator = torch.Generator().manual_seed(5)
    bits = torch.randint(0, 256, (33, 96), generator=generator).to(torch.uint8)
    x = bits.view(torch.float8_e4m3fn).to(device)
    for recipe in PLAIN:
        for scale in (11.0, 1e-3, torch.linspace(1e-4, 500, 33, device=device)):
            for inverse in (False, True):
                global_scale(x, scale, recipe, SfLayout.layout_128x4, inverse=inverse)


def fp32_input(device):
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(12, 80, generator=generator) * torch.logspace(-38, 30, 12)[:, None]
    x[0, :16] = torch.nan
    x[1] = torch.nan
    x[2] = 0
    x[3, 5] = torch.inf
    for layout in SfLayout:
        per_token(x.to(device), Recipe(), layout)


def odd_shapes(device):
    for m, k in ((0, 64), (1, 16), (3, 48), (5, 272), (130, 16), (129, 32), (2, 2688)):
        x = inputs.synthetic("normal", m, k).to(device)
        for layout in SfLayout:
            per_token(x, Recipe(), layout)
            global_scale(x, 100.0, Recipe(), layout)


def long_rows(device):
    """Beyond 16,384 columns a row is read twice."""
    x = inputs.synthetic("heavy", 2, 16384 + 4096 + 16).to(device)
    for recipe in (Recipe(), Recipe("exact"), Recipe("fast", NVFP44Over6Config(256, "MSE"))):
        per_token(x, recipe, SfLayout.layout_128x4)
    global_scale(x, 3.0, Recipe(), SfLayout.layout_128x4)


def every_way_to_cut_a_row(device):
    """By one program, by several, read twice, and in parts, whatever the shape would be given."""
    x = inputs.synthetic("heavy", 5, 7 * 16).to(device)
    for recipe in (*PLAIN, Recipe("fast", NVFP44Over6Config())):
        for layout in SfLayout:
            _cut(x, recipe, layout)
    for math in ("fast", "exact"):
        x = rows_with_a_block_far_below(7).to(device)
        _cut(x, Recipe(math, NVFP44Over6Config()), SfLayout.layout_linear)


def _cut(x, recipe, layout):
    g = recipe.base_scale_inv
    expected = reference.quantize_per_token(x, g, recipe, layout)
    for config in (
        quantize_launch.LaunchConfig(2, 8, 0, 1, 1),
        quantize_launch.LaunchConfig(1, 2, 8, 4, 1),
        quantize_launch.LaunchConfig(4, 4, 4, 1, 1),
        quantize_launch.LaunchConfig(1, 4, 0, 1, 1, 2),
        quantize_launch.LaunchConfig(2, 4, 0, 1, 1, 2),
    ):
        got = quantize_launch.Outputs(*quantize_launch.allocate(x, int(layout)))
        quantize_launch._launch(x, got, 0, None, g, recipe.code, int(layout), config=config)
        assert_quantized(got, expected, f"{recipe} {layout.name} {config}")


def rows_with_a_block_far_below(blocks):
    """[2 blocks, 16 blocks] bf16: pairs of rows, each with another block that is far below the others.

    Its scale is 1.4 steps of 2^-9. Rounded to one step, it leaves magnitudes that round above 6.
    """
    x = inputs.synthetic("normal", 2 * blocks, 16 * blocks).float().view(blocks, 2, blocks, 16)
    for pair in range(blocks):
        largest = x[pair].abs().amax((1, 2))
        block = x[pair, :, pair]
        block *= (largest * (1.4 / (448 * 512)) / block.abs().amax(1))[:, None]
    return x.view(2 * blocks, 16 * blocks).bfloat16()


def strided_and_misaligned(device):
    base = inputs.synthetic("normal", 8, 160).to(device)
    per_token(base[:, 1:81], Recipe())  # rows apart, and not on 16 bytes
    per_token(base.T.contiguous().T[:, :64], Recipe())  # column-major
    per_token(base.flatten()[3 : 3 + 4 * 64].view(4, 64), Recipe())


STRANGE = (torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -3.0, 3.38e38, 1e-40, -1e-38, 1e-30)


def strange_rows(columns):
    """[M, columns] bf16: pairs of blocks of one value each, mixtures, and NaN among numbers."""
    g = torch.Generator().manual_seed(8)
    values = torch.tensor(STRANGE, dtype=torch.float32)
    pairs = torch.zeros(len(values) ** 2, columns, dtype=torch.float32)
    pairs[:, :16] = values.repeat_interleave(len(values))[:, None]
    pairs[:, 16:32] = values.repeat(len(values))[:, None]
    mixed = values[torch.randint(0, len(values), (24, columns), generator=g)]
    some = torch.randn(24, columns, generator=g)
    some[:, 5], some[::2, 20], some[::3, 33], some[8:16, 16:32] = 4 * (torch.nan,)
    some[::5, 40] = torch.inf
    return torch.cat([pairs, mixed, some]).bfloat16()


def strange_values_and_scales(device):
    """NaN, infinities, zeros of both signs, overflow and subnormals, in the tensor and in its scale."""
    short, long = strange_rows(64).to(device), strange_rows(1536)[-24:].to(device)
    recipes = all_recipes()
    if device == "cpu":  # the interpreter takes its time
        short, long, recipes = short[::3], long[::4], [*PLAIN, Recipe("exact", NVFP44Over6Config())]
    for recipe in recipes:
        per_token(long, recipe)
        for scale in (recipe.base_scale_inv, 0.0, torch.inf, torch.nan, 1e-40):
            global_scale(short, scale, recipe)
            expected = reference.quantize_per_token(short, scale, recipe)
            codes, block_scales, token = quantize_launch.quantize_per_token(short, scale, recipe)
            assert torch.equal(token.isnan(), expected.per_token_scale.isnan())
            told = Quantized(codes, block_scales, token.nan_to_num(7.0))
            wanted = replace(expected, per_token_scale=expected.per_token_scale.nan_to_num(7.0))
            assert_quantized(told, wanted, f"{recipe} {scale}")


def rows_of_few_steps(largest):
    """[28, 80] bf16: blocks whose scales are few steps of 2^-9, if that of a row's maximum is `largest`.

    Rounded down, they leave magnitudes that round above 6. In every second row they are many steps.
    """
    g = torch.Generator().manual_seed(15)
    steps = host.fp32([0.3, 0.45, 1.2, 1.45, 2.4, 2.45, 3.4])
    rows = host.fp32([1.0, 2048.0]).repeat_interleave(2 * len(steps))
    both = torch.stack([steps, torch.full_like(steps, 40.0)], 1).flatten()
    size = rows * both.repeat(2) / (512 * largest)
    x = (2 * host.uniform(g, len(rows), 5, 16) - 1) * size[:, None, None]
    x[:, :, 0], x[:, :, 9], x[:, 0, 0] = size[:, None], -size[:, None], rows
    return x.view(-1, 80).bfloat16()


def block_scales_of_few_steps(device):
    """Under the recipe's base scale, under a larger one, and under one by which scales saturate."""
    for recipe in (
        Recipe("fast", NVFP44Over6Config()),
        Recipe("exact", NVFP44Over6Config(256, "MSE")),
    ):
        for largest in (recipe.e4m3_max, 8.0, 600.0):
            x, base = rows_of_few_steps(largest).to(device), 1 / (6 * largest)
            expected = reference.quantize_per_token(x, base, recipe)
            actual = quantize_launch.quantize_per_token(x, base, recipe)
            assert_quantized(actual, expected, f"{recipe} {largest}")


CASES = (
    row_index,
    out_scale,
    scale_forms,
    e4m3_input,
    fp32_input,
    odd_shapes,
    long_rows,
    strange_values_and_scales,
    block_scales_of_few_steps,
    every_way_to_cut_a_row,
    strided_and_misaligned,
)
"""The cases that a GPU and the interpreter share."""
