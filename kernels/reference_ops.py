"""The reference as ops: `quantize_per_token` and `quantize_global_scale`, by the names of Triton's."""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch

from ..reference import quantize as reference
from .ops import Pair, Quantizers, Triple, register


def _per_token(x: torch.Tensor, *arguments: Any, **options: Any) -> Triple:
    result = reference.quantize_per_token(x, *arguments, **options)
    assert result.per_token_scale is not None
    return result.codes, result.block_scales, result.per_token_scale


def _global_scale(x: torch.Tensor, *arguments: Any, **options: Any) -> Pair:
    result = reference.quantize_global_scale(x, *arguments, **options)
    return result.codes, result.block_scales


quantize_per_token, quantize_global_scale = register(
    "reference", Quantizers(_per_token, _global_scale)
)
