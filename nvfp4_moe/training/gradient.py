"""The layer that `fake_quantized_moe` is, to autograd: `fused_moe`'s value, a straight-through gradient.

It is the gradient of the layer at the values that were multiplied, the derivative of every rounding
taken as 1. For token t and slot k, with e = ids[t, k] and g the gradient of output[t]:

    x^, W1, W2    x[t] and the weights of e, as their codes and scales say: code * block scale * scale
    raw           x^ W1^T + w13_bias[e]
    a^            what the codes and scales of bf16(activation(raw)) say
    row           bf16(a^ W2^T + w2_bias[e])

    d weights[t, k]  = g . row
    d row            = weights[t, k] g
    d w2[e]         += d row^T a^          d w2_bias[e]  += d row
    d raw            = activation'(raw) d row W2
    d w13[e]        += d raw^T x^          d w13_bias[e] += d raw
    d x[t]          += d raw W1

The scales come from maxima, so that nothing saturates in them. A clamp of the activation is part of the
layer, and no rounding: beyond it the derivative is 0. Gradients are summed in fp32 and are not specified
to the bit; raw is computed anew for them, so that an a^ next to a border may be its neighbour.
"""

# SPDX-License-Identifier: Apache-2.0
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ..kernels.moe.api import fused_moe
from ..kernels.quantize.api import nvfp4_quantize
from ..reference.activation import activate
from ..reference.moe.activations import Activations, hidden_values
from ..reference.recipe import Recipe, SfLayout
from ..reference.weights.experts import Experts
from ..reference.weights.layout import gemm1_values, gemm2_values, unshuffled_bias
from ..reference.weights.versions import versions


