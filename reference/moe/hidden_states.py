"""The hidden states of a fused call: NVFP4 codes with their scales, or bf16."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass

import torch

from ..numerics import e2m1, e4m3
from ..quantize import quantize_per_token
from ..recipe import BLOCK_SIZE, Recipe


@dataclass(frozen=True)
class Activations:
    """The hidden states of T tokens as the fused call receives them."""

    hidden_states: torch.Tensor  # [T, H/2] uint8 codes, or [T, H] bf16 (W4A16)
    block_scales: torch.Tensor | None = None  # [T, H/16] e4m3, linear
    per_token_scale: torch.Tensor | None = None  # [T] fp32; None: static scales

    @property
    def is_bf16(self) -> bool:
        return self.hidden_states.dtype == torch.bfloat16

    @property
    def is_static(self) -> bool:
        return not self.is_bf16 and self.per_token_scale is None


def quantize_activations(x: torch.Tensor, recipe: Recipe) -> Activations:
    """Quantize [T, H] bf16 or fp16 per token."""
    q = quantize_per_token(x, recipe.base_scale_inv, recipe)
    return Activations(q.codes, q.block_scales, q.per_token_scale)


def hidden_values(activations: Activations) -> torch.Tensor:
    """Return [T, H] fp32: codes times block scales, exact; or the bf16 values."""
    if activations.is_bf16:
        return activations.hidden_states.float()
    assert activations.block_scales is not None
    codes = activations.hidden_states
    scales = e4m3.decode(activations.block_scales.view(torch.uint8))
    scales = scales.reshape(codes.shape[0], codes.shape[1] * 2 // BLOCK_SIZE)
    values = e2m1.decode(e2m1.unpack(codes)).unflatten(-1, (-1, BLOCK_SIZE))
    return (values * scales[..., None]).flatten(-2)
