"""The operands of the layer's products: tokens, intermediates and weights, as values times scales.

The values are exact in bf16, code times block scale or a bf16 number. The scales are fp32, and stay
outside of the products.
"""

# SPDX-License-Identifier: Apache-2.0
from typing import NamedTuple

import torch

from ..kernels.quantize.api import nvfp4_quantize
from ..reference.layouts import inverse
from ..reference.moe.hidden_states import Activations, hidden_values
from ..reference.recipe import Recipe, SfLayout
from ..reference.weights.experts import Experts
from ..reference.weights.layout import decoded_rows, row_order, unshuffled_bias
from .grouped import Slots, outer, runs_triton, times


class Rows(NamedTuple):
    """Rows of activations."""

    values: torch.Tensor  # [N, K]
    scale: torch.Tensor | None = None  # [N, 1] fp32

    def at(self, index: torch.Tensor) -> "Rows":
        return Rows(self.values[index], None if self.scale is None else self.scale[index])


class Matrices(NamedTuple):
    """A matrix for each expert, of one or two parts: up and gate."""

    values: torch.Tensor  # [E, M, K]
    scale: torch.Tensor | None = None  # [E, parts] fp32, of equal parts of the rows


def by_parts(rows: torch.Tensor, scale: torch.Tensor | None, expert: torch.Tensor) -> torch.Tensor:
    """Multiply the parts of rows [N, M] fp32 by the scales [E, parts] of their experts [N]."""
    if scale is None:
        return rows
    return (rows.unflatten(1, (scale.shape[1], -1)) * scale[expert][..., None]).flatten(1)


def quantized(x: torch.Tensor, recipe: Recipe) -> Activations:
    """Return the codes and scales of bf16 rows [N, K]."""
    codes = nvfp4_quantize(
        x,
        recipe.base_scale_inv,
        SfLayout.layout_linear,
        per_token_activation=True,
        nvfp4_4over6=recipe.four_over_six,
        fast_math=recipe.math == "fast",
        build=recipe.build,
    )
    return Activations(*codes)


def values_of(codes: Activations, dtype: torch.dtype) -> Rows:
    """Return the values of codes and block scales, and their per-token scales."""
    assert codes.per_token_scale is not None
    return Rows(hidden_values(codes).to(dtype), codes.per_token_scale[:, None])


def first_product(
    x: Rows, codes: Activations | None, w: Matrices, experts: Experts, ids: torch.Tensor, s: Slots
) -> torch.Tensor:
    """Return x W^T by row, [N, M]: fp32 of codes, as a rounded sum would often have another code.

    Args:
        x: [N, H], by row.
        codes: [T, H/2], of which x are the values; None: x was not quantized.
        w: `first_matrices`.
        ids: [T, K] int32.
    """
    if codes is None:
        return times(x.values, w.values.mT, s.ends)
    if runs_triton(ids):
        from ..kernels.moe.training.first_sums import first_sums  # Triton: for GPUs alone

        return first_sums(codes, experts, ids, _first_rows(experts))
    return times(x.values.float(), w.values.mT, s.ends)


def _first_rows(experts: Experts) -> torch.Tensor:
    """Return the prepared row of each row of w13, without padding."""
    w = experts.gemm1_weights
    return valid_rows(inverse(row_order(w.shape[1], experts.activation.gated, w.device)), experts)


def first_matrices(experts: Experts, dtype: torch.dtype) -> Matrices:
    """Return w13 [E, 2 I or I, H] as its codes and scales say, without padding."""
    codes, scales = experts.gemm1_weights, experts.gemm1_weights_scale
    values = _decoded(codes, scales, _first_rows(experts), experts.hidden_size, dtype)
    gate = experts.output1_scale_gate_scalar
    up = experts.output1_scale_scalar if experts.activation.linear_up else gate
    parts = [up, gate] if experts.activation.gated else [gate]
    return Matrices(values, torch.stack(parts, 1))


def second_matrices(experts: Experts, dtype: torch.dtype) -> Matrices:
    """Return w2 [E, H, I] as its codes and scales say, without padding."""
    codes, scales = experts.gemm2_weights, experts.gemm2_weights_scale
    order = inverse(row_order(codes.shape[1], False, codes.device))[: experts.hidden_size]
    values = _decoded(codes, scales, order, experts.intermediate_size, dtype)
    return Matrices(values, experts.output2_scale_scalar[:, None])


def _decoded(
    codes: torch.Tensor,
    scales: torch.Tensor,
    places: torch.Tensor,
    columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return code times block scale of the prepared rows `places`: [E, M, columns]."""
    if dtype == torch.bfloat16 and runs_triton(codes):
        from ..kernels.weights.values import weight_values  # Triton, which a CPU does not need

        return weight_values(codes, scales, places.int(), columns)
    each = (decoded_rows(*one)[places, :columns] for one in zip(codes, scales, strict=True))
    return torch.stack([values.to(dtype) for values in each])


def first_bias(experts: Experts) -> torch.Tensor | None:
    """Return the first GEMM's bias, [E, 2 I or I] fp32, before the scales of `first_matrices`."""
    if experts.gemm1_bias is None:
        return None
    bias = unshuffled_bias(experts.gemm1_bias, experts.activation.gated)
    return valid_rows(bias.mT, experts).mT


def second_bias(experts: Experts) -> torch.Tensor | None:
    """Return the second GEMM's bias, [E, H] fp32, before the scales of `second_matrices`."""
    if experts.gemm2_bias is None:
        return None
    return unshuffled_bias(experts.gemm2_bias, gated=False)[:, : experts.hidden_size]


def valid_rows(t: torch.Tensor, experts: Experts) -> torch.Tensor:
    """Return t [padded rows of w13, ...] without the padding of up and of gate."""
    parts = t.chunk(2 if experts.activation.gated else 1)
    return torch.cat([part[: experts.intermediate_size] for part in parts])


def row_gradient(
    grad: torch.Tensor, x: Rows, w: Matrices, bias: torch.Tensor | None, s: Slots
) -> torch.Tensor:
    """Return grad[token] . bf16((x W^T + bias) * scales) by row, [N] fp32: of the routing weights.

    Args:
        grad: [T, H]; x: rows [N, I]; w: [E, H, I], of one part.
    """
    sums = times(x.values, w.values.mT, s.ends)
    if sums.dtype == torch.bfloat16 and runs_triton(sums):
        # Triton, which a CPU does not need
        from ..kernels.moe.training.row_dots import row_dots

        assert w.scale is not None  # of quantized weights
        return row_dots(grad, s.token, sums, x.scale, bias, w.scale, s.expert)
    sums = sums.float() if x.scale is None else sums.float() * x.scale
    row = by_parts(sums if bias is None else sums + bias[s.expert], w.scale, s.expert)
    return (grad[s.token].float() * row.bfloat16().float()).sum(1)


def sums_by_expert(rows: torch.Tensor, weights: torch.Tensor, s: Slots) -> torch.Tensor:
    """Sum the rows [N, M] of each expert, times weights [N, 1]: [E, M] of rows' dtype.

    It is a product, so that no row of no expert is read and the order of the sums is fixed.
    """
    columns = (
        weights.to(rows.dtype).expand(-1, 8).contiguous()
    )  # 16 bytes, which the kernel asks for
    return outer(columns, rows, s.ends)[:, 0]
