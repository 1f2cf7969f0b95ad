"""The Triton quantizers: plain functions over `torch.library` ops of fixed arity.

Same names and keywords as in `reference.quantize`, same bits. The ops allocate, launch once and
return; nothing waits for the GPU, so they can be captured in a CUDA graph.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass

import torch
import triton

from ..reference.fp32 import _rcp_delta
from ..reference.layouts import padded_shape
from ..reference.recipe import BLOCK_SIZE, Recipe, SfLayout
from . import quantize_kernel as k
from .target import arch, interpreting

_DTYPES = {
    torch.bfloat16: k.BF16,
    torch.float16: k.FP16,
    torch.float8_e4m3fn: k.E4M3,
    torch.float32: k.FP32,
}
_ONE_READ_BLOCKS = 1024
"""Blocks of a row, at most, that one program keeps in registers: K = 16,384."""


@dataclass(frozen=True)
class LaunchConfig:
    """How a matrix is cut into programs."""

    rows: int  # rows of a program
    blocks: int  # of each row, quantized at a time
    read: int  # blocks read at a time for the row's maximum before; 0: the same ones, read once
    splits: int  # programs that share a row
    warps: int


def launch_config(
    m: int, num_blocks: int, per_token: bool = True, interpreted: bool = False
) -> LaunchConfig:
    """The shipped choice for [m, 16 * num_blocks]."""
    wide = max(4, triton.next_power_of_2(num_blocks))
    blocks = min(wide, _ONE_READ_BLOCKS)
    read = 0 if wide == blocks else blocks
    if interpreted:  # a program costs milliseconds there, whatever its size
        rows = min(64, triton.next_power_of_2(max(m, 1)))
        return LaunchConfig(rows, blocks, read, 1 if per_token else wide // blocks, 4)
    if not per_token:
        blocks = min(wide, 256)
        rows = 256 // blocks if m > 128 else 1
        return LaunchConfig(rows, blocks, 0, wide // blocks, max(1, rows * blocks // 32))
    if m <= 32 and 256 <= blocks == wide:
        # Few rows: four programs a row, each finding its maximum again.
        return LaunchConfig(1, blocks // 4, blocks, 4, blocks // 128)
    rows = max(1, 256 // blocks) if m > 128 else 1
    return LaunchConfig(rows, blocks, read, 1, max(1, rows * blocks // 32))


def quantize_per_token(
    x: torch.Tensor,
    base_scale_inv: float | torch.Tensor,
    recipe: Recipe,
    layout: SfLayout = SfLayout.layout_linear,
    *,
    row_index: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, block scales, per-token scales) of x [M, K]: `reference.quantize.quantize_per_token`.

    Args are the reference's, which has their shapes, dtypes and meaning, on one CUDA device (CPU
    under the interpreter).
    """
    tensor, value = _two_arguments(base_scale_inv)
    return torch.ops.nvfp4_moe.quantize_per_token(
        x, tensor, value, recipe.code, int(layout), row_index, out_scale
    )


