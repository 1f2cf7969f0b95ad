"""The launch of the Triton quantizers.

`quantize_per_token` and `quantize_global_scale` have the names, keywords and bits of
`reference.quantize`, on one CUDA device (CPU tensors under the interpreter). They allocate, launch once
and return; nothing waits for the GPU, so they can be captured in a CUDA graph.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...reference.layouts import padded_shape
from ...reference.numerics.fp32 import rcp_delta
from ...reference.recipe import BLOCK_SIZE, FOUR_OVER_SIX, Recipe, SfLayout
from ..allocate import aligned, allocate
from ..jit import formats
from ..jit.fragments import padded_to_fragments
from ..launcher import cdiv, launch, next_power_of_2
from ..op_schema import two_arguments
from ..triton_target import INTERPRETING, arch, launch_options
from . import kernel as k
from .ops import GlobalScale, Pair, PerToken, Triple, register

DTYPES = {
    torch.bfloat16: formats.BF16,
    torch.float16: formats.FP16,
    torch.float8_e4m3fn: formats.E4M3,
    torch.float32: formats.FP32,
}
BLOCKS_IN_REGISTERS = 1024
"""The most blocks of a row that one program keeps in registers: K = 16,384."""


@dataclass(frozen=True)
class LaunchConfig:
    """The division of a matrix into programs."""

    rows: int  # rows of a program
    blocks: int  # of each row, quantized at a time
    read: int  # blocks read at a time for the row's maximum before; 0: the same ones, read once
    splits: int  # programs that share a row
    warps: int
    parts: int = 1  # times `blocks`, which a program keeps from its one read


def launch_config(
    m: int,
    num_blocks: int,
    *,
    four_over_six: bool = False,
    tiled: bool = False,
    interpreted: bool = False,
) -> LaunchConfig:
    """Choose the shipped configuration of the per-token quantizer for [m, 16 * num_blocks].

    Args:
        tiled: block scales are written in the layout 128x4, and the rows have no index.
    """
    wide = max(4, next_power_of_2(num_blocks))
    read = min(wide, BLOCKS_IN_REGISTERS)
    if interpreted:  # a program costs milliseconds there, whatever its size
        rows = min(64, next_power_of_2(max(m, 1)))
        return LaunchConfig(rows, read, 0 if wide == read else read, 1, 4)
    one_read = wide == read
    if one_read and wide >= 256 and (m <= 32 or (four_over_six and m <= 128)):
        # Few rows leave multiprocessors idle: several programs a row, each finding its maximum.
        # Two programs a row were faster than four in 128x4 on an H200, and four warps than eight for a
        # program of a row of 512 blocks until 32 rows filled the GPU.
        blocks = 128 if four_over_six else min(256, wide // (2 if tiled else 4))
        most = 4 if m <= 16 and wide <= 512 else 8
        return LaunchConfig(1, blocks, wide, cdiv(num_blocks, blocks), min(most, blocks // 32))
    # Parts follow the row's length more closely than a power of two does. Few threads with much each
    # wait less at the row's maximum than many, and share what is computed for the whole row.
    part = wide // 4
    if part > 64 and num_blocks % part and num_blocks % (part // 2) == 0:
        part //= 2  # seven parts or five, and no part half empty
    parts = cdiv(num_blocks, part)
    if four_over_six and (not one_read or (m > 128 and wide >= 128 and parts > 4)):
        # More than four parts do not fit in registers. The second read hits the cache.
        blocks = 128 if wide > 256 and num_blocks % 128 == 0 else 64
        return LaunchConfig(1, blocks, read, 1, blocks // 32)
    if m <= 128 and one_read:
        return LaunchConfig(1, wide, 0, 1, min(16, max(1, wide // 32)))
    if wide < 128:
        return LaunchConfig(256 // wide, wide, 0, 1, 4)
    if not one_read:
        return LaunchConfig(1, read, read, 1, 16)
    # Memory is written by 32 bytes at a time. In 128x4 they hold four block scales of an even row and
    # four of the next one: a program of both rows writes 8 bytes of them, not 4. Two longer rows
    # were not measured, and 4over6 takes longer for its arithmetic than for its writes.
    rows = 2 if tiled and wide <= 512 and not four_over_six else 1
    return LaunchConfig(rows, part, 0, 1, rows * part // 32, parts)


def global_launch_config(m: int, num_blocks: int, *, interpreted: bool = False) -> LaunchConfig:
    """Choose the configuration of the global-scale quantizer, whose rows need no maximum."""
    wide = max(4, next_power_of_2(num_blocks))
    blocks = min(wide, BLOCKS_IN_REGISTERS if interpreted else 256)
    rows = max(1, 256 // blocks)
    if interpreted:
        rows = min(64, next_power_of_2(max(m, 1)))
    elif m <= 128:
        rows = 1
    return LaunchConfig(rows, blocks, 0, wide // blocks, max(1, rows * blocks // 64))


class Outputs(NamedTuple):
    """The outputs of the kernel: codes and block scales, or values in their place."""

    codes: torch.Tensor | None
    block_scales: torch.Tensor | None
    token_scale: torch.Tensor | None
    values: torch.Tensor | None = None
    place: torch.Tensor | None = None
    fragments: bool = False


def _launch(
    x: torch.Tensor,
    outputs: Outputs,
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
) -> None:
    m, columns = x.shape
    num_blocks = columns // BLOCK_SIZE
    padded_rows, padded_columns = padded_shape(m, num_blocks, SfLayout(layout))
    if m == 0 or num_blocks == 0:
        return
    x = aligned(x)
    if scale is not None:
        scale = scale.to(device=x.device, dtype=torch.float32).reshape(-1).contiguous()
    if out_scale is not None:
        out_scale = out_scale.to(device=x.device, dtype=torch.float32).reshape(-1)
    if row_index is not None:
        row_index = row_index.contiguous()
    if config is None:
        cut = max(num_blocks, 8) if outputs.fragments else num_blocks
        if mode == formats.PER_TOKEN.value:
            config = launch_config(
                m,
                cut,
                four_over_six=bool(recipe_code & FOUR_OVER_SIX),
                tiled=layout == SfLayout.layout_128x4 and row_index is None,
                interpreted=INTERPRETING,
            )
        else:
            config = global_launch_config(m, cut, interpreted=INTERPRETING)
    programs = cdiv(m, config.rows)
    if padded_rows != m and row_index is None:
        # Padding rows are in the last row tile only: programs of their own fill it, words of four.
        tile = padded_columns // 4 * (128 if layout == SfLayout.layout_128x4 else 8)
        programs += cdiv(tile, config.rows * config.blocks * config.splits)
    launch(
        k.quantize_kernel,
        (programs, config.splits),
        x.view(torch.int32),
        row_index,
        scale,
        out_scale,
        rcp_delta(x.device) if INTERPRETING else None,
        None if outputs.codes is None else outputs.codes.view(torch.int32),
        outputs.block_scales,
        outputs.values,
        outputs.place,
        outputs.token_scale,
        scale_value,
        m,
        num_blocks,
        padded_rows,
        padded_columns,
        RECIPE=recipe_code,
        MODE=mode,
        DTYPE=DTYPES[x.dtype].value,
        LAYOUT=layout,
        INVERSE=inverse,
        HAS_ROW_INDEX=row_index is not None,
        HAS_SCALE_TENSOR=scale is not None,
        HAS_OUT_SCALE=out_scale is not None,
        ROWS=config.rows,
        BLOCKS=config.blocks,
        PARTS=config.parts,
        READ=config.read,
        SPLITS=config.splits,
        FRAGMENTS=outputs.fragments,
        SLOTS=0 if outputs.place is None else outputs.place.numel() // m,
        ARCH=arch(x.device),
        num_warps=config.warps,
        **launch_options(x.device),
    )


def _per_token(call: PerToken) -> Triple:
    scale, value = two_arguments(call.base_scale_inv)
    codes, sf, token = allocate(call.x, call.layout, zeroed=call.row_index is not None)
    _launch(
        call.x, Outputs(codes, sf, token), formats.PER_TOKEN.value, scale, value, call.recipe.code,
        int(call.layout), row_index=call.row_index, out_scale=call.out_scale,
    )  # fmt: skip
    return codes, sf, token


def _global_scale(call: GlobalScale) -> Pair:
    scale, value = two_arguments(call.global_scale)
    mode = formats.ROW_SCALES if scale is not None and scale.numel() > 1 else formats.GLOBAL_SCALE
    codes, sf, token = allocate(call.x, call.layout, zeroed=call.row_index is not None)
    _launch(
        call.x, Outputs(codes, sf, token), mode.value, scale, value, call.recipe.code,
        int(call.layout), inverse=call.inverse, row_index=call.row_index,
    )  # fmt: skip
    return codes, sf


def quantize_to_values(
    x: torch.Tensor, recipe: Recipe, *, per_token: bool, row_index: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Quantize [M, K] to (values [M, 4, K/4] bf16, per-token scales [M] fp32 or None).

    A value is code times block scale, exact; each fourth column together, as the grouped GEMM of the
    mixture of experts reads them. Without `per_token` the encode scale is 1, already in x, and fp32 x
    is quantized as `reference.quantize.quantize_block_scales` does. Rows that `row_index` does not name
    are neither read nor written.
    """
    rows, columns = x.shape
    token = x.new_empty(rows, dtype=torch.float32) if per_token else None
    values = x.new_empty((rows, 4, columns // 4), dtype=torch.bfloat16)
    mode = formats.PER_TOKEN if per_token else formats.GLOBAL_SCALE
    scale = recipe.base_scale_inv if per_token else 1.0
    linear = int(SfLayout.layout_linear)
    _launch(
        x, Outputs(None, None, token, values), mode.value, None, scale, recipe.code, linear,
        row_index=row_index,
    )  # fmt: skip
    return values, token


def quantize_to_fragments(
    x: torch.Tensor,
    recipe: Recipe,
    *,
    per_token: bool,
    row_index: torch.Tensor | None = None,
    place: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`quantize_to_values` in the order of `jit/fragments.py`, at the rows where they are wanted.

    Args:
        x: [M, K].
        row_index: as for `quantize_to_values`.
        place: int32, S for each row, where its values and its scale go; -1: nowhere. None: to their own
            row.

    Returns:
        (values [M * S, K rounded up to 128] bf16, per-token scales [M * S] fp32 or None). Columns beyond
        K are zero. Rows that no place names are not written.
    """
    rows, columns = x.shape
    wanted = rows if place is None else place.numel()
    token = x.new_empty(wanted, dtype=torch.float32) if per_token else None
    values = x.new_empty((wanted, padded_to_fragments(columns)), dtype=torch.bfloat16)
    mode = formats.PER_TOKEN if per_token else formats.GLOBAL_SCALE
    scale = recipe.base_scale_inv if per_token else 1.0
    out = Outputs(None, None, token, values, place, fragments=True)
    linear = int(SfLayout.layout_linear)
    _launch(x, out, mode.value, None, scale, recipe.code, linear, row_index=row_index)
    return values, token


quantize_per_token = register("triton_per_token", PerToken, _per_token, 3)
quantize_global_scale = register("triton_global_scale", GlobalScale, _global_scale, 2)
