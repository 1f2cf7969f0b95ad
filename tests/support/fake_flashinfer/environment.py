"""The variables as FlashInfer's C++ reads them at each launch (`envUtils.cpp:61` and `:365`)."""

# SPDX-License-Identifier: Apache-2.0
import os
from typing import Any, Literal

from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe

OF_ENVIRONMENT = -1
"""The code of 4over6 by which a kernel is told to read the environment."""


def _on(name: str) -> bool:
    return os.environ.get(name) == "1"


def recipe(build: Literal["cuda", "cute-dsl"], code: int = OF_ENVIRONMENT) -> Recipe:
    """Return the recipe of the build's kernels; `code` has bits 0 to 4 of `nvfp4Recipe.h`."""
    exact = _on("FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH")
    if build == "cuda":
        exact |= _on("TRTLLM_DISABLE_FP4_QUANT_FAST_MATH")
    config = _of_environment() if code == OF_ENVIRONMENT else _of_code(code)
    return Recipe("exact" if exact else "fast", config, build)


def code_of(nvfp4_4over6: Any) -> int:
    """Return the code of an argument of FlashInfer's Python: omitted, None or a recipe."""
    from flashinfer.quantization.nvfp4_quantization_utils import _UNSET, nvfp4_4over6_code

    if nvfp4_4over6 is _UNSET or nvfp4_4over6 == OF_ENVIRONMENT:
        return OF_ENVIRONMENT
    return nvfp4_4over6_code(nvfp4_4over6)


def _of_environment() -> NVFP44Over6Config | None:
    if not _on("FLASHINFER_NVFP4_4OVER6"):
        return None
    return NVFP44Over6Config(
        256 if _on("FLASHINFER_NVFP4_4OVER6_E4M3_USE_256") else 448,
        os.environ.get("FLASHINFER_NVFP4_4OVER6_ERR_MODE", "MAE"),
        _on("FLASHINFER_NVFP4_4OVER6_ERR_USE_FAST_MATH"),
    )


def _of_code(code: int) -> NVFP44Over6Config | None:
    if not code & 1:
        return None
    return NVFP44Over6Config(
        256 if code & 2 else 448, "MSE" if code & 4 else "MAE", bool(code & 16)
    )
