"""The reference against `scalar_model.py`: both builds, every recipe, ordinary and extreme blocks.

The golden files show the CUDA build's per-token and plain global-scale quantizers; the CuTe-DSL
build, 4over6 with a global scale, e4m3 input and the edges of fp32 input stand on this.
"""

# SPDX-License-Identifier: Apache-2.0
from itertools import chain

import numpy as np
import pytest
import torch
from assertions import assert_bitwise
from scalar_model import ZERO, Kernel, hmax

from nvfp4_moe.cases import inputs
from nvfp4_moe.reference.numerics import e2m1
from nvfp4_moe.reference.quantize import quantize_global_scale, quantize_per_token
from nvfp4_moe.reference.recipe import Recipe, all_recipes

EVERY = [*all_recipes(), Recipe(flashinfer="0.7.4")]
PLAIN = [r for r in EVERY if r.four_over_six is None]
by_recipe = pytest.mark.parametrize("recipe", EVERY, ids=str)
by_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def assert_equals_model(quantized, rows, what):
    """`rows`: (block scales, codes[, per-token scale]) of each row, by the model."""
    scales, codes, *per_token = zip(*rows, strict=True)
    assert_bitwise(e2m1.unpack(quantized.codes), torch.tensor(codes).byte(), f"{what}: codes")
    assert_bitwise(quantized.block_scales, torch.tensor(scales).byte(), f"{what}: block scales")
    if per_token:
        expected = torch.from_numpy(np.array(per_token[0], np.float32))
        assert_bitwise(quantized.per_token_scale, expected, f"{what}: per-token scales")


def assert_per_token(x, recipe, what):
    g = np.float32(recipe.base_scale_inv)
    kernel = Kernel(recipe)
    with np.errstate(all="ignore"):
        rows = [kernel.row(row, g) for row in x.float().numpy()]
        encodes = [kernel.row_scales(hmax([ZERO, *row]), g)[0] for row in x.float().numpy()]
    got = quantize_per_token(x, float(g), recipe, keep_steps=True)
    assert_equals_model(got, rows, f"{what} {recipe}")
    expected = torch.from_numpy(np.array(encodes, np.float32))
    assert_bitwise(got.steps["encode_scale"], expected, f"{what} {recipe}: encode scales")


@by_dtype
@by_recipe
def test_per_token_edge_blocks(recipe, dtype):
    assert_per_token(inputs.synthetic("edge", 40, 32, dtype), recipe, "edge")


@by_dtype
@by_recipe
def test_per_token_ordinary_blocks(recipe, dtype):
    for kind in ("normal", "heavy", "grid", "sparse", "bits"):
        assert_per_token(inputs.synthetic(kind, 6, 80, dtype, seed=7), recipe, kind)


@by_recipe
def test_per_token_rows_between_normal_and_nothing(recipe):
    """Every binary magnitude at which the scale, its inverse or an element stops being normal."""
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(3))
    x *= torch.exp2(torch.arange(-140, -100).float())[:, None]
    x[:, 16] = 0.0
    x[::3, 24:] = -0.0
    assert_per_token(x.bfloat16(), recipe, "tiny rows")


SCALES = (0.0, 1e-40, -3.0, 1e-3, 900.0, 2e37, torch.inf, torch.nan)


@pytest.mark.parametrize("inverse", [False, True], ids=["encode", "inverse"])
@by_recipe
def test_global_scale(recipe, inverse):
    """One scale a row, among them what a caller should not pass but the kernel does not check."""
    kernel = Kernel(recipe)
    for kind in ("heavy", "edge"):
        x = inputs.synthetic(kind, 16, 32, seed=11)
        scale = torch.tensor(SCALES * 2)
        with np.errstate(all="ignore"):
            encodes = scale.numpy()
            if inverse:
                encodes = [kernel.decode_to_encode(s) for s in encodes]
            rows = [kernel.blocks(r, e) for r, e in zip(x.float().numpy(), encodes, strict=True)]
        got = quantize_global_scale(x, scale, recipe, inverse=inverse)
        assert_equals_model(got, rows, f"{kind} {recipe}")


@pytest.mark.parametrize("recipe", PLAIN, ids=str)
def test_e4m3_input(recipe):
    generator = torch.Generator().manual_seed(4)
    bits = torch.randint(0, 256, (40, 16 * 8), generator=generator).byte()
    bits[:8] &= 0x87  # subnormals and zeros
    bits[8:12, :16] = 0
    bits[12, :16] = 0x7F
    bits[13, :16] = 0x80
    x = bits.view(torch.float8_e4m3fn)
    scale = torch.tensor(SCALES * 5)
    kernel = Kernel(recipe)
    rows = []
    with np.errstate(all="ignore"):
        for row, encode in zip(x.float().numpy(), scale.numpy(), strict=True):
            blocks = [kernel.e4m3_block(row[i : i + 16], encode) for i in range(0, len(row), 16)]
            scales, codes = zip(*blocks, strict=True)
            rows.append((scales, list(chain(*codes))))
    assert_equals_model(quantize_global_scale(x, scale, recipe), rows, str(recipe))


def test_e4m3_input_is_rescaled_by_a_division_in_one_kernel_only():
    """6 * rcp(68.7) and 6 / 68.7 fall on two sides of a tie of fp16, for the element 15 * 2^-9."""
    x = torch.full((1, 16), 0x0F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    amax = {}
    for recipe in PLAIN:
        q = quantize_global_scale(x, 68.69921875, recipe, keep_steps=True)
        key = recipe.math, recipe.build, recipe.flashinfer
        amax[key] = q.steps["block_amax"].half().view(torch.int16).item()
    divided = amax.pop(("exact", "cute-dsl", "0.7.2"))
    assert set(amax.values()) == {divided + 1}


def test_fp32_input():
    x = torch.randn(48, 64, generator=torch.Generator().manual_seed(5))
    x *= torch.exp2(torch.linspace(-148, 126, 48))[:, None]
    x[1::6, :16] *= 1e-4
    x[2::6, :16] = torch.nan
    x[3::6, :16] = -0.0
    x[4::12, 5] = torch.inf
    x[5::12] = torch.nan
    x[11::12, 16:] = 0.0
    g = np.float32(1 / 2688)
    with np.errstate(all="ignore"):
        rows = [Kernel(Recipe()).fp32_row(row, g) for row in x.numpy()]
    assert_equals_model(quantize_per_token(x, float(g), Recipe()), rows, "fp32")
