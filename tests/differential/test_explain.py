"""The spelled-out arithmetic of an element ends in the reference's own bits, for every recipe."""

# SPDX-License-Identifier: Apache-2.0
import re
from dataclasses import replace

import pytest
import torch

from nvfp4_moe.cases import inputs
from nvfp4_moe.cases import quantize as quantize_cases
from nvfp4_moe.cases.quantize import Case
from nvfp4_moe.differential.compare import run_reference
from nvfp4_moe.differential.explain import explain_element, first_element
from nvfp4_moe.reference.numerics import e2m1
from nvfp4_moe.reference.recipe import Recipe, SfLayout, all_recipes

LINEAR = SfLayout.layout_linear


def cases():
    for recipe in all_recipes():
        yield Case("per-token", recipe, LINEAR)
        yield Case("global-scale", recipe, LINEAR, 37.5)
        if recipe.build == "cuda":
            yield Case("row scales", recipe, LINEAR)
    yield Case("fp32 per-token", Recipe(), LINEAR)


def last(lines, name):
    """The bits and value of the last line that begins with a name."""
    line = [line for line in lines if line.startswith(f"{name} = ")][-1]
    return re.fullmatch(r".* = (0x[0-9a-f]+) \((\S+)\)", line).groups()


def hexadecimal(lines, name):
    return int(last(lines, name)[0], 16)


def pattern(t):
    return int(t.reshape(1).view(torch.int32)) & 0xFFFFFFFF


@pytest.mark.parametrize(
    "case", list(cases()), ids=lambda c: f"{c.mode}-{c.recipe}".replace(" ", "-")
)
def test_every_recipe_ends_in_the_references_bits(case):
    for kind, dtype in (("heavy", torch.float16), ("edge", torch.bfloat16)):
        x = inputs.synthetic(kind, 20, 32, dtype)
        x = x.float() if case.mode == "fp32 per-token" else x
        q = run_reference(x, case, keep_steps=True)
        codes = e2m1.unpack(q.codes)
        for row in range(x.shape[0]):
            for block, element in ((0, 1 + row % 7), (1, 15))[: 1 + row % 2]:
                lines = explain_element(x, case, row, block, element)
                code = int(codes[row, 16 * block + element])
                check(lines, case, q, row, block, code)


@pytest.mark.parametrize(
    "recipe", [r for r in all_recipes() if r.four_over_six is None], ids=lambda r: str(r)
)
def test_elements_of_e4m3_end_in_the_references_bits(recipe):
    x = inputs.synthetic("edge", 20, 32, torch.float8_e4m3fn)
    of_modes = {c.mode: replace(c, layout=LINEAR) for c in quantize_cases.cases(x, [recipe], True)}
    assert set(of_modes) >= {"global-scale"}
    for case in of_modes.values():
        q = run_reference(x, case, keep_steps=True)
        codes = e2m1.unpack(q.codes)
        for row in range(x.shape[0]):
            for block, element in ((0, 1 + row % 7), (1, 15)):
                lines = explain_element(x, case, row, block, element)
                check(lines, case, q, row, block, int(codes[row, 16 * block + element]))


def check(lines, case, q, row, block, code):
    scale, steps = int(q.block_scales[row, block]), q.steps
    if q.per_token_scale is not None:
        assert hexadecimal(lines, "per-token scale") == pattern(q.per_token_scale[row])
        assert hexadecimal(lines, "row maximum A") == pattern(steps["row_amax"][row])
    if "encode_scale" in steps:
        assert hexadecimal(lines, "encode scale enc") == pattern(steps["encode_scale"][row])
    tops = (hexadecimal(lines, "block maximum V"), pattern(steps["block_amax"][row, block]))
    assert tops[0] == tops[1]
    if case.recipe.four_over_six is None:
        assert hexadecimal(lines, "block scale, unrounded") == pattern(
            steps["block_scale"][row, block]
        )
        assert hexadecimal(lines, "block scale sf") == scale
        assert hexadecimal(lines, "output scale") == pattern(steps["output_scale"][row, block])
        assert hexadecimal(lines, "code") == code
        return
    if lines[-1].startswith("block scale 0x00"):
        assert (scale, code) == (0, 0)
        return
    assert hexadecimal(lines, "s6") == pattern(steps["block_scale"][row, block])
    for n in (4, 6):
        assert hexadecimal(lines, f"error{n}") == pattern(steps[f"error_of_{n}"][row, block])
    taken = lines[-1][-1]
    assert lines[-1].endswith(f"so the block has sf{taken} and code{taken}")
    assert hexadecimal(lines, f"sf{taken}") == scale
    assert hexadecimal(lines, f"code{taken}") == code


