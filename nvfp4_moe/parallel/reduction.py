"""The ranks' outputs added, in the dtype in which they travel."""

# SPDX-License-Identifier: Apache-2.0
import torch
import torch.distributed as dist

from ..kernels import moe_dispatch
from ..kernels.moe_request import MoERequest
from .agreement import Group


def all_reduced(
    r: MoERequest, backend: str, group: Group, output_dtype: torch.dtype
) -> torch.Tensor:
    """[T, hidden size] of output_dtype: each rank's output, of the request's dtype, and their sum."""
    output = moe_dispatch.serve(r, backend)[0]
    dist.all_reduce(output, group=group)
    return output.to(output_dtype)
