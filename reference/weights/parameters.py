"""The parameters of a layer beside its weights, in physical units, and their tensors."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass

import torch

from ..activation import ActivationType
from .arguments import Options
from .scalars import (
    largest_added,
    most_encode_scale,
    per_expert,
    static_encode_scale,
)


@dataclass(frozen=True)
class Parameters:
    """The parameters of E experts, with names and units of `prepare_experts`."""

    activation: ActivationType
    w13_bias: torch.Tensor | None  # [E, rows]
    w2_bias: torch.Tensor | None  # [E, H]
    alpha: torch.Tensor | None  # [E] fp32
    beta: torch.Tensor | None  # [E] fp32
    clamp_limit: torch.Tensor | None  # [E] fp32
    input_scale: torch.Tensor | None  # [1] fp32, encode scale
    intermediate_scale: torch.Tensor | None  # [1] fp32, encode scale

    @classmethod
    def of(
        cls, weights: torch.Tensor, activation: ActivationType, options: Options
    ) -> "Parameters":
        """Return the parameters of as many experts as `weights` has, on their device."""
        experts, device = len(weights), weights.device
        alpha, beta, limit = (
            per_expert(value, experts, device)
            for value in (options.alpha, options.beta, options.clamp_limit)
        )
        input_scale, intermediate_scale = (
            None
            if amax is None
            else torch.full((1,), static_encode_scale(amax), dtype=torch.float32, device=device)
            for amax in (options.input_amax, options.intermediate_amax)
        )
        biases = options.w13_bias, options.w2_bias
        return cls(activation, *biases, alpha, beta, limit, input_scale, intermediate_scale)

    @property
    def added_beta(self) -> torch.Tensor | None:
        """The beta that is added to the up half of the accumulator; SiTU's is not."""
        return self.beta if self.activation.is_raw("beta") else None

    @property
    def most_encode_scales(self) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """The largest encode scales of the weights of both GEMMs."""
        return (
            most_encode_scale(self.input_scale, largest_added(self.w13_bias, self.added_beta)),
            most_encode_scale(self.intermediate_scale, largest_added(self.w2_bias)),
        )
