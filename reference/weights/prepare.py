"""Experts from ordinary weights, which are quantized here, or from weights that are quantized already.

Scalars: flashinfer-python 0.7.2, `trtllm_fused_moe_runner.cu:670-805`.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence

import torch

from .. import checks
from ..activation import ActivationType
from ..numerics.subnormals import kept
from ..quantize import quantize_global_scale
from ..recipe import Recipe
from .arguments import (
    Options,
    check_assembly,
    check_option_values,
    check_preparation,
    check_values,
)
from .experts import Experts
from .layout import lay_out, lay_out_bias, padded_sizes
from .parameters import Parameters
from .scalars import (
    MOST_RAW,
    check_one_scale,
    in_raw_units,
    product,
    quotient,
    raised,
    weight_encode_scale,
)


@torch.no_grad()
@kept
def prepare_experts(
    w13: torch.Tensor,
    w2: torch.Tensor,
    activation: ActivationType = ActivationType.Swiglu,
    *,
    recipe: Recipe | None = None,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    alpha: torch.Tensor | float | None = None,
    beta: torch.Tensor | float | None = None,
    clamp_limit: torch.Tensor | float | None = None,
    input_amax: float | None = None,
    intermediate_amax: float | None = None,
) -> Experts:
    """Quantize ordinary weights, an expert at a time, and lay them out for every backend.

    Gate and up of an expert share one scale; an expert of zeros has scale 1. No scalar, bias or limit
    leaves fp32, whatever the weights' size: `scalars.py` says what the smallest are rounded to.

    Args:
        w13: [E, 2 I, H] bf16 or fp16, rows [up; gate] of gated activations, [E, I, H] of the others;
            up = w13[:, :I]. H and I are multiples of 16.
        w2: [E, H, I] of the same dtype.
        recipe: of the weights; exact math by default, since this happens once.
        w13_bias: [E, 2 I] or [E, I], and w2_bias [E, H], any float dtype, in physical units.
        alpha, beta, clamp_limit: of the activation, one value or one an expert, physical units.
        input_amax, intermediate_amax: largest magnitudes of the layer's input and intermediate, for
            static activation scales; without them activations have a scale for each token.

    Raises:
        ValueError, TypeError: an argument, or two that do not fit together; a NaN or an infinity in
            weights or biases, for which preparation waits for the GPU.
    """
    options = Options(w13_bias, w2_bias, alpha, beta, clamp_limit, input_amax, intermediate_amax)
    check_preparation(w13, w2, activation, recipe, options)
    if checks.reads_values(w13, w2, waits=True):
        check_values(w13, w2, activation, options)
    return quantize_experts(w13, w2, activation, recipe, options)


def quantize_experts(
    w13: torch.Tensor,
    w2: torch.Tensor,
    activation: ActivationType,
    recipe: Recipe | None,
    options: Options,
) -> Experts:
    """`prepare_experts` of arguments that are checked; it does not wait for the GPU."""
    recipe = recipe or Recipe("exact")
    parameters = Parameters.of(w13, activation, options)
    quantized = []
    for w, most in zip((w13, w2), parameters.most_encode_scales, strict=True):
        each = most.expand(len(w)) if isinstance(most, torch.Tensor) else [most] * len(w)
        experts = (quantize_weight(w[e], w[e].abs().amax(), recipe, each[e]) for e in range(len(w)))
        quantized.append([torch.stack(part) for part in zip(*experts, strict=True)])
    return _assembled(quantized[0], quantized[1], parameters)


@kept
def quantize_weight(
    w: torch.Tensor,
    amax: torch.Tensor,
    recipe: Recipe,
    most: torch.Tensor | float = MOST_RAW,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize rows of an expert's weights, as `prepare_experts` does.

    Args:
        w: [rows, K] bf16 or fp16.
        amax: [], the largest magnitude of all rows that share the scale (gate's and up's).
        most: the largest encode scale; `scalars.most_encode_scale` of what is added to the sums.

    Returns:
        (codes, linear block scales, decode scale []); zeros have scale 1.
    """
    encode = weight_encode_scale(amax, recipe, most)
    q = quantize_global_scale(w, encode, recipe)
    return q.codes, q.block_scales, encode.reciprocal()


