"""One call of the quantizer, checked: what every backend is asked and judged by."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..reference.recipe import BLOCK_SIZE, Build, Math, NVFP44Over6Config, Recipe, SfLayout
from . import environment
from .capability import capability_of

Backend = Literal[
    "flashinfer:cuda", "flashinfer:cute-dsl", "flashinfer:cake", "triton", "reference"
]


class _Unset:
    def __repr__(self) -> str:
        return "<omitted: FLASHINFER_NVFP4_4OVER6*>"


UNSET: Any = _Unset()
"""The default of `nvfp4_4over6`: not given, so the environment decides."""


@dataclass(frozen=True)
class Request:
    """The arguments of `nvfp4_quantize`, normalized; made by `make_request`, which checks them."""

    a: torch.Tensor
    scale: float | torch.Tensor
    layout: SfLayout
    do_shuffle: bool
    enable_pdl: bool | None
    per_token: bool
    row_index: torch.Tensor | None
    out_scale: torch.Tensor | None
    recipe: Recipe
    explicit_4over6: bool
    capability: tuple[int, int] | None  # of the GPU asked about; None on the CPU

    @property
    def m(self) -> int:
        return self.a.shape[0]

    @property
    def k(self) -> int:
        return self.a.shape[1]

    @property
    def scale_device(self) -> str | None:
        """Type of the device of a_global_sf; None for a number."""
        return self.scale.device.type if isinstance(self.scale, torch.Tensor) else None

    @property
    def by_row(self) -> bool:
        """One global scale a row."""
        return isinstance(self.scale, torch.Tensor) and self.scale.numel() > 1

    def misaligned(self, alignment: int) -> bool:
        """Whether `a` starts at no multiple of so many bytes (in its storage, which does)."""
        return self.a.storage_offset() * self.a.element_size() % alignment != 0


def make_request(
    a: torch.Tensor,
    a_global_sf: float | torch.Tensor,
    sfLayout: Any,
    do_shuffle: bool,
    sf_vec_size: int,
    enable_pdl: bool | None,
    per_token_activation: bool,
    expanded_idx_to_permuted_idx: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    nvfp4_4over6: Any,
    fast_math: bool | None,
    build: Build,
    capability: tuple[int, int] | None = None,
) -> Request:
    """Check what no backend accepts, and resolve what the environment decides.

    Raises:
        ValueError, TypeError: one argument, what was given and what is allowed.
    """
    _check_matrix(a, sf_vec_size)
    layout = _layout(sfLayout)
    explicit = not is_unset(nvfp4_4over6)
    config = four_over_six_of(nvfp4_4over6) if explicit else environment.four_over_six()
    math = math_of(fast_math, build)
    recipe = Recipe(math, config, build)
    _check_dtype(a, recipe, per_token_activation, explicit, fast_math is None)
    if a.dtype == torch.float8_e4m3fn and config is not None:
        recipe = Recipe(math, None, build)  # from the environment: FlashInfer ignores it here, too
    _check_scale(a, a_global_sf, recipe, per_token_activation, explicit)
    _check_row_index(a, expanded_idx_to_permuted_idx, per_token_activation)
    _check_out_scale(a, out_scale, per_token_activation)
    if do_shuffle:
        _check_shuffle(a, layout)
    if capability is None:
        capability = capability_of(a)
    return Request(
        a,
        a_global_sf,
        layout,
        do_shuffle,
        enable_pdl,
        per_token_activation,
        expanded_idx_to_permuted_idx,
        out_scale,
        recipe,
        explicit,
        capability,
    )


def is_unset(value: Any) -> bool:
    # FlashInfer's own sentinel is recognized by its class's name, so that nothing imports it.
    return value is UNSET or type(value).__name__ == "_UnsetType"


def _layout(value: Any) -> SfLayout:
    try:
        return SfLayout(int(value))
    except (TypeError, ValueError):
        allowed = ", ".join(layout.name for layout in SfLayout)
        raise ValueError(f"sfLayout is {value!r}; it must be one of {allowed}") from None


def math_of(fast_math: bool | None, build: Build) -> Math:
    """The math that a `fast_math` argument means now; omitted, the environment's."""
    if fast_math is None:
        return environment.math(build)
    return "fast" if fast_math else "exact"


def four_over_six_of(value: Any) -> NVFP44Over6Config | None:
    if value is None or isinstance(value, NVFP44Over6Config):
        return value
    if all(hasattr(value, f) for f in ("e4m3_max", "err_mode", "err_use_fast_math")):
        return NVFP44Over6Config.of(value)
    raise TypeError(f"nvfp4_4over6 is {value!r}; it must be an NVFP44Over6Config or None")


def _check_matrix(a: torch.Tensor, sf_vec_size: int) -> None:
    if not isinstance(a, torch.Tensor):
        raise TypeError(f"a is a {type(a).__name__}; it must be a torch.Tensor")
    if a.dim() != 2:
        raise ValueError(f"a has shape {tuple(a.shape)}; it must be [M, K]")
    if sf_vec_size != BLOCK_SIZE:
        raise ValueError(f"sf_vec_size is {sf_vec_size}; NVFP4's blocks have {BLOCK_SIZE}")
    if a.shape[1] % BLOCK_SIZE or a.shape[1] == 0:
        raise ValueError(f"a has K = {a.shape[1]}; K must be a positive multiple of {BLOCK_SIZE}")


