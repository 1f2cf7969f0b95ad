"""Intervals of the outputs of a layer over several ranks: `moe.py`, and one more sum.

13. *All-reduce.* Each of n ranks has an output in its interval, a number of the dtype that travels,
   which has p bits (bf16 8, fp16 11, fp32 24). They are added in that dtype or in a wider one, in any
   order, as rings, trees and switches do. Let P and -N be the sums of the largest positive and of the
   most negative ends and B = max(P, N): no partial sum is further from zero, but for what was rounded
   before. The last addition is monotone in the exact sum of its operands: the ends round. Of n nonzero
   numbers n - 2 additions come before it, each wrong by 2^-p of its sum at most: by
   k 2^-p B / (1 - k 2^-p) together, k = n - 2. Numbers that are zero add exactly, and of two ranks the
   sum is one rounding: nothing is free then. An addition may go by way of fp32 to bf16, twice rounded,
   which moves a tie by 2^-23 at most. Where a partial sum may exceed the dtype, P towards +inf and N
   towards -inf, so may the sum, and where both may, it may be NaN. Of infinite and NaN outputs the sum
   is what 12 says of a chain.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from typing import Any

import torch

from ..moe.activations import Activations
from ..moe.shards import select_experts, shard_experts
from ..numerics.subnormals import kept
from ..weights.experts import Experts
from .interval import Interval, U, rounded, valid
from .moe import fused_moe_bounds

_UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: U}


@kept
def all_reduce_bounds(
    parts: Sequence[Interval], reduce_dtype: torch.dtype, output_dtype: torch.dtype
) -> Interval:
    """Bound the sum of the ranks' outputs.

    Args:
        parts: each rank's, whose ends are numbers of reduce_dtype.
        reduce_dtype: in which they travel and are added.
        output_dtype: to which the sum is rounded.
    """
    low_ends, high_ends = (torch.stack([getattr(p, end) for p in parts]) for end in ("low", "high"))
    terms = torch.maximum(low_ends.abs(), high_ends.abs()).count_nonzero(0).double()
    positive, negative = (_finite(end).clamp(min=0).sum(0) for end in (high_ends, -low_ends))
    largest = torch.maximum(positive, negative)
    before = (terms - 2).clamp(min=0) * _UNIT[reduce_dtype]
    error = torch.where(before == 0, 0.0, before * largest / (1 - before)) * 1.001
    low, high = _total(low_ends), _total(high_ends)
    summed = valid(Interval(low[0] - low[1] - error, high[0] + high[1] + error))
    if reduce_dtype == torch.float32:
        summed = summed.map(lambda end: end.float().double())
    else:
        summed = rounded(reduce_dtype, summed.relatively(2 * U * 1.001))
    most = torch.finfo(reduce_dtype).max
    above, below = ((before > 0) & (size + error > most) for size in (positive, negative))
    summed = Interval(
        torch.where(below & ~summed.nan, -torch.inf, summed.low),
        torch.where(above & ~summed.nan, torch.inf, summed.high),
    )
    return summed.map(lambda end: end.float().to(output_dtype).double())


def _finite(x: torch.Tensor) -> torch.Tensor:
    return x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def expert_parallel_bounds(
    activations: Activations,
    experts: Experts,
    ids: torch.Tensor,
    weights: torch.Tensor | Interval,
    counts: Sequence[int],
    *,
    reduce_dtype: torch.dtype | None = None,
    output_dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> Interval:
    """Bound the all-reduced output [T, H] of `experts` over ranks that hold `counts` of them each.

    Args:
        The rest: as for `fused_moe_bounds`.
    """
    reduced_dtype, first, parts = reduce_dtype or output_dtype, 0, []
    for count in counts:
        local = select_experts(experts, first, count)
        parts.append(
            fused_moe_bounds(
                activations,
                local,
                ids,
                weights,
                local_expert_offset=first,
                output_dtype=reduced_dtype,
                **options,
            ).output
        )
        first += count
    return all_reduce_bounds(parts, reduced_dtype, output_dtype)


def tensor_parallel_bounds(
    activations: Activations,
    experts: Experts,
    ids: torch.Tensor,
    weights: torch.Tensor | Interval,
    tp_shards: int,
    *,
    reduce_dtype: torch.dtype | None = None,
    output_dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> Interval:
    """Bound the output [T, H] of `shards.fused_moe_shards` and of every implementation of it.

    Args:
        The rest: as for `fused_moe_bounds`.
    """
    reduced_dtype = reduce_dtype or output_dtype
    parts = [
        fused_moe_bounds(
            activations,
            shard_experts(experts, rank, tp_shards),
            ids,
            weights,
            output_dtype=reduced_dtype,
            **options,
        ).output
        for rank in range(tp_shards)
    ]
    return all_reduce_bounds(parts, reduced_dtype, output_dtype)


def _total(ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the fp64 sum and the largest error of it, which is zero where every addition was exact."""
    total = torch.zeros_like(ends[0])
    wrong = torch.zeros_like(total, dtype=torch.bool)
    size = torch.zeros_like(total)
    for end in ends:
        before, total = total, total + end
        virtual = total - before
        wrong |= (before - (total - virtual)) + (end - virtual) != 0
        size = size + _finite(end.abs())
    return total, torch.where(wrong & total.isfinite(), size * len(ends) * 2.0**-52, 0.0)
