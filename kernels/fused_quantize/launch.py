"""The Triton producers: how they are launched.

One kernel where a program can hold a row; a longer one is written first and quantized then, with the
same bits. Nothing waits for the GPU.
"""

# SPDX-License-Identifier: Apache-2.0
import torch
import triton

from ...reference.layouts import padded_shape
from ...reference.numerics.fp32 import rcp_delta
from ...reference.recipe import BLOCK_SIZE, Recipe, SfLayout
from ..allocate import aligned, allocate
from ..op_schema import two_arguments
from ..quantize.launch import BLOCKS_IN_REGISTERS, DTYPES, quantize_per_token
from ..quantize.ops import Triple
from ..triton_target import INTERPRETING, arch, launch_options
from . import kernel as k
from .ops import Producers, register


def launch_config(num_blocks: int) -> tuple[int, int, int]:
    """(rows of a program, blocks of a row, warps): 32 elements a thread."""
    blocks = max(4, triton.next_power_of_2(num_blocks))
    rows = max(1, 256 // blocks)
    return rows, blocks, min(16, max(1, rows * blocks // 64))


def _launch(
    x: torch.Tensor,
    columns: int,
    kind: int,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    scale: float | torch.Tensor,
    recipe: Recipe,
    layout: SfLayout,
    outputs: Triple | None,
    values: torch.Tensor | None = None,
) -> None:
    m, num_blocks = x.shape[0], columns // BLOCK_SIZE
    if m == 0:
        return
    padded_rows, padded_columns = padded_shape(m, num_blocks, layout)
    rows, blocks, warps = launch_config(num_blocks)
    programs = triton.cdiv(m, rows)
    if padded_rows != m and outputs is not None:
        tile = padded_columns // 4 * (128 if layout == SfLayout.layout_128x4 else 8)
        programs += triton.cdiv(tile, rows * blocks)
    tensor, number = two_arguments(scale)
    if tensor is not None:
        tensor = tensor.to(device=x.device, dtype=torch.float32).reshape(-1)
    codes, sf, token = outputs or (None, None, None)
    k.producer_kernel[(programs,)](
        aligned(x).view(torch.int32),
        residual,
        None if weight is None else aligned(weight).view(torch.int32),
        tensor,
        rcp_delta(x.device) if INTERPRETING else None,
        None if codes is None else codes.view(torch.int32),
        sf,
        token,
        values,
        number,
        eps,
        m,
        num_blocks,
        padded_rows,
        padded_columns,
        KIND=kind,
        RECIPE=recipe.code,
        DTYPE=DTYPES[x.dtype].value,
        LAYOUT=int(layout),
        ROWS=rows,
        BLOCKS=blocks,
        ARCH=arch(x.device),
        num_warps=warps,
        **launch_options(x.device),
    )


def _produce(
    x: torch.Tensor,
    columns: int,
    kind: int,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    scale: float | torch.Tensor,
    recipe: Recipe,
    layout: SfLayout,
    fused: bool | None = None,
) -> Triple:
    """In one launch, or with `fused` False, and by default for long rows, in two."""
    if fused is None:
        fused = columns <= BLOCKS_IN_REGISTERS * BLOCK_SIZE
    if fused:
        outputs = allocate(x[:, :columns], int(layout))
        _launch(x, columns, kind, residual, weight, eps, scale, recipe, layout, outputs)
        return outputs
    values = x.new_empty((x.shape[0], columns))
    _launch(x, columns, kind, residual, weight, eps, scale, recipe, layout, None, values)
    return quantize_per_token(values, scale, recipe, layout)


def _silu_and_mul(
    x: torch.Tensor, base_scale_inv: float | torch.Tensor, recipe: Recipe, layout: SfLayout
) -> Triple:
    kind, columns = k.SILU_AND_MUL.value, x.shape[1] // 2
    return _produce(x, columns, kind, None, None, 0.0, base_scale_inv, recipe, layout)


def _rmsnorm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    base_scale_inv: float | torch.Tensor,
    recipe: Recipe,
    layout: SfLayout,
) -> Triple:
    kind = k.RMSNORM if residual is None else k.ADD_RMSNORM
    return _produce(
        x, x.shape[1], kind.value, residual, weight, eps, base_scale_inv, recipe, layout
    )


silu_and_mul_quantize, rmsnorm_quantize = register("triton", Producers(_silu_and_mul, _rmsnorm))