def _check_dtype(
    a: torch.Tensor, recipe: Recipe, per_token: bool, explicit: bool, math_from_environment: bool
) -> None:
    if a.dtype in (torch.bfloat16, torch.float16):
        return
    if a.dtype == torch.float8_e4m3fn:
        if per_token:
            raise ValueError(f"a is {a.dtype}; per-token quantization takes float16 or bfloat16")
        if explicit and recipe.four_over_six is not None:
            raise ValueError(f"a is {a.dtype}; 4over6 takes float16 or bfloat16")
        return
    if a.dtype == torch.float32:
        if not per_token:
            raise ValueError(
                f"a is {a.dtype}; a global scale takes float16, bfloat16 or float8_e4m3fn"
            )
        if recipe != Recipe():
            sources = environment.sources(recipe, math=math_from_environment, config=not explicit)
            raise ValueError(
                f"a is {a.dtype}; its only recipe is fast math without 4over6, build cuda, "
                f"not {recipe}" + (f" (from {sources} in the environment)" if sources else "")
            )
        return
    raise ValueError(
        f"a is {a.dtype}; it must be float16, bfloat16, float8_e4m3fn (global scale) or float32 "
        "(per token)"
    )


def _check_scale(
    a: torch.Tensor, scale: Any, recipe: Recipe, per_token: bool, explicit: bool
) -> None:
    if isinstance(scale, torch.Tensor):
        allowed = (1,) if per_token else (1, a.shape[0])
        if scale.numel() not in allowed:
            wanted = "one" if per_token else f"one, or one a row ({a.shape[0]})"
            raise ValueError(f"a_global_sf has {scale.numel()} elements; it must have {wanted}")
        if scale.device.type != "cpu" or scale.numel() > 1:
            _check_device(a, scale, "a_global_sf")
    elif not isinstance(scale, (int, float)):
        raise TypeError(f"a_global_sf is a {type(scale).__name__}; it must be a float or a tensor")
    if per_token and explicit and _readable(scale):
        value = float(scale)
        if abs(value / recipe.base_scale_inv - 1) > 1e-3:  # FlashInfer's tolerance
            raise ValueError(
                f"a_global_sf is {value!r}; with e4m3_max {recipe.e4m3_max} it must be "
                f"1 / (6 * {recipe.e4m3_max}) = {recipe.base_scale_inv!r}"
            )


def _readable(scale: Any) -> bool:
    """Whether a scale's value can be had without waiting for a GPU or breaking a trace."""
    if not isinstance(scale, torch.Tensor):
        return True
    real = type(scale) in (torch.Tensor, torch.nn.Parameter)  # no fake tensor
    return real and scale.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_device(a: torch.Tensor, other: torch.Tensor, name: str) -> None:
    if other.device != a.device and not a.is_meta:
        raise ValueError(f"{name} is on {other.device}; it must be on a's device, {a.device}")


def _check_out_scale(a: torch.Tensor, out_scale: Any, per_token: bool) -> None:
    if out_scale is None:
        return
    if not per_token:
        raise ValueError("out_scale is given; it needs per_token_activation=True")
    if not isinstance(out_scale, torch.Tensor):
        raise TypeError(f"out_scale is a {type(out_scale).__name__}; it must be a torch.Tensor")
    if out_scale.numel() != 1:
        raise ValueError(f"out_scale has {out_scale.numel()} elements; it must have one")
    _check_device(a, out_scale, "out_scale")


def _check_row_index(a: torch.Tensor, index: Any, per_token: bool) -> None:
    if index is None:
        return
    name = "expanded_idx_to_permuted_idx"
    if not per_token:
        raise ValueError(f"{name} is given; it needs per_token_activation=True")
    if not isinstance(index, torch.Tensor):
        raise TypeError(f"{name} is a {type(index).__name__}; it must be a torch.Tensor")
    if index.dtype != torch.int32 or index.dim() != 1:
        raise ValueError(
            f"{name} is {index.dtype} of shape {tuple(index.shape)}; it must be int32 and 1-D"
        )
    if index.numel() < a.shape[0]:
        raise ValueError(
            f"{name} has {index.numel()} entries; it must have at least M = {a.shape[0]}"
        )
    _check_device(a, index, name)


def _check_shuffle(a: torch.Tensor, layout: SfLayout) -> None:
    # `shuffle_matrix_sf_a` wants whole 128-row tiles, and its result is given the shape of unpadded
    # scales, so that there must be no padded columns (fp4_quantization.py:1540 and :1885).
    if layout != SfLayout.layout_128x4:
        raise ValueError(f"do_shuffle is given with sfLayout {layout.name}; it needs layout_128x4")
    if a.shape[0] % 128 or a.shape[1] % 64:
        raise ValueError(
            f"do_shuffle is given with a of shape {tuple(a.shape)}; it needs M a multiple of 128 "
            "and K of 64"
        )
