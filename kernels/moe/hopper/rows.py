"""bf16 rows in the order in which the grouped GEMM multiplies columns: the launch and its kernel."""

# SPDX-License-Identifier: Apache-2.0
import torch
import triton
import triton.language as tl

from ...jit.fragments import load_places, padded_to_fragments, store_fragments
from ...jit.pdl import await_previous
from ...launcher import cdiv, launch, next_power_of_2
from ...triton_target import arch, launch_options
from ..call import KernelCall


def is_padded_there(call: KernelCall) -> bool:
    """Return True if the order of columns, whose zeros end at a multiple of 128, pads hidden states."""
    columns = call.experts.hidden_size
    return padded_to_fragments(columns) == call.experts.padded_hidden_size


def in_fragments(
    x: torch.Tensor, place: torch.Tensor | None = None, row_index: torch.Tensor | None = None
) -> torch.Tensor:
    """Return rows [M, K] of bf16 in the order of `jit/fragments.py`, at the rows where they are wanted.

    Args:
        x: [M, K].
        place: int32, S for each row, where it goes; -1: nowhere. None: to its own row.
        row_index: [M] int32, a row itself, or -1 for a row that is neither read nor written.

    Returns:
        [M * S, K rounded up to 128], zeros beyond K; rows that no place names are not written.
    """
    rows, columns = x.shape
    wanted = rows if place is None else place.numel()
    out = x.new_empty((wanted, padded_to_fragments(columns)))
    at_once = min(1024, max(128, next_power_of_2(columns)))
    launch(rows_kernel, (rows, cdiv(columns, at_once)),
        x, row_index, out, place, columns,
        COLUMNS=at_once, SLOTS=0 if place is None else place.numel() // rows, ARCH=arch(x.device),
        num_warps=4, **launch_options(x.device),
    )  # fmt: skip
    return out


@triton.jit
def rows_kernel(
    x_ptr,  # [M, K] bf16
    row_index_ptr,  # [M] int32, a row itself, or -1: it is not read or written; or None: every row is
    out_ptr,  # [rows, K rounded up to 128] bf16
    place_ptr,  # [M, SLOTS] int32, with SLOTS
    K,
    COLUMNS: tl.constexpr,  # 128 divides it
    SLOTS: tl.constexpr,
    ARCH: tl.constexpr,
):
    await_previous(ARCH)
    row = tl.program_id(0).to(tl.int64) + tl.zeros((1, 1), tl.int64)
    first = tl.program_id(1) * COLUMNS
    column = first + tl.arange(0, COLUMNS)[None, :]
    live = row >= 0
    if row_index_ptr is not None:
        live = tl.load(row_index_ptr + row) == row
    x = tl.load(x_ptr + row * K + column, live & (column < K), other=0.0)
    store_fragments(x, out_ptr, load_places(place_ptr, row, live, SLOTS), first, K, SLOTS)