class StraightThrough(torch.autograd.Function):
    """The server's value forwards, `_add_gradients` backwards."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        weights: torch.Tensor,
        w13_bias: torch.Tensor | None,
        w2_bias: torch.Tensor | None,
        ids: torch.Tensor,
        experts: Experts,
        recipe: Recipe,
        call: dict[str, Any],
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weights, ids)
        ctx.experts, ctx.recipe, ctx.versions = experts, recipe, versions(experts)
        inputs = (x, w13, w2, weights, w13_bias, w2_bias)
        ctx.like = [None if t is None else (t.shape, t.dtype) for t in inputs]
        routing = ids.contiguous(), weights.contiguous()
        return fused_moe(x.contiguous(), experts, routing, **call)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weights, ids = ctx.saved_tensors
        if versions(ctx.experts) != ctx.versions:
            raise RuntimeError(
                "experts were written between this forward and its backward (by `Experts.load_`?); load "
                "the new weights after the backward, or into experts of their own"
            )
        into = _Gradients(
            *(
                torch.zeros(like[0], dtype=like[1], device=grad.device) if like and wanted else None
                for like, wanted in zip(ctx.like, ctx.needs_input_grad, strict=False)
            )
        )
        if into.x is not None:
            into = into._replace(x=into.x.float())  # which several experts add to
        with torch.autocast(grad.device.type, enabled=False):  # it would multiply in bf16
            values = _dequantized(x, ctx.recipe)
            for e in range(ctx.experts.num_local):
                token, slot = (ids == e).nonzero(as_tuple=True)
                if token.numel():
                    some = _Slots(token, slot, values[token], weights[token, slot, None].float())
                    _add_gradients(into, grad[token].float(), some, ctx.experts, e, ctx.recipe)
        found = into if into.x is None else into._replace(x=into.x.to(x.dtype))
        return *found, None, None, None, None


class _Gradients(NamedTuple):
    """The gradients of the differentiable arguments, in their order; None where none is needed."""

    x: torch.Tensor | None  # fp32
    w13: torch.Tensor | None
    w2: torch.Tensor | None
    weights: torch.Tensor | None
    w13_bias: torch.Tensor | None
    w2_bias: torch.Tensor | None


class _Slots(NamedTuple):
    """The N slots that one expert serves."""

    token: torch.Tensor  # [N]
    slot: torch.Tensor  # [N]
    values: torch.Tensor  # [N, H] fp32, of the quantized tokens
    weights: torch.Tensor  # [N, 1] fp32


def _add_gradients(
    into: _Gradients, grad: torch.Tensor, some: _Slots, experts: Experts, e: int, recipe: Recipe
) -> None:
    """One expert's; `grad` is [N, H] fp32, the output's at these tokens."""
    hidden, inner = experts.hidden_size, experts.intermediate_size
    scales = _row_scales(experts, e)
    w13 = gemm1_values(experts, e)[:, :hidden] * scales[:, None]
    w2 = gemm2_values(experts, e)[:hidden, :inner] * experts.output2_scale_scalar[e]
    raw = some.values @ w13.T
    if experts.gemm1_bias is not None:
        raw = raw + unshuffled_bias(experts.gemm1_bias[e], experts.activation.gated) * scales
    raw.requires_grad_()
    with torch.enable_grad():
        activated = _activated(raw, experts, e)[:, :inner]
    mid = _dequantized(activated.detach().bfloat16(), recipe)

    if into.weights is not None:
        row = mid @ w2.T
        if experts.gemm2_bias is not None:
            bias = unshuffled_bias(experts.gemm2_bias[e], gated=False)[:hidden]
            row = row + bias * experts.output2_scale_scalar[e]
        products = grad * row.bfloat16().float()
        into.weights[some.token, some.slot] = products.sum(1).to(into.weights.dtype)
    d_row = some.weights * grad
    if into.w2 is not None:
        into.w2[e] = d_row.T @ mid
    if into.w2_bias is not None:
        into.w2_bias[e] = d_row.sum(0)

    (d_padded,) = torch.autograd.grad(activated, raw, d_row @ w2)
    if into.x is not None:
        into.x.index_add_(0, some.token, d_padded @ w13)
    halves = d_padded.chunk(2 if experts.activation.gated else 1, 1)
    d_raw = torch.cat([half[:, :inner] for half in halves], 1)
    if into.w13 is not None:
        into.w13[e] = d_raw.T @ some.values
    if into.w13_bias is not None:
        into.w13_bias[e] = d_raw.sum(0)


def _row_scales(experts: Experts, e: int) -> torch.Tensor:
    """[M1] fp32: what makes each row of the first GEMM physical."""
    kind, gate = experts.activation, experts.output1_scale_gate_scalar[e]
    up = experts.output1_scale_scalar[e] if kind.linear_up else gate
    rows = experts.gemm1_weights.shape[1]
    return torch.stack([up, gate] if kind.gated else [gate]).repeat_interleave(
        rows // (2 if kind.gated else 1)
    )


def _activated(raw: torch.Tensor, experts: Experts, e: int) -> torch.Tensor:
    """`moe.activate_raw` in physical units: of the scalars, a gradient through it would leave fp32."""
    kind, gate = experts.activation, experts.output1_scale_gate_scalar[e]
    up = experts.output1_scale_scalar[e] if kind.linear_up else 1.0

    def of_expert(value: torch.Tensor | None, unit: torch.Tensor | float) -> torch.Tensor | None:
        return None if value is None else value[e] * unit

    return activate(
        raw,
        kind,
        alpha=of_expert(experts.gemm1_alpha, 1.0),
        beta=of_expert(experts.gemm1_beta, up),
        clamp_limit=of_expert(experts.gemm1_clamp_limit, gate),
    )


def _dequantized(x: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """[N, K] fp32: what the codes and scales of bf16 rows say."""
    codes, block_scales, per_token_scale = nvfp4_quantize(
        x,
        recipe.base_scale_inv,
        SfLayout.layout_linear,
        per_token_activation=True,
        nvfp4_4over6=recipe.four_over_six,
        fast_math=recipe.math == "fast",
        build=recipe.build,
    )
    return hidden_values(Activations(codes, block_scales)) * per_token_scale[:, None]