@pytest.mark.parametrize(
    "recipe", [r for r in all_recipes() if r.four_over_six], ids=lambda r: str(r)
)
@pytest.mark.parametrize("mode", ["per-token", "global-scale"])
def test_the_differences_sum_to_the_errors(recipe, mode):
    """The d of the 16 elements, summed left to right, are the error that the choice was made by."""
    x = inputs.synthetic("heavy", 2, 32)
    case = Case(mode, recipe, LINEAR, quantize_cases.global_scale(x, recipe))
    every = [explain_element(x, case, 1, 1, i) for i in range(16)]
    for n in (4, 6):
        total = torch.zeros(())
        for lines in every:
            bits = hexadecimal(lines, f"d{n}")
            d = torch.tensor(bits - (bits >> 31 << 32), dtype=torch.int32).view(torch.float32)
            total = total + (d * d if recipe.four_over_six.err_mode == 1 else d.abs())
        assert pattern(total) == hexadecimal(every[0], f"error{n}")


def test_every_line_follows_from_those_before():
    x = torch.zeros(3, 32, dtype=torch.bfloat16)
    x[2, 5], x[2, 17], x[2, 20] = -3.0, 5.375, 1.0
    assert explain_element(x, Case("per-token", Recipe("exact"), LINEAR), 2, 1, 4) == [
        "x[2, 20] = 0x3f80 (1)",
        "g = 1 / (6 * 448) = 0x39c30c31 (0.000372023816)",
        "row maximum A = |x[2, 17]| = 0x40ac0000 (5.375)",
        "1 / g = 0x45280000 (2688)",
        "(1/g) / A = 0x43fa0be8 (500.093018)",
        "encode scale enc = min(that, FLT_MAX) = 0x43fa0be8 (500.093018)",
        "per-token scale = 1 / enc = 0x3b030c31 (0.00199962803)",
        "block maximum V = |x[2, 17]| = 0x40ac0000 (5.375)",
        "enc * (1/6) = 0x42a6b29b (83.3488388)",
        "block scale, unrounded = V * that = 0x43e00000 (448)",
        "block scale sf = e4m3(that) = 0x7e (448)",
        "sf * (1 / enc) = 0x3f655556 (0.895833373)",
        "output scale = min(1 / that, FLT_MAX) = 0x3f8ee23b (1.11627901)",
        "x * output scale = 0x3f8ee23b (1.11627901)",
        "code = e2m1(that) = 0x2 (1)",
    ]


def test_a_subnormal_of_a_block_whose_scale_is_zero():
    """0 * inf: the flush of the element shows, as code 7 and not 6."""
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    x[0, 0], x[0, 1], x[0, 31] = 1e-39, 1e-5, 300.0
    for build, code in (("cuda", 7), ("cute-dsl", 0)):
        case = Case("per-token", Recipe(build=build), LINEAR)
        assert int(run_reference(x, case).codes[0, 0]) & 15 == code
        assert hexadecimal(explain_element(x, case, 0, 0, 0), "code") == code


def test_which_element_is_explained():
    x = inputs.synthetic("normal", 3, 48)
    case = Case("per-token", Recipe(), LINEAR)
    q = run_reference(x, case)
    assert first_element(x, q, q, 1, 2) == int(x[1, 32:].abs().argmax())
    codes = q.codes.clone()
    codes[1, 16 + 3] ^= 0x10
    assert first_element(x, q, replace(q, codes=codes), 1, 2) == 7


def test_no_such_element():
    x = torch.zeros(2, 32).bfloat16()
    for place, message in (((2, 0, 0), "row is 2"), ((0, 2, 0), "block is 2"), ((0, 0, 16), "16")):
        with pytest.raises(ValueError, match=message):
            explain_element(x, Case("per-token", Recipe(), LINEAR), *place)
