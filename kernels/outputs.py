"""The tensors that kernels are given and return: their alignment, shapes and dtypes."""

# SPDX-License-Identifier: Apache-2.0
import torch

from ..reference.layouts import padded_shape
from ..reference.recipe import BLOCK_SIZE, SfLayout


def allocate(
    x: torch.Tensor, layout: int, zeroed: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes [M, K/2] uint8, block scales of the layout uint8, per-token scales [M] fp32) for x."""
    m, columns = x.shape
    new = x.new_zeros if zeroed else x.new_empty
    padded = padded_shape(m, columns // BLOCK_SIZE, SfLayout(layout))
    return (
        new((m, columns // 2), dtype=torch.uint8),
        new(padded, dtype=torch.uint8),
        new((m,), dtype=torch.float32),
    )


def aligned(t: torch.Tensor) -> torch.Tensor:
    """The tensor, or a contiguous copy at a multiple of 16 bytes, which the kernels' loads need."""
    t = t.contiguous()
    return t.clone() if t.data_ptr() % 16 else t


def two_arguments(scale: float | torch.Tensor | None) -> tuple[torch.Tensor | None, float]:
    """A scale as the ops take it: a tensor, or a number (1 for none)."""
    if isinstance(scale, torch.Tensor):
        return scale, 0.0
    return None, 1.0 if scale is None else float(scale)
