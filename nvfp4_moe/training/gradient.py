"""The autograd function of `fake_quantized_moe`: `fused_moe`'s value, a straight-through gradient.

Every quantization and rounding has the derivative 1 (the straight-through estimator: Bengio, Leonard and
Courville, arXiv 1308.3432). For token t and slot k, with e = ids[t, k] and g the gradient of output[t],
the backward computes these values of the forward anew:

    x^, W1, W2    x[t] and the weights of e, as their codes and scales say: code * block scale * scale
    raw           x^ W1^T + w13_bias[e]
    a             bf16(activation(raw))
    a^            what the codes and scales of a say
    row           bf16(a^ W2^T + w2_bias[e])

With `activation_mode` "bf16" x^ is x[t] and a^ is a. The gradients are

    d weights[t, k]  = g . row
    d row            = weights[t, k] g
    d w2[e]         += d row^T a~         d w2_bias[e]  += d row
    d raw            = activation'(raw) d row W2~
    d w13[e]        += d raw^T x~         d w13_bias[e] += d raw
    d x[t]          += d raw W1~

where x~, W1~, a~ and W2~ are, as NVIDIA's Transformer Engine names the two (pull request 2644,
NVTE_BACKWARD_OVERRIDE):

    "dequantized"      x^, W1, a^, W2: what the forward multiplied
    "high_precision"   x[t], bf16(w13[e]), a, bf16(w2[e]): what the quantizers were given

The scales come from maxima, so that nothing saturates in them. A clamp of the activation is part of the
layer, and no rounding: beyond it the derivative is 0. Sums are fp32; `grouped.py` says what their
operands are rounded to. Gradients are not specified to the bit. raw is computed anew, so that an a^ next
to a border may be its neighbour.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ..kernels.moe.api import fused_moe
from ..reference.recipe import Recipe
from ..reference.weights.experts import Experts
from ..reference.weights.versions import versions
from .activation import Incoming, Sums, activation_and_gradient
from .grouped import operand_dtype, outer, sort_slots, times
from .operands import (
    Matrices,
    Rows,
    by_parts,
    first_bias,
    first_matrices,
    first_product,
    quantized,
    row_gradient,
    second_bias,
    second_matrices,
    sums_by_expert,
    values_of,
)

Backward = Literal["dequantized", "high_precision"]
"""The operands of the gradients' products; see the module."""


@dataclass(frozen=True)
class Arithmetic:
    """The arithmetic of a forward and of its backward."""

    quantizer: Recipe | None  # of the activations; None: they stay bf16
    backward: Backward


class StraightThrough(torch.autograd.Function):
    """The server's value in the forward pass, the module's gradients in the backward pass."""

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
        arithmetic: Arithmetic,
        call: dict[str, Any],
    ) -> torch.Tensor:
        masters = (w13, w2) if arithmetic.backward == "high_precision" else ()
        ctx.save_for_backward(x, weights, ids, *masters)
        ctx.experts, ctx.arithmetic, ctx.versions = experts, arithmetic, versions(experts)
        inputs = (x, w13, w2, weights, w13_bias, w2_bias)
        ctx.like = [None if t is None else (t.shape, t.dtype) for t in inputs]
        routing = ids.contiguous(), weights.contiguous()
        return fused_moe(x.contiguous(), experts, routing, **call)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weights, ids, *masters = ctx.saved_tensors
        if versions(ctx.experts) != ctx.versions:
            raise RuntimeError(
                "experts were written between this forward and its backward (by `Experts.load_`?); load "
                "the new weights after the backward, or into experts of their own"
            )
        wanted = ctx.needs_input_grad[:6]
        if ids.numel() == 0:
            found = [None if k is None else grad.new_zeros(k[0], dtype=k[1]) for k in ctx.like]
        else:
            with torch.autocast(grad.device.type, enabled=False):  # it would multiply in bf16
                layer = _Layer(x, weights, ids, ctx.experts, ctx.arithmetic, tuple(masters))
                found = list(_gradients(layer, grad, wanted))
        kept = (
            None if t is None or not want else t.to(k[1])
            for t, want, k in zip(found, wanted, ctx.like, strict=True)
        )
        return *kept, None, None, None, None


class _Layer(NamedTuple):
    """A backward is given this, besides the gradient."""

    x: torch.Tensor  # [T, H] bf16
    weights: torch.Tensor  # [T, K]
    ids: torch.Tensor  # [T, K] int32
    experts: Experts
    arithmetic: Arithmetic
    masters: tuple[torch.Tensor, ...]  # w13 and w2, for "high_precision"


def _gradients(
    layer: _Layer, grad: torch.Tensor, wanted: tuple[bool, ...]
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of x, w13, w2, weights and both biases; None where none is wanted."""
    experts, recipe = layer.experts, layer.arithmetic.quantizer
    for_x, for_w13, for_w2, for_weights, for_bias1, for_bias2 = wanted
    dtype = operand_dtype(grad.device)
    # First what keeps the GPU busy, while the host prepares the many small steps.
    first, second = first_matrices(experts, dtype), second_matrices(experts, dtype)
    s = sort_slots(layer.ids, experts.num_local)
    weights = layer.weights.flatten()[s.slot, None].float()
    g = grad.to(dtype)[s.token]

    codes = None if recipe is None else quantized(layer.x, recipe)
    tokens = Rows(layer.x.to(dtype)) if codes is None else values_of(codes, dtype)
    x = tokens.at(s.token)
    assert first.scale is not None
    sums = Sums(
        first_product(x, codes, first, experts, layer.ids, s),
        x.scale,
        first_bias(experts),
        first.scale,
        s.expert,
    )
    served = second
    if layer.masters:
        first, second = (Matrices(w.bfloat16().to(dtype)) for w in layer.masters)
        x = Rows(layer.x.to(dtype)[s.token])
    incoming = None
    if for_x or for_w13 or for_bias1:
        factor = weights if second.scale is None else weights * second.scale[s.expert]
        d = times(g, second.values, s.ends)
        incoming = Incoming(d, factor, first.scale, x.scale)
    a, d_raw = activation_and_gradient(sums, experts, incoming)
    del sums, incoming
    mid = Rows(a.to(dtype)) if recipe is None else values_of(quantized(a, recipe), dtype)

    d_weights = d_w2 = d_bias2 = d_x = d_w13 = d_bias1 = None
    if for_weights:
        d_weights = s.by_slot(row_gradient(grad, mid, served, second_bias(experts), s))
    if for_w2:  # scales go with the narrower factor, and g stays as it is
        mid = Rows(a.to(dtype)) if layer.masters else mid
        factor = weights if mid.scale is None else weights * mid.scale
        scaled = torch.mul(mid.values, factor, out=torch.empty_like(mid.values))
        d_w2 = outer(g, scaled, s.ends)
    if for_bias2:
        d_bias2 = sums_by_expert(g, weights, s)
    if for_x and d_raw:
        d_x = s.sums_by_token(times(d_raw.for_x, first.values, s.ends))
    if for_w13 and d_raw:
        d_w13 = outer(d_raw.for_w13, x.values, s.ends)
    if for_bias1 and d_raw:
        by_expert = sums_by_expert(d_raw.for_x, torch.ones_like(weights), s).float()
        each = torch.arange(experts.num_local, dtype=torch.int64, device=grad.device)
        d_bias1 = by_parts(by_expert, None if first.scale is None else 1 / first.scale, each)
    return d_x, d_w13, d_w2, d_weights, d_bias1, d_bias2
