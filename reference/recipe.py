"""The choices of NVFP4 arithmetic as values: math, 4over6, build, and their integer code.

Names, fields and values of `SfLayout`, `NVFP44Over6ErrMode` and `NVFP44Over6Config` are those of
flashinfer-python 0.7.2 (`tllm_enums.py`, `quantization/nvfp4_quantization_utils.py`), so that its
own objects can stand in their place.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal, get_args

from . import checks

Math = Literal["fast", "exact"]
Build = Literal["cuda", "cute-dsl"]
LayerBuild = Literal["cuda", "cute-dsl", "cutlass"]
"""Whose bits a fused layer has: the last is a layer's alone, whose quantizers are the CUDA build's."""

BLOCK_SIZE = 16
"""Elements that share one block scale."""

# Bits of `Recipe.code`. The first four are FlashInfer's code of 4over6 (`nvfp4Recipe.h`).
FOUR_OVER_SIX = 1 << 0
E4M3_MAX_256 = 1 << 1
SQUARED_ERROR = 1 << 2
FAST_ERROR = 1 << 4
EXACT = 1 << 5
NO_FTZ = 1 << 6  # the "cute-dsl" build, whose kernels keep subnormal numbers


class SfLayout(IntEnum):
    """The order of block scales in memory; `layouts.py` has the formulas."""

    layout_128x4 = 0
    layout_8x4 = 1
    layout_linear = 2


class NVFP44Over6ErrMode(IntEnum):
    """The error that chooses between the two block scales of 4over6."""

    MAE = 0
    MSE = 1


@dataclass(frozen=True)
class NVFP44Over6Config:
    """4over6: each block is quantized with its maximum at 6 and at 4, the smaller error is kept.

    Args:
        e4m3_max: 448 or 256, the largest block scale; the base scale is 1 / (6 * e4m3_max).
        err_mode: sum of absolute (MAE) or squared (MSE) differences; a name is accepted.
        err_use_fast_math: differences in the scaled domain instead of the input's.

    Raises:
        ValueError: another e4m3_max or err_mode.
    """

    e4m3_max: int = 448
    err_mode: NVFP44Over6ErrMode | str = NVFP44Over6ErrMode.MAE
    err_use_fast_math: bool = False

    def __post_init__(self) -> None:
        if type(self.e4m3_max) is not int or self.e4m3_max not in (256, 448):
            checks.wrong_value("e4m3_max", self.e4m3_max, "448 or 256")
        try:
            mode = (
                NVFP44Over6ErrMode[self.err_mode.upper()]
                if isinstance(self.err_mode, str)
                else NVFP44Over6ErrMode(self.err_mode)
            )
        except (KeyError, ValueError):
            checks.wrong_value("err_mode", self.err_mode, "MAE or MSE")
        checks.flag("err_use_fast_math", self.err_use_fast_math)
        object.__setattr__(self, "err_mode", mode)

    @classmethod
    def of(cls, other: Any) -> "NVFP44Over6Config":
        """This class's copy of any object with the three fields (FlashInfer's own, say)."""
        return cls(other.e4m3_max, int(other.err_mode), bool(other.err_use_fast_math))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Recipe:
    """One arithmetic: everything that decides the bits, besides the tensors.

    Args:
        math: "fast" (FlashInfer's default) or "exact" (IEEE divisions).
        four_over_six: a config, or None for off.
        build: whose edge cases: FlashInfer's "cuda" kernels or its "cute-dsl" ones.

    Raises:
        ValueError: another math or build.
    """

    math: Math = "fast"
    four_over_six: NVFP44Over6Config | None = None
    build: Build = "cuda"

    def __post_init__(self) -> None:
        checks.one_of("math", self.math, get_args(Math))
        checks.one_of("build", self.build, get_args(Build))
        if self.four_over_six is not None:
            kind, allowed = NVFP44Over6Config, "an NVFP44Over6Config or None"
            checks.instance("four_over_six", self.four_over_six, kind, allowed)

    @property
    def e4m3_max(self) -> int:
        return 448 if self.four_over_six is None else self.four_over_six.e4m3_max

    @property
    def base_scale_inv(self) -> float:
        """The `a_global_sf` of per-token mode: 1/2688, or 1/1536 with e4m3_max 256."""
        return 1.0 / (6.0 * self.e4m3_max)

    @property
    def code(self) -> int:
        """The recipe as an integer, the sum of the bits above."""
        f = self.four_over_six
        return (
            (FOUR_OVER_SIX if f is not None else 0)
            | (E4M3_MAX_256 if f is not None and f.e4m3_max == 256 else 0)
            | (SQUARED_ERROR if f is not None and f.err_mode == NVFP44Over6ErrMode.MSE else 0)
            | (FAST_ERROR if f is not None and f.err_use_fast_math else 0)
            | (EXACT if self.math == "exact" else 0)
            | (NO_FTZ if self.build == "cute-dsl" else 0)
        )

    @classmethod
    def from_code(cls, code: int) -> "Recipe":
        """The inverse of `code`; ValueError for an integer that is no recipe's code."""
        f = None
        if code & FOUR_OVER_SIX:
            f = NVFP44Over6Config(
                256 if code & E4M3_MAX_256 else 448,
                NVFP44Over6ErrMode.MSE if code & SQUARED_ERROR else NVFP44Over6ErrMode.MAE,
                bool(code & FAST_ERROR),
            )
        build: Build = "cute-dsl" if code & NO_FTZ else "cuda"
        recipe = cls("exact" if code & EXACT else "fast", f, build)
        if recipe.code != code:
            raise ValueError(f"code {code} is not the code of a recipe")
        return recipe

    def __str__(self) -> str:
        f = self.four_over_six
        parts: list[str] = [self.math]
        if f is not None:
            error = NVFP44Over6ErrMode(int(f.err_mode)).name.lower()
            parts.append(f"4over6-{f.e4m3_max}-{error}{'-fasterr' if f.err_use_fast_math else ''}")
        return "-".join([*parts, self.build])


def check_recipe(recipe: Any) -> None:
    """Raise unless it is a Recipe, or None for the function's default."""
    if recipe is not None:
        checks.instance("recipe", recipe, Recipe, "a Recipe or None")


def all_recipes() -> list[Recipe]:
    """Every recipe there is: 2 maths x (no 4over6 + 8 of it) x 2 builds."""
    fours: list[NVFP44Over6Config | None] = [None]
    fours += [
        NVFP44Over6Config(e, m, fast)
        for e in (448, 256)
        for m in NVFP44Over6ErrMode
        for fast in (False, True)
    ]
    return [Recipe(m, f, b) for b in get_args(Build) for m in get_args(Math) for f in fours]
