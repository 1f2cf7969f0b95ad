"""Add up the weighted rows of each token: the launch and its kernel."""

# SPDX-License-Identifier: Apache-2.0
import torch
import triton
import triton.language as tl

from ...reference.moe.finalize import FinalizeOrder, split_k_groups
from ..jit.arithmetic import add, fma, from_bf16, to_bf16
from ..jit.pdl import await_previous
from ..launcher import cdiv, launch, next_power_of_2
from ..triton_target import arch, launch_options


def finalize(
    rows: torch.Tensor,
    permuted: torch.Tensor,
    weights: torch.Tensor,
    output: torch.Tensor,
    order: FinalizeOrder,
) -> None:
    """Write the `finalize` of `reference/moe/finalize.py` into `output`.

    Args:
        rows: [P, >= width] bf16.
        permuted: [T * K] int32, the row of each slot; -1: the slot has none.
        weights: [T, K] bf16 or fp32.
        output: [T, width], bf16, fp16 or fp32. FlashInfer's order depends on its width.
    """
    (tokens, top_k), width = weights.shape, output.shape[1]
    groups = split_k_groups(tokens, top_k, width) if order == "flashinfer" else 1
    # With two columns a thread has the rows of all slots on their way at once, for which it has no
    # registers with eight. Many tokens hide that wait by their number.
    columns = min(256 if tokens <= 16 else 1024, next_power_of_2(width))
    launch(finalize_kernel, (tokens, cdiv(width, columns)),
        rows, permuted, weights.contiguous(), output, rows.shape[1], width,
        K=top_k, GROUPS=groups, MULTIPLIES_FIRST=order == "slot-multiply", COLUMNS=columns,
        ARCH=arch(output.device), num_warps=4, **launch_options(output.device),
    )  # fmt: skip


@triton.jit
def finalize_kernel(
    rows_ptr,  # [rows, H] bf16, by permuted row
    permuted_ptr,  # [T * K] int32
    weights_ptr,  # [T, K] bf16 or fp32
    out_ptr,  # [T, width] bf16, fp16 or fp32
    H,
    width,
    K: tl.constexpr,
    GROUPS: tl.constexpr,  # strided groups of slots, summed apart (`split_k_groups`)
    MULTIPLIES_FIRST: tl.constexpr,  # slot 0 is a product, not added to +0
    COLUMNS: tl.constexpr,
    ARCH: tl.constexpr,
):
    # That order flushes no subnormals.
    FTZ: tl.constexpr = not MULTIPLIES_FIRST
    await_previous(ARCH)
    token = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    total = tl.zeros((COLUMNS,), tl.float32)
    for j in tl.static_range(GROUPS):
        part = tl.zeros((COLUMNS,), tl.float32)
        for k in range(j, K, GROUPS):
            row = tl.load(permuted_ptr + token * K + k)
            weight = tl.load(weights_ptr + token * K + k).to(tl.float32)
            is_local = tl.where(inside, row, -1) >= 0
            stored = tl.load(rows_ptr + row.to(tl.int64) * H + column, is_local, other=0.0)
            value = from_bf16(stored, ARCH)
            onto = part
            if MULTIPLIES_FIRST and k == 0:
                # -0 by its bits: `tl.full` takes -0.0 for 0.
                onto = tl.full((COLUMNS,), -(2**31), tl.int32).to(tl.float32, bitcast=True)
            added = fma(value, weight, onto, FTZ, ARCH)
            # The weight of a slot of no expert may be NaN.
            part = tl.where(is_local, added, part)
        total = part if j == 0 else add(total, part, FTZ, ARCH)
    out = out_ptr + token.to(tl.int64) * width + column
    if out_ptr.dtype.element_ty == tl.bfloat16:
        tl.store(out, to_bf16(total, ARCH), inside)
    else:
        tl.store(out, total, inside)