def quantize_global_scale(
    x: torch.Tensor,
    global_scale: float | torch.Tensor | None,
    recipe: Recipe,
    layout: SfLayout = SfLayout.layout_linear,
    *,
    inverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, block scales) of x [M, K]: `reference.quantize.quantize_global_scale`."""
    tensor, value = _two_arguments(1.0 if global_scale is None else global_scale)
    return torch.ops.nvfp4_moe.quantize_global_scale(
        x, tensor, value, recipe.code, int(layout), inverse
    )


def _two_arguments(scale: float | torch.Tensor) -> tuple[torch.Tensor | None, float]:
    return (scale, 0.0) if isinstance(scale, torch.Tensor) else (None, float(scale))


def _outputs(
    x: torch.Tensor, layout: int, zeroed: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    m, columns = x.shape
    new = x.new_zeros if zeroed else x.new_empty
    padded = padded_shape(m, columns // BLOCK_SIZE, SfLayout(layout))
    return (
        new((m, columns // 2), dtype=torch.uint8),
        new(padded, dtype=torch.uint8),
        new((m,), dtype=torch.float32),
    )


def _contiguous(t: torch.Tensor, alignment: int) -> torch.Tensor:
    """The tensor, or a copy of it where its strides or its address do not suit the kernel."""
    t = t.contiguous()
    return t.clone() if t.data_ptr() % alignment else t


def _launch(
    x: torch.Tensor,
    mode: int,
    scale: torch.Tensor | None,
    scale_value: float,
    recipe_code: int,
    layout: int,
    *,
    inverse: bool = False,
    row_index: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    config: LaunchConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    m, columns = x.shape
    num_blocks = columns // BLOCK_SIZE
    codes, sf, token = _outputs(x, layout, zeroed=row_index is not None)
    padded_rows, padded_columns = sf.shape
    if sf.numel() == 0:
        return codes, sf, token
    x = _contiguous(x, 16)
    if scale is not None:
        scale = scale.to(device=x.device, dtype=torch.float32).reshape(-1).contiguous()
    if out_scale is not None:
        out_scale = out_scale.to(device=x.device, dtype=torch.float32).reshape(-1)
    if row_index is not None:
        row_index = row_index.contiguous()
    if config is None:
        config = launch_config(m, num_blocks, mode == k.PER_TOKEN.value, interpreting())
    programs = triton.cdiv(m, config.rows)
    if padded_rows != m and row_index is None:
        # Padding rows are in the last row tile only: programs of their own fill it, words of four.
        tile = padded_columns // 4 * (128 if layout == SfLayout.layout_128x4 else 8)
        programs += triton.cdiv(tile, config.rows * config.blocks * config.splits)
    k.quantize_kernel[(programs, config.splits)](
        x.view(torch.int32),
        row_index,
        scale,
        out_scale,
        _rcp_delta(x.device) if interpreting() else None,
        codes.view(torch.int32),
        sf,
        token,
        scale_value,
        m,
        num_blocks,
        padded_rows,
        padded_columns,
        RECIPE=recipe_code,
        MODE=mode,
        DTYPE=_DTYPES[x.dtype].value,
        LAYOUT=layout,
        INVERSE=inverse,
        HAS_ROW_INDEX=row_index is not None,
        HAS_SCALE_TENSOR=scale is not None,
        HAS_OUT_SCALE=out_scale is not None,
        ROWS=config.rows,
        BLOCKS=config.blocks,
        READ=config.read,
        SPLITS=config.splits,
        ARCH=arch(x.device),
        num_warps=config.warps,
    )
    return codes, sf, token


@torch.library.custom_op("nvfp4_moe::quantize_per_token", mutates_args=())
def _per_token_op(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    scale_value: float,
    recipe_code: int,
    layout: int,
    row_index: torch.Tensor | None,
    out_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _launch(
        x,
        k.PER_TOKEN.value,
        scale,
        scale_value,
        recipe_code,
        layout,
        row_index=row_index,
        out_scale=out_scale,
    )


@_per_token_op.register_fake
def _(x, scale, scale_value, recipe_code, layout, row_index, out_scale):
    return _outputs(x, layout, zeroed=False)


@torch.library.custom_op("nvfp4_moe::quantize_global_scale", mutates_args=())
def _global_scale_op(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    scale_value: float,
    recipe_code: int,
    layout: int,
    inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    by_row = scale is not None and scale.numel() > 1
    mode = k.ROW_SCALES if by_row else k.GLOBAL_SCALE
    return _launch(x, mode.value, scale, scale_value, recipe_code, layout, inverse=inverse)[:2]


@_global_scale_op.register_fake
def _(x, scale, scale_value, recipe_code, layout, inverse):
    return _outputs(x, layout, zeroed=False)[:2]
