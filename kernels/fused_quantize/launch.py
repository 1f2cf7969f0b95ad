"""The Triton producers: how they are launched.

One kernel where a program can hold a row; a longer one is written first and quantized then, with the
same bits. Nothing waits for the GPU.
"""

# SPDX-License-Identifier: Apache-2.0
import torch

from ...reference.layouts import padded_shape
from ...reference.numerics.fp32 import rcp_delta
from ...reference.recipe import BLOCK_SIZE, SfLayout
from ..allocate import aligned, allocate
from ..launcher import cdiv, launch, next_power_of_2
from ..op_schema import two_arguments
from ..quantize.launch import BLOCKS_IN_REGISTERS, DTYPES, quantize_per_token
from ..quantize.ops import Triple
from ..triton_target import INTERPRETING, arch, launch_options
from . import kernel as k
from .call import KernelCall
from .ops import register


def launch_config(num_blocks: int) -> tuple[int, int, int]:
    """(rows of a program, blocks of a row, warps): 32 elements a thread."""
    blocks = max(4, next_power_of_2(num_blocks))
    rows = max(1, 256 // blocks)
    return rows, blocks, min(16, max(1, rows * blocks // 64))


def _launch(
    call: KernelCall,
    residual: torch.Tensor | None,
    outputs: Triple | None,
    values: torch.Tensor | None = None,
) -> None:
    """Write the quantized rows into `outputs`, or what would be quantized into `values`."""
    x, recipe, layout = call.x, call.recipe, call.layout
    m, num_blocks = x.shape[0], call.columns // BLOCK_SIZE
    if m == 0:
        return
    kind = k.RMSNORM if residual is None else k.ADD_RMSNORM
    weight = None
    if call.weight is None:
        kind = k.SILU_AND_MUL
    else:
        weight = aligned(call.weight).view(torch.int32)
    padded_rows, padded_columns = padded_shape(m, num_blocks, layout)
    rows, blocks, warps = launch_config(num_blocks)
    programs = cdiv(m, rows)
    if padded_rows != m and outputs is not None:
        tile = padded_columns // 4 * (128 if layout == SfLayout.layout_128x4 else 8)
        programs += cdiv(tile, rows * blocks)
    tensor, number = two_arguments(call.scale)
    if tensor is not None:
        tensor = tensor.to(device=x.device, dtype=torch.float32).reshape(-1)
    codes, sf, token = outputs or (None, None, None)
    launch(
        k.producer_kernel,
        (programs,),
        aligned(x).view(torch.int32),
        residual,
        weight,
        tensor,
        rcp_delta(x.device) if INTERPRETING else None,
        None if codes is None else codes.view(torch.int32),
        sf,
        token,
        values,
        number,
        call.eps,
        m,
        num_blocks,
        padded_rows,
        padded_columns,
        KIND=kind.value,
        RECIPE=recipe.code,
        DTYPE=DTYPES[x.dtype].value,
        LAYOUT=int(layout),
        ROWS=rows,
        BLOCKS=blocks,
        ARCH=arch(x.device),
        num_warps=warps,
        **launch_options(x.device),
    )


def fused_quantize(
    call: KernelCall, residual: torch.Tensor | None, fused: bool | None = None
) -> Triple:
    """Run a call in one launch, or with `fused` False, and by default for long rows, in two."""
    if fused is None:
        fused = call.columns <= BLOCKS_IN_REGISTERS * BLOCK_SIZE
    if fused:
        outputs = allocate(call.values(), call.layout)
        _launch(call, residual, outputs)
        return outputs
    values = call.x.new_empty((call.x.shape[0], call.columns))
    _launch(call, residual, None, values)
    return quantize_per_token(values, call.scale, call.recipe, call.layout)


OP = register("triton", fused_quantize)
