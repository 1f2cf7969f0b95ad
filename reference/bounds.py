"""Intervals that hold the output of every implementation that keeps the contract of the fused call.

Determined by the contract: the products (exact), the bf16 roundings, the requantization of a given
intermediate, the order of the finalize. Free: the order and width of the two sums, the last bits of
the activation, and the association of accumulator, token scale and expert scalar. The argument:

1. *Sums.* The terms are exact. Let P and -N be the sums of the positive and of the negative ones. A
   partial sum, of any subset in any order, lies in [-N, P], so its magnitude is at most
   B = max(P, N). Adding n nonzero terms in fp32, in any tree, rounds at most n - 1 times by
   2^-24 B (terms that are zero add exactly). A tensor core aligns a step of terms to the largest and
   drops what lies below its last bit: `Accumulation` has its error for each term and each step.
   Where K is known to be added in contiguous ranges (`CONTIGUOUS`), a partial sum is one range's, at
   most the spread of the prefix sums and what a chunk holds: a much smaller B.
   If every term is a multiple of q and B <= 2^24 q, nothing is ever rounded: the sum is exact, whatever
   the order, and the interval a point.
2. *Scalars.* c factors that are not powers of two round c times, by 2^-24 each, in any association;
   a bias rounds twice more.
3. *Activation.* Evaluated on the ends of the interval (with the one minimum that SiLU and GELU have),
   then widened by the relative error stated in `activation_bounds`.
4. *Rounding to bf16* is monotone: the ends round.
5. *Requantization.* The row's maximum A lies between the largest lower and the largest upper bound of
   the magnitudes, and is a bf16 number: each of the few candidates is carried through the rest on its
   own. Given A, the block scale is monotone in the block's maximum: each e4m3 byte between the two
   ends is a candidate; given both, a code is monotone in the element. With 4over6 a block may take
   either candidate unless the intervals of the two errors are disjoint.
6. *Second sum*, as 1 and 2, over intervals: centre and radius.
7. *Finalize.* A chain of fused multiply-adds, each monotone in the row: it is evaluated on the ends.

Numbers that fp32 cannot hold (overflow, NaN, a subnormal sum) are outside the argument: there the
interval is infinite. So it is where the maximum of a row has more than `CANDIDATES` candidates.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass

import torch

from .bounds_activation import activation_bounds
from .bounds_requantize import requantize_blocks, requantize_rows
from .experts import Experts, gemm1_values, gemm2_values, unshuffled_bias
from .interval import (
    ANY_ORDER,
    Accumulation,
    Interval,
    plus_bias,
    rounded,
    sum_of_products,
    times,
    unless,
)
from .moe import Activations, FinalizeOrder, finalize, hidden_values
from .recipe import Recipe


@dataclass(frozen=True)
class MoEBounds:
    """Of every stage, [T, K, ...] as `MoEResult.steps` names them; zero in slots held elsewhere."""

    output: Interval  # [T, H]
    rows: Interval  # [T, K, H]
    accumulator1: Interval  # [T, K, M1]
    intermediate: Interval  # [T, K, I]: bf16 values, or fp32 with static scales


def fused_moe_bounds(
    activations: Activations,
    experts: Experts,
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    recipe: Recipe | None = None,
    local_expert_offset: int = 0,
    finalize_order: FinalizeOrder = "flashinfer",
    output_dtype: torch.dtype = torch.bfloat16,
    accumulation: Accumulation = ANY_ORDER,
    accumulator1: torch.Tensor | None = None,
    intermediate: torch.Tensor | None = None,
) -> MoEBounds:
    """The intervals of a call of `reference.moe.fused_moe`, whose arguments these are.

    Args:
        accumulator1: [T, K, M1], an implementation's own: what follows is judged given it.
        intermediate: [T, K, I], likewise; with static scales the activated values.
    """
    recipe = recipe or Recipe()
    tokens, top_k = ids.shape
    x = hidden_values(activations)
    h, i = experts.padded_hidden_size, experts.padded_intermediate_size

    def zeros(width: int) -> Interval:
        return Interval(*(x.new_zeros(tokens, top_k, width, dtype=torch.float64) for _ in "lh"))

    acc, mid, rows = zeros(experts.gemm1_weights.shape[1]), zeros(i), zeros(h)
    for e in range(experts.num_local):
        token, slot = (ids == e + local_expert_offset).nonzero(as_tuple=True)
        if not token.numel():
            continue
        sums = sum_of_products(Interval.point(x[token]), gemm1_values(experts, e), accumulation)
        _put(acc, token, slot, sums)
        if accumulator1 is not None:
            sums = Interval.point(accumulator1[token, slot])
        token_scale = activations.per_token_scale
        raw = sums if token_scale is None else times(sums, token_scale[token, None])
        middle = activation_bounds(raw, experts, e)
        if not activations.is_static:
            middle = rounded(torch.bfloat16, middle)
        _put(mid, token, slot, middle)
        if intermediate is not None:
            middle = Interval.point(intermediate[token, slot])
        _put(rows, token, slot, _second(middle, activations, experts, e, recipe, accumulation))

    rows = rows[..., : experts.hidden_size]
    positive = (weights >= 0)[..., None]
    ends = (
        torch.where(positive, rows.low, rows.high),
        torch.where(positive, rows.high, rows.low),
    )
    low, high = (finalize(end.float(), weights, h, finalize_order) for end in ends)
    output = Interval(low.to(output_dtype).double(), high.to(output_dtype).double())
    unknown = (rows.low.isinf() | rows.high.isinf()).any(1)
    return MoEBounds(unless(unknown, output), rows, acc, mid)


def _put(into: Interval, token: torch.Tensor, slot: torch.Tensor, what: Interval) -> None:
    into.low[token, slot], into.high[token, slot] = what.low, what.high


def _second(
    middle: Interval,
    activations: Activations,
    experts: Experts,
    e: int,
    recipe: Recipe,
    accumulation: Accumulation,
) -> Interval:
    """The rows of an expert [N, H], from its intermediate [N, I]: bf16 numbers."""
    n = middle.low.shape[0]
    values, scale = middle, None
    row = torch.arange(n, device=middle.low.device)
    unknown = torch.zeros_like(row, dtype=torch.bool)
    if activations.is_static:
        values = requantize_blocks(middle, recipe)
    elif not activations.is_bf16:
        values, scale, row, unknown = requantize_rows(middle, recipe)
    sums = sum_of_products(values, gemm2_values(experts, e), accumulation)
    if scale is not None:
        sums = times(sums, scale[:, None])
    if experts.gemm2_bias is not None:
        sums = plus_bias(sums, unshuffled_bias(experts.gemm2_bias[e], gated=False))
    found = rounded(torch.bfloat16, times(sums, experts.output2_scale_scalar[e]))
    index = row[:, None].expand_as(found.low)
    low = found.low.new_full((n, found.low.shape[1]), torch.inf)
    high = -low
    low = low.scatter_reduce(0, index, found.low, "amin")
    high = high.scatter_reduce(0, index, found.high, "amax")
    return unless(unknown[:, None], Interval(low, high))