@torch.no_grad()
@kept
def assemble_experts(
    w13_codes: torch.Tensor,
    w13_scales: torch.Tensor,
    w13_decode: torch.Tensor,
    w2_codes: torch.Tensor,
    w2_scales: torch.Tensor,
    w2_decode: torch.Tensor,
    activation: ActivationType = ActivationType.Swiglu,
    *,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    alpha: torch.Tensor | float | None = None,
    beta: torch.Tensor | float | None = None,
    clamp_limit: torch.Tensor | float | None = None,
    input_amax: float | None = None,
    intermediate_amax: float | None = None,
) -> Experts:
    """Lay already quantized weights out for every backend.

    Args:
        w13_codes: [E, 2 I, H/2] uint8, rows [up; gate], not shuffled; w2_codes [E, H, I/2].
        w13_scales: [E, 2 I, H/16] e4m3 (uint8 or float8_e4m3fn), linear; w2_scales [E, H, I/16].
        w13_decode: [E] fp32, or [E, 2] for (up, gate) apart; w2_decode [E].
        The rest: as for `prepare_experts`.

    Raises:
        ValueError, TypeError: an argument, or two that do not fit together; a NaN or an infinity in
            biases or decode scales, for which it waits for the GPU.
        ValueError: scales apart for up and gate that the contract cannot express: with a clamp limit,
            SwigluStep or SiTU.
    """
    options = Options(w13_bias, w2_bias, alpha, beta, clamp_limit, input_amax, intermediate_amax)
    quantized = (w13_codes, w13_scales, w13_decode), (w2_codes, w2_scales, w2_decode)
    check_assembly(*quantized, activation, options)
    if checks.reads_values(w13_codes, waits=True):
        for name, decode in (("w13_decode", w13_decode), ("w2_decode", w2_decode)):
            checks.values(name, decode, (decode >= 0) & decode.isfinite(), "finite, 0 or above")
        check_option_values(activation, options)
    return assemble_checked(*quantized, activation, options)


def assemble_checked(
    w13: Sequence[torch.Tensor],
    w2: Sequence[torch.Tensor],
    activation: ActivationType,
    options: Options,
) -> Experts:
    """`assemble_experts` of (codes, block scales, decode scales), checked; values of any kind do."""
    w13_codes, w13_scales, w13_decode = w13
    w2_codes, w2_scales, w2_decode = w2
    parameters = Parameters.of(w13_codes, activation, options)
    w13_decode, w2_decode = (t.detach().float() for t in (w13_decode, w2_decode))
    if w13_decode.dim() == 2:
        up, gate = w13_decode.unbind(1)
        check_one_scale(activation, up, gate, parameters.clamp_limit)
    first, second = parameters.most_encode_scales
    return _assembled(
        (w13_codes, *raised(w13_scales, w13_decode, first)),
        (w2_codes, *raised(w2_scales, w2_decode, second)),
        parameters,
    )


def _assembled(w13: Sequence[torch.Tensor], w2: Sequence[torch.Tensor], p: Parameters) -> Experts:
    """Experts of (codes, block scales, decode scales), as `assemble_experts` takes them."""
    gated, linear_up = p.activation.gated, p.activation.linear_up
    rows, half = w13[0].shape[1:]
    hidden, intermediate = half * 2, rows // (2 if gated else 1)
    padded = padded_sizes(hidden, intermediate, gated)
    up, gate = w13[2].unbind(1) if w13[2].dim() == 2 else (w13[2], w13[2])
    up, gate = quotient(up, p.input_scale), quotient(gate, p.input_scale)
    output2 = quotient(w2[2], p.intermediate_scale)
    bias1 = bias2 = None
    beta = p.beta if p.added_beta is None else in_raw_units(p.added_beta, up)
    limit = None if p.clamp_limit is None else in_raw_units(p.clamp_limit, gate)
    if p.w13_bias is not None:
        halves = [up, gate] if linear_up else [gate]
        divisor = torch.stack(halves, 1).repeat_interleave(rows // len(halves), 1)
        bias1 = lay_out_bias(p.w13_bias, divisor, gated, padded[1])
    if p.w2_bias is not None:
        bias2 = lay_out_bias(p.w2_bias, output2[:, None], False, padded[0])
    return Experts(
        *lay_out(w13[0], w13[1], gated, padded[1], padded[0]),
        *lay_out(w2[0], w2[1], False, padded[0], padded[1]),
        product(up if linear_up else torch.ones_like(gate), p.intermediate_scale).contiguous(),
        gate.contiguous(), output2.contiguous(), hidden, intermediate, p.activation, bias1, bias2,
        p.alpha, beta, limit, p.input_scale, p.intermediate_scale,
    )  # fmt: skip
