"""Recipes as values: what exists, their integer codes, FlashInfer's names and values."""

# SPDX-License-Identifier: Apache-2.0
import dataclasses
from dataclasses import replace
from typing import get_args

import pytest

from nvfp4_moe.reference.recipe import (
    FLASHINFER,
    SINCE_0_7_4,
    FlashInferVersion,
    NVFP44Over6Config,
    NVFP44Over6ErrMode,
    Recipe,
    SfLayout,
    all_recipes,
)

CONFIGS = [
    NVFP44Over6Config(e4m3_max, mode, fast)
    for e4m3_max in (448, 256)
    for mode in NVFP44Over6ErrMode
    for fast in (False, True)
]


def test_all_recipes_are_there_once():
    recipes = all_recipes()
    assert len(set(recipes)) == len(recipes) == 36
    assert {(r.math, r.build) for r in recipes} == {
        (math, build) for math in ("fast", "exact") for build in ("cuda", "cute-dsl")
    }
    for math, build in {(r.math, r.build) for r in recipes}:
        of_both = {r.four_over_six for r in recipes if (r.math, r.build) == (math, build)}
        assert of_both == {None, *CONFIGS}


def test_names_tell_recipes_apart():
    names = {str(r) for r in all_recipes()}
    assert len(names) == 36
    assert str(Recipe()) == "fast-cuda"
    four = NVFP44Over6Config(256, "mse", True)
    assert str(Recipe("exact", four, "cute-dsl")) == "exact-4over6-256-mse-fasterr-cute-dsl"
    assert str(Recipe(flashinfer="0.7.4")) == "fast-cuda-flashinfer-0.7.4"


def test_the_version_is_a_choice_whose_default_is_fixed():
    """The bits of a call that names none change with a release of ours alone."""
    assert Recipe().flashinfer == FLASHINFER == "0.7.2"
    assert Recipe().code & SINCE_0_7_4 == 0  # of files that are older than the field, too
    later = all_recipes("0.7.4")
    assert {replace(r, flashinfer="0.7.2") for r in later} == set(all_recipes())
    other_bits = [r for r in later if r.tests_rounded_scale and r.build != "cute-dsl"]
    assert other_bits == [Recipe(flashinfer="0.7.4")]


def test_code_has_one_bit_for_each_choice():
    assert Recipe().code == 0
    assert Recipe("exact").code == 0b100000
    assert Recipe(flashinfer="0.7.4").code == 0b10000000
    assert Recipe(build="cute-dsl").code == 0b1000000
    assert Recipe(four_over_six=NVFP44Over6Config()).code == 0b1
    assert Recipe(four_over_six=NVFP44Over6Config(256)).code == 0b11
    assert Recipe(four_over_six=NVFP44Over6Config(err_mode="MSE")).code == 0b101
    assert Recipe(four_over_six=NVFP44Over6Config(err_use_fast_math=True)).code == 0b10001


def test_from_code_is_the_inverse_and_refuses_every_other_integer():
    codes = {r.code: r for v in get_args(FlashInferVersion) for r in all_recipes(v)}
    assert len(codes) == 72
    for code in range(-300, 300):
        if code in codes:
            assert Recipe.from_code(code) == codes[code]
        else:
            with pytest.raises(ValueError):
                Recipe.from_code(code)


def test_base_scale_is_the_inverse_of_the_largest_value():
    assert Recipe().base_scale_inv == 1 / 2688
    assert Recipe("exact", NVFP44Over6Config(448)).base_scale_inv == 1 / 2688
    assert Recipe("exact", NVFP44Over6Config(256)).base_scale_inv == 1 / 1536
    assert [r.e4m3_max for r in (Recipe(), Recipe(four_over_six=NVFP44Over6Config(256)))] == [
        448,
        256,
    ]


def test_error_mode_is_taken_as_member_name_or_value():
    mse = NVFP44Over6ErrMode.MSE
    for given in (mse, "MSE", "mse", 1):
        assert NVFP44Over6Config(err_mode=given).err_mode is mse
    assert NVFP44Over6Config().err_mode is NVFP44Over6ErrMode.MAE


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NVFP44Over6Config(128), "e4m3_max is 128; it must be 448 or 256"),
        (lambda: NVFP44Over6Config(err_mode="L1"), "err_mode is 'L1'; it must be MAE or MSE"),
        (lambda: NVFP44Over6Config(err_mode=2), "err_mode is 2; it must be MAE or MSE"),
        (lambda: Recipe("slow"), "math is 'slow'; it must be one of .*fast.*exact"),
        (lambda: Recipe(build="cake"), "build is 'cake'; it must be one of .*cuda.*cute-dsl"),
        (lambda: Recipe(flashinfer="0.7.3"), "flashinfer is '0.7.3'; it must be one of .*0.7.2"),
    ],
    ids=["e4m3_max", "err_mode-name", "err_mode-value", "math", "build", "flashinfer"],
)
def test_refusals_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().math = "exact"
    with pytest.raises(dataclasses.FrozenInstanceError):
        NVFP44Over6Config().e4m3_max = 256


def test_enums_are_flashinfers(flashinfer):
    from flashinfer.quantization import nvfp4_quantization_utils as theirs

    for ours, other in (
        (SfLayout, flashinfer.SfLayout),
        (NVFP44Over6ErrMode, theirs.NVFP44Over6ErrMode),
    ):
        assert {e.name: e.value for e in ours} == {e.name: e.value for e in other}


def test_config_is_flashinfers(flashinfer):
    from flashinfer.quantization import nvfp4_quantization_utils as theirs

    def fields(cls):
        return [(f.name, f.default) for f in dataclasses.fields(cls)]

    assert fields(NVFP44Over6Config) == fields(theirs.NVFP44Over6Config)
    for config in CONFIGS:
        name = NVFP44Over6ErrMode(config.err_mode).name
        other = theirs.NVFP44Over6Config(config.e4m3_max, name, config.err_use_fast_math)
        assert NVFP44Over6Config.of(other) == config
        assert Recipe(four_over_six=config).code == theirs.nvfp4_4over6_code(other)
        scale = theirs.nvfp4_per_token_scale_inv(other)
        assert Recipe(four_over_six=config).base_scale_inv == scale
    assert Recipe().code == theirs.nvfp4_4over6_code(None)
    assert Recipe().base_scale_inv == theirs.nvfp4_per_token_scale_inv(None)
