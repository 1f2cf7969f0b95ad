"""Probes of the formats, layouts and recipes."""

# SPDX-License-Identifier: Apache-2.0
import functools
import itertools
from dataclasses import replace
from typing import get_args

import torch

from nvfp4_moe import host
from nvfp4_moe.reference import layouts
from nvfp4_moe.reference import recipe as recipes
from nvfp4_moe.reference.layouts import interleave_gated_rows, inverse, shuffle_rows
from nvfp4_moe.reference.numerics import e2m1, e4m3, fp32, functions
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe, SfLayout, all_recipes

from .answers import Answers, raised
from .gradients import gradient
from .numbers import around, factors_of_the_least, seeded, specials

_SHAPES = ((1, 1), (5, 3), (8, 4), (9, 5), (127, 4), (128, 4), (130, 7), (257, 9))


def of_e2m1() -> Answers:
    values = host.fp32(e2m1.VALUES)
    x = around(torch.cat([values, (values[1:] + values[:-1]) / 2]))
    yield "e2m1.encode", e2m1.encode(x)
    codes = host.arange(16).to(torch.uint8)
    yield "e2m1.decode", e2m1.decode(codes)
    yield "e2m1.pack", e2m1.pack(codes.view(2, 8))
    yield "e2m1.unpack", e2m1.unpack(host.arange(256).to(torch.uint8).view(4, 64))
    yield "e2m1.MAX", e2m1.MAX


def of_e4m3() -> Answers:
    every = host.arange(256).to(torch.uint8)
    yield "e4m3.decode", e4m3.decode(every)
    values = every[:127].view(torch.float8_e4m3fn).float()
    x = around(torch.cat([values, (values[1:] + values[:-1]) / 2, host.fp32([464.0, 480.0, 1e9])]))
    yield "e4m3.encode", e4m3.encode(x)


def of_fp32() -> Answers:
    bits = host.integers(seeded(1), -(2**31), 2**31, (4096,)).int()
    x = torch.cat([bits.view(torch.float32), specials()])
    y = torch.cat([x.roll(1), specials().flip(0)])[: x.numel()]
    yield "flush", fp32.flush(x)
    yield "rcp", fp32.rcp_approx_ftz(x)
    least = factors_of_the_least()
    for ftz in (True, False):
        ar = fp32.Arithmetic(ftz)
        yield f"least products, {ftz}", ar.mul(*least)
        # Of a tensor without dimensions torch does not take the type.
        small, near, large = host.fp32([2.0**-126, 1 - 2.0**-24, 2.0**126]).split(1)
        yield f"least products with a number, {ftz}", [
            ar.mul(small, near[0]), ar.mul(near[0], small), ar.div(near, large[0]),
            ar.div(near[0], large),
        ]  # fmt: skip
        yield f"arithmetic, {ftz}", [
            ar.flush(x), ar.mul(x, y), ar.mul(x, 1e-30), ar.add(x, y), ar.sub(x, y), ar.div(x, y),
            ar.div(1.0, x), ar.div(x, 3.0), ar.min_flt_max(x), ar.add(x, -x), ar.sub(x, x * 1.5),
        ]  # fmt: skip


def of_layouts() -> Answers:
    for (m, k), layout in itertools.product(_SHAPES, SfLayout):
        scales = host.integers(seeded(m), 0, 256, (2, m, k)).to(torch.uint8)
        yield "padded_shape", layouts.padded_shape(m, k, layout)
        laid = layouts.from_linear(scales, layout)
        yield "from_linear", laid
        yield "to_linear", layouts.to_linear(laid, m, k, layout)
        yield "to_linear, flat", layouts.to_linear(laid[0].flatten(), m, k, layout)
        yield (
            "to_linear, refused",
            raised(functools.partial(layouts.to_linear, scales[0, :0], 3, 3, layout)),
        )
        for target in SfLayout:
            yield "convert", layouts.convert(laid, m, k, layout, target)
    yield from _of_row_orders()


def _of_row_orders() -> Answers:
    for rows in (16, 32, 48, 64, 128, 384):
        for tile in (128, 64, 256):
            yield "shuffle_rows", raised(lambda r=rows, t=tile: shuffle_rows(r, t))
        yield "interleave", interleave_gated_rows(rows)
        yield "inverse", inverse(interleave_gated_rows(rows))
    yield "refused", raised(lambda: interleave_gated_rows(3))
    yield "default", shuffle_rows(384)


def of_recipe() -> Answers:
    yield "block size", recipes.BLOCK_SIZE
    for recipe in all_recipes():
        numbers = recipe.code, recipe.base_scale_inv, recipe.e4m3_max
        yield "recipe", (*numbers, recipe.is_fast_alone, str(recipe))
        for version in get_args(recipes.FlashInferVersion):
            of = replace(recipe, flashinfer=version)
            yield "version", (of.code, of.tests_rounded_scale, str(of.earliest))
    for code in range(136):
        yield "from_code", raised(lambda c=code: repr(Recipe.from_code(c)))
    for bad in (
        lambda: Recipe("slow"),
        lambda: Recipe(build="none"),
        lambda: NVFP44Over6Config(3),
        lambda: NVFP44Over6Config(256, "max"),
        lambda: NVFP44Over6Config(448, 2),
    ):
        yield "refused", raised(bad)
    for given in (None, Recipe(), "fast"):
        yield "check_recipe", raised(lambda r=given: recipes.check_recipe(r))
    yield "of", NVFP44Over6Config.of(NVFP44Over6Config(256, "mse", True))


def of_functions() -> Answers:
    some = torch.cat([host.normal(seeded(21), 4096) * 40, host.arange(-1600, 1600).float() / 8])
    x = torch.cat([around(some), some.bfloat16().float(), host.fp32([128.0, -126.0, -127.0])])
    for name in functions.FUNCTIONS:
        of = functions.functions(name)
        yield f"exp, {name}", of.exp(x)
        yield f"sigmoid, {name}", of.sigmoid(x)
        yield f"div, {name}", of.div(x, x.flip(0))
        yield f"checksum, {name}", functions.checksum(name)
        steep = host.fp32([-2.0, 0.5, 3.0]).requires_grad_()
        product = of.exp(steep) * of.sigmoid(steep)
        yield f"derivative, {name}", gradient(product, torch.ones_like(product))
    yield "ex2", functions.ex2_approx_ftz(x)
    yield "tanh", functions.tanh_approx(torch.cat([x, x / 64, x / 2048]))
    for exponent in functions.LEADING_BITS:
        yield "leading numbers", functions.leading_numbers(exponent)
    yield "tanh table", functions.tanh_table(119, torch.device("cpu"))
