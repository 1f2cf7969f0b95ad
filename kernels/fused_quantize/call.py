"""One call of SiLU and multiply, or of RMSNorm, with the quantizer: what every backend is asked."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass

import torch

from ...reference.recipe import Recipe, SfLayout


@dataclass(frozen=True)
class KernelCall:
    """The part of a call that kernels read; it crosses `torch.library` (`ops`).

    The residual, [M, K], is given beside it: the norm is then of x + residual, which replaces it.
    """

    x: torch.Tensor  # [M, K], or [M, 2K] for SiLU and multiply; contiguous
    weight: torch.Tensor | None  # [K], contiguous; None: SiLU and multiply
    eps: float
    scale: float | torch.Tensor  # as `nvfp4_quantize` has it per token
    recipe: Recipe
    layout: SfLayout

    @property
    def columns(self) -> int:
        """K, the columns that are quantized."""
        return self.x.shape[1] // (2 if self.weight is None else 1)

    def values(self) -> torch.Tensor:
        """A tensor of the shape and the dtype of what is quantized, of no meaning otherwise."""
        return self.x[:, : self.columns]


@dataclass(frozen=True)
class FusedQuantizeCall(KernelCall):
    """The checked arguments of one of the three functions of `api`."""

    residual: torch.Tensor | None  # [M, K], contiguous, read and written
    capability: tuple[int, int] | None  # of the GPU asked about; None on the CPU
