"""One call of a BF16, FP8 or MXFP8 mixture of experts: what every backend is asked and judged by."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...reference.moe.baseline_moe import BaselineActivations, BaselineExperts
from ...reference.moe.routing import Routing, route
from ..device import capability_of


@dataclass(frozen=True)
class BaselineCall:
    """One call: from router logits [T, E], or with (ids [T, K] int32, weights [T, K] bf16 or fp32)."""

    activations: BaselineActivations
    experts: BaselineExperts
    weights: Mapping[str, torch.Tensor]
    """The experts by the keywords of FlashInfer's function: `flashinfer_weights` makes them once."""
    routing: Routing
    num_experts: int
    logits: torch.Tensor | None = None
    topk: tuple[torch.Tensor, torch.Tensor] | None = None
    local_expert_offset: int = 0

    @property
    def capability(self) -> tuple[int, int] | None:
        return capability_of(self.activations.hidden_states)

    def routed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids [T, K] int32 and weights [T, K], routed from logits if those are given."""
        if self.logits is not None:
            chosen = route(self.logits, self.routing)
            return chosen.ids, chosen.weights_bf16
        assert self.topk is not None, "without logits"
        return self.topk
