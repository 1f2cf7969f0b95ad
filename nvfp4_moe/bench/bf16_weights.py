"""The weights of the layers that ours is compared with, and the bf16 layer in fp32, which checks it.

y = x[token] @ w13[expert].T + bias;  a = activation(y);  out = sum of weight * (a @ w2.T + bias)
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from typing import Any

import torch

from ..reference.activation import ActivationType, activate

Quantized = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""NVFP4: codes [E, N, K/2] uint8, linear scales [E, N, K/16] uint8 of e4m3, decode scales [E] fp32."""


@dataclass(frozen=True)
class Weights:
    """The weights of the local experts, which are the first E that logits have."""

    w13: torch.Tensor  # [E, 2 I, H] bf16, rows [up; gate], or [E, I, H]
    w2: torch.Tensor  # [E, H, I] bf16
    activation: ActivationType = ActivationType.Swiglu  # or Relu2
    w13_bias: torch.Tensor | None = None  # [E, 2 I or I] bf16
    w2_bias: torch.Tensor | None = None  # [E, H] bf16
    alpha: float = 1.0
    beta: float = 0.0
    limit: float = float("inf")

    def __post_init__(self) -> None:
        if self.activation not in (ActivationType.Swiglu, ActivationType.Relu2):
            raise ValueError(f"activation is {self.activation.name}; it must be Swiglu or Relu2")

    @property
    def plain(self) -> bool:
        """True if Swiglu is silu(gate) * up."""
        return (self.alpha, self.beta, self.limit) == (1.0, 0.0, float("inf"))


def plain(x: torch.Tensor, logits: torch.Tensor, w: Weights, top_k: int) -> torch.Tensor:
    """Compute the layer in fp32 by torch, a slot at a time, for a few tokens.

    Args:
        x: [T, H] bf16.
        logits: [T, all experts] fp32.
        w: of the local experts.
        top_k: experts of a token.

    Returns:
        [T, H] fp32, what the local experts add.
    """
    best, ids = logits.float().topk(top_k, dim=1)
    routing_weights = best.softmax(1)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    limit = torch.tensor(w.limit, dtype=torch.float32, device=x.device)
    gated = w.activation.gated
    parameters: dict[str, Any] = {"alpha": w.alpha, "beta": w.beta, "clamp_limit": limit}
    for token, slot in (ids < w.w13.shape[0]).nonzero().tolist():
        e = int(ids[token, slot])
        y = w.w13[e].float() @ x[token].float()
        if w.w13_bias is not None:
            y = y + w.w13_bias[e].float()
        row = w.w2[e].float() @ activate(y, w.activation, **parameters if gated else {})
        if w.w2_bias is not None:
            row = row + w.w2_bias[e].float()
        out[token] += routing_weights[token, slot] * row
    return out
