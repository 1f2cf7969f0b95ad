"""The activation between the two products and its gradient: in torch, or on a GPU in one kernel."""

# SPDX-License-Identifier: Apache-2.0
from typing import NamedTuple

import torch

from ..reference.activation import activate
from ..reference.weights.experts import Experts
from .grouped import runs_triton
from .operands import by_parts


class Sums(NamedTuple):
    """The first product, and what makes it physical: (sums * token_scale + bias) * scale."""

    sums: torch.Tensor  # [N, M] of the operands' dtype or fp32, [up; gate] of gated activations
    token_scale: torch.Tensor | None  # [N, 1] fp32
    bias: torch.Tensor | None  # [E, M] fp32
    scale: torch.Tensor  # [E, parts] fp32, of equal parts of M
    expert: torch.Tensor  # [N] int64


class Incoming(NamedTuple):
    """The gradient of the activation, d times factor, and scales of what its own gradient multiplies."""

    d: torch.Tensor  # [N, I] of the operands' dtype
    factor: torch.Tensor  # [N, 1] fp32
    column_scale: torch.Tensor | None  # [E, parts] fp32, of w13's rows
    row_scale: torch.Tensor | None  # [N, 1] fp32, of x


class RawGradient(NamedTuple):
    """The gradient of raw, [N, M] of d's dtype, times the scales of `Incoming`."""

    for_x: torch.Tensor  # times column_scale
    for_w13: torch.Tensor  # times row_scale


def activation_and_gradient(
    x: Sums, experts: Experts, incoming: Incoming | None
) -> tuple[torch.Tensor, RawGradient | None]:
    """Return the activation of raw, [N, I] bf16, and with `incoming` the gradient of raw.

    Rows of no expert hold anything.
    """
    kind = experts.activation
    alpha, beta, limit = _physical_parameters(experts)
    if incoming is not None and incoming.d.dtype == torch.bfloat16 and runs_triton(x.sums):
        # Triton, for GPUs alone
        from ..kernels.moe.training.activation_gradient import activation_gradient

        a, *both = activation_gradient(*x, kind, (alpha, beta, limit), *incoming)
        return a, RawGradient(*both)
    raw = x.sums.float()
    raw = raw if x.token_scale is None else raw * x.token_scale
    raw = raw if x.bias is None else raw + x.bias[x.expert]
    raw = by_parts(raw, x.scale, x.expert).detach().requires_grad_()

    def of_row(value: torch.Tensor | None) -> torch.Tensor | None:
        return None if value is None else value[x.expert, None]

    with torch.enable_grad():
        y = activate(raw, kind, alpha=of_row(alpha), beta=of_row(beta), clamp_limit=of_row(limit))
    a = y.detach().bfloat16()
    if incoming is None:
        return a, None
    dtype = incoming.d.dtype
    (d_raw,) = torch.autograd.grad(y, raw, incoming.d.float() * incoming.factor)
    for_w13 = d_raw if incoming.row_scale is None else d_raw * incoming.row_scale
    for_x = by_parts(d_raw, incoming.column_scale, x.expert)
    return a, RawGradient(for_x.to(dtype), for_w13.to(dtype))


def _physical_parameters(experts: Experts) -> tuple[torch.Tensor | None, ...]:
    """Return alpha, beta and clamp_limit [E]: of raw ones a gradient would leave fp32."""
    kind, gate = experts.activation, experts.output1_scale_gate_scalar
    up = experts.output1_scale_scalar if kind.linear_up else torch.ones_like(gate)
    beta, limit = experts.gemm1_beta, experts.gemm1_clamp_limit
    return (
        experts.gemm1_alpha,
        None if beta is None else beta * up,
        None if limit is None else limit * gate,
    )
