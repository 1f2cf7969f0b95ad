"""Memory of the tensors that kernels read and write: shapes, dtypes and alignment."""

# SPDX-License-Identifier: Apache-2.0
import torch

from ..reference.layouts import padded_shape
from ..reference.recipe import BLOCK_SIZE, SfLayout


def allocate(
    x: torch.Tensor, layout: int, zeroed: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return empty codes [M, K/2] uint8, block scales uint8 of `layout`, and scales [M] fp32, for x."""
    m, columns = x.shape
    new = x.new_zeros if zeroed else x.new_empty
    padded = padded_shape(m, columns // BLOCK_SIZE, SfLayout(layout))
    return (
        new((m, columns // 2), dtype=torch.uint8),
        new(padded, dtype=torch.uint8),
        new((m,), dtype=torch.float32),
    )


def aligned(t: torch.Tensor) -> torch.Tensor:
    """Return the tensor if it is contiguous at a multiple of 16 bytes, as kernels load it, or a copy."""
    t = t.contiguous().flatten().view(t.shape)  # the stride of a dimension of 1 may be any number
    return t.clone() if t.data_ptr() % 16 else t
