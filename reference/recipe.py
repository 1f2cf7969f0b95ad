"""The choices of NVFP4 arithmetic as values: math, 4over6, build, version, and their integer code.

Names, fields and values of `SfLayout`, `NVFP44Over6ErrMode` and `NVFP44Over6Config` are those of
flashinfer-python 0.7.2 (`tllm_enums.py`, `quantization/nvfp4_quantization_utils.py`), so that its
own objects can stand in their place.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Literal, get_args

from . import checks

Math = Literal["fast", "exact"]
Build = Literal["cuda", "cute-dsl"]
LayerBuild = Literal["cuda", "cute-dsl", "cutlass"]
"""The build whose bits a layer has; "cutlass" is a layer's alone, with the CUDA build's quantizers."""

FlashInferVersion = Literal["0.7.2", "0.7.4"]
"""The versions of FlashInfer whose bits are described; docs/flashinfer_versions.md has what differs."""
FLASHINFER: FlashInferVersion = "0.7.2"
"""The default, whatever is installed: SGLang 0.5.23 and vLLM 0.33 run 0.7.2, all golden arrays are of
it, and the bits of a call change by an argument or with a release of ours alone."""

BLOCK_SIZE = 16
"""Elements that share one block scale."""

# Bits of `Recipe.code`. The first four are FlashInfer's code of 4over6 (`nvfp4Recipe.h`).
FOUR_OVER_SIX = 1 << 0
E4M3_MAX_256 = 1 << 1
SQUARED_ERROR = 1 << 2
FAST_ERROR = 1 << 4
EXACT = 1 << 5
NO_FTZ = 1 << 6  # the "cute-dsl" build, whose kernels keep subnormal numbers
SINCE_0_7_4 = 1 << 7


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
        flashinfer: of which version of FlashInfer.

    Raises:
        ValueError: another math, build or version.
    """

    math: Math = "fast"
    four_over_six: NVFP44Over6Config | None = None
    build: Build = "cuda"
    flashinfer: FlashInferVersion = FLASHINFER

    def __post_init__(self) -> None:
        checks.one_of("math", self.math, get_args(Math))
        checks.one_of("build", self.build, get_args(Build))
        check_flashinfer(self.flashinfer)
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
    def is_fast_alone(self) -> bool:
        """Fast math without 4over6, build "cuda": the arithmetic that fp32 input has, in any version."""
        return replace(self, flashinfer=FLASHINFER) == Recipe()

    @property
    def tests_rounded_scale(self) -> bool:
        """True if a block whose scale rounds to zero in e4m3 has codes of zero.

        Otherwise only a block whose maximum is zero has them. The reciprocal of a scale that rounds to
        zero is then infinite, which gives codes of 6.
        """
        fast = self.math == "fast" and self.four_over_six is None
        return fast and (self.build == "cute-dsl" or self.flashinfer != "0.7.2")

    @property
    def earliest(self) -> "Recipe":
        """This recipe in the first version that has its bits."""
        first = replace(self, flashinfer=FLASHINFER)
        return first if first.tests_rounded_scale == self.tests_rounded_scale else self

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
            | (SINCE_0_7_4 if self.flashinfer == "0.7.4" else 0)
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
        flashinfer: FlashInferVersion = "0.7.4" if code & SINCE_0_7_4 else "0.7.2"
        recipe = cls("exact" if code & EXACT else "fast", f, build, flashinfer)
        if recipe.code != code:
            raise ValueError(f"code {code} is not the code of a recipe")
        return recipe

    def __str__(self) -> str:
        f = self.four_over_six
        parts: list[str] = [self.math]
        if f is not None:
            error = NVFP44Over6ErrMode(int(f.err_mode)).name.lower()
            parts.append(f"4over6-{f.e4m3_max}-{error}{'-fasterr' if f.err_use_fast_math else ''}")
        version = [] if self.flashinfer == FLASHINFER else [f"flashinfer-{self.flashinfer}"]
        return "-".join([*parts, self.build, *version])


def check_flashinfer(version: Any) -> None:
    """Raise ValueError unless it is a version whose bits are described."""
    checks.one_of("flashinfer", version, get_args(FlashInferVersion))


def check_recipe(recipe: Any) -> None:
    """Raise unless it is a Recipe, or None for the function's default."""
    if recipe is not None:
        checks.instance("recipe", recipe, Recipe, "a Recipe or None")


def all_recipes(flashinfer: FlashInferVersion = FLASHINFER) -> list[Recipe]:
    """Every recipe of a version: 2 maths x (no 4over6 + 8 of it) x 2 builds."""
    fours: list[NVFP44Over6Config | None] = [None]
    fours += [
        NVFP44Over6Config(e, m, fast)
        for e in (448, 256)
        for m in NVFP44Over6ErrMode
        for fast in (False, True)
    ]
    return [
        Recipe(m, f, b, flashinfer) for b in get_args(Build) for m in get_args(Math) for f in fours
    ]
