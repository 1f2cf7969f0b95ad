"""Adds the outputs of all ranks, in the dtype in which they are exchanged."""

# SPDX-License-Identifier: Apache-2.0
import torch
import torch.distributed as dist

from ..kernels.moe.backends import FUSED_MOE
from ..kernels.moe.call import MoECall
from ..reference import checks
from ..reference.moe.layer import OUTPUT_DTYPES
from .rank_check import Group


def sum_dtype(reduce_dtype: torch.dtype | None, output_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which outputs are sent and added.

    Raises:
        ValueError: it, or the output's, is none that a layer writes.
    """
    chosen = output_dtype if reduce_dtype is None else reduce_dtype
    for name, dtype in (("output_dtype", output_dtype), ("reduce_dtype", chosen)):
        if dtype not in OUTPUT_DTYPES:
            checks.wrong_value(name, dtype, checks.any_of(map(str, OUTPUT_DTYPES)))
    return chosen


def all_reduced(r: MoECall, backend: str, group: Group, output_dtype: torch.dtype) -> torch.Tensor:
    """Run the call on every rank, and return the outputs' sum [T, hidden size] in output_dtype."""
    output = FUSED_MOE.serve(r, backend)[0]
    dist.all_reduce(output, group=group)
    return output.to(output_dtype)
